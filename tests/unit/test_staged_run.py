"""data.uri: the driver checks it, every node downloads it, and every worker refuses other data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from datasets.beton import load_manifest
from datasets.prepare.prepare import prepare
from datasets.sources.glyphs import GlyphSettings
from jobs.prepare import main
from pipeline.cluster.preflight import check_config
from pipeline.cluster.progress import event_writer
from pipeline.cluster.worker import data_of_node
from pipeline.config.load import ConfigError, differences, parse_config
from pipeline.config.schema import Config
from pipeline.training.describe import summarize_data


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staged-run") / "remote"
    prepare("glyphs", folder, glyphs=GlyphSettings(num_train=20, num_validation=10, image_size=48), num_processes=1)
    return folder


def config_of(tmp_path: Path, uri: str | None) -> Config:
    return parse_config(
        {
            "name": "staged",
            "data": {"dataset": "glyphs", "folder": str(tmp_path / "node"), "uri": uri},
            "model": {
                "backbone": "small_resnet",
                "backbone_width": 0.25,
                "resolutions": [32],
                "predictor": {"input_size": 24, "width": 0.25},
            },
            "training": {"batch_size": 10},
            "stages": {"backbone": {"epochs": 1}},
            "cluster": {"storage": str(tmp_path / "runs"), "cpus_per_worker": 1},
        }
    )


def test_the_driver_reads_only_the_manifest(remote: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, remote.as_uri())
    manifest, _ = check_config(config)
    assert manifest == load_manifest(remote)
    summary = summarize_data(config.data)
    assert (summary.folder, summary.num_train, summary.num_validation) == (remote.as_uri(), 20, 10)
    assert not config.data.folder.exists()


def test_all_problems_of_a_model_are_reported_together(remote: Path, tmp_path: Path) -> None:
    tree = config_of(tmp_path, remote.as_uri()).model_dump(mode="json")
    tree["model"] |= {"resolutions": [32, 24], "normalization": "weights"}
    tree["stages"]["backbone"]["layer_decay"] = 0.5
    tree["stages"]["predictor"] = {"epochs": 1, "alpha_gflops": 99}
    with pytest.raises(ConfigError) as error:
        check_config(parse_config(tree))
    found = sorted(problem.partition(" is ")[0].partition(",")[0] for problem in error.value.problems)
    layer_groups = "model: layer_decay and freeze_layers need layer groups"
    assert found == [layer_groups, "model: model.normalization", "stages.predictor.alpha_gflops"]


def test_an_address_without_data_is_refused_before_ray_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.uri: file:///.*nothing has no prepared data"):
        check_config(config_of(tmp_path, (tmp_path / "nothing").as_uri()))


def test_an_invalid_tracking_address_is_listed_with_the_other_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "/some/folder")
    with pytest.raises(ConfigError) as caught:
        check_config(config_of(tmp_path, None))
    data, tracking = caught.value.problems
    assert data.startswith("data.folder: ")
    assert tracking.startswith("tracking.uri: ")
    assert "/some/folder" in tracking


def test_a_worker_downloads_the_drivers_data_and_refuses_other_data(remote: Path, tmp_path: Path) -> None:
    config, manifest = config_of(tmp_path, remote.as_uri()), load_manifest(remote)
    lines: list[str] = []
    for _ in range(2):  # the node's second worker finds the data
        assert data_of_node(config.data, manifest.digest, lines.append) == manifest
    assert lines[0].startswith(f"downloading to {config.data.folder}: ")

    with pytest.raises(ValueError, match=rf"has other data \(digest {manifest.digest}\) than the driver's"):
        data_of_node(config.data, "0" * 32, print)
    here = config_of(tmp_path, None)
    with pytest.raises(ValueError, match="has other data"):
        data_of_node(here.data, "0" * 32, print)


def test_only_one_node_appends_to_the_progress_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    event_writer(None)("on another node")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == "on another node\n"
    event_writer(tmp_path)("on the first")
    assert json.loads((tmp_path / "progress.jsonl").read_text())["message"] == "on the first"


def test_a_stored_configuration_holds_no_secret(tmp_path: Path) -> None:
    config = config_of(tmp_path, "s3://KEY:secret@bucket/folder")
    assert config.data.uri == "s3://KEY:secret@bucket/folder"
    assert config.model_dump(mode="json")["data"]["uri"] == "s3://KEY:***@bucket/folder"
    assert differences(config_of(tmp_path, None), config) == ["data.uri: None -> 's3://KEY:***@bucket/folder'"]
    assert "secret" not in repr(config)


def test_data_with_an_address_needs_no_source() -> None:
    tree = {"name": "run", "data": {"dataset": "imagefolder", "folder": "f"}, "stages": {"backbone": {"epochs": 1}}}
    with pytest.raises(ConfigError, match=r"data\.source is missing\. .* or data\.uri"):
        parse_config(tree)
    tree["data"]["uri"] = "s3://bucket/folder"
    assert parse_config(tree).data.source is None


def test_the_job_prepares_and_uploads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    glyphs = {"num_train": 10, "num_validation": 10, "image_size": 32}
    data = {"dataset": "glyphs", "folder": str(tmp_path / "here"), "num_processes": 1, "glyphs": glyphs}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"name": "n", "data": data, "stages": {"backbone": {"epochs": 1}}}))
    there = tmp_path / "there"
    monkeypatch.setattr(sys, "argv", ["prepare", "--config", str(tmp_path / "c.yaml"), "--upload", there.as_uri()])
    main()
    assert f"uploaded {tmp_path / 'here'} to {there.as_uri()}: " in capsys.readouterr().out
    for name in ("manifest.json", "train.beton", "validation.beton"):
        assert (there / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
