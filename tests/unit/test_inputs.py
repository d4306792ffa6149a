"""pipeline/config/run_folder.py: data and files of a run may move, and are compared by content."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from datasets.beton import load_manifest
from datasets.prepare.prepare import prepare
from datasets.sources.glyphs import GlyphSettings
from pipeline.cluster.driver import evaluate_run, train_run
from pipeline.cluster.preflight import check_config
from pipeline.config.load import ConfigError, drift, parse_config, stored_config
from pipeline.config.run_folder import RunFolder, keep_inputs, refuse_other_inputs, run_inputs
from pipeline.config.schema import Config
from pipeline.models.drnet import build_drnet
from pipeline.training.checkpoint import save_model
from tests.small import tree_of, with_fields


def prepare_glyphs(folder: Path, seed: int) -> None:
    prepare("glyphs", folder, glyphs=GlyphSettings(20, 10, 48, seed=seed), num_processes=1)


def config_of(folder: Path, **changed: Any) -> Config:
    tree = tree_of(
        folder,
        model={"backbone_width": 0.25, "resolutions": [32], "predictor": {"input_size": 24}},
        training={"batch_size": 10},
        stages={"backbone": {"epochs": 1}},
        cluster={"storage": str(folder / "runs"), "cpus_per_worker": 1},
    )
    return parse_config(with_fields(tree, changed))


def write_model(path: Path, config: Config, scale: float) -> None:
    model = build_drnet(config.model, 10, (0.5,) * 3, (0.5,) * 3)
    for parameter in model.parameters():
        parameter.data.fill_(scale)
    save_model(path, model, config, classes=[str(number) for number in range(10)])


def test_weights_that_do_not_exist_are_one_problem_of_a_run_that_starts_from_a_model(tmp_path: Path) -> None:
    prepare_glyphs(tmp_path / "data", seed=0)
    write_model(tmp_path / "start.pt", config_of(tmp_path), scale=1.0)
    stages = {"backbone": {"epochs": 1, "init_from": str(tmp_path / "start.pt")}}
    with pytest.raises(ConfigError) as error:
        check_config(config_of(tmp_path, stages=stages, model={"weights": "none.pth"}))
    [problem] = error.value.problems
    assert problem.startswith("model: weights 'none.pth' is not a file")


PLACES = {
    "data": {
        "folder": "/elsewhere/data",
        "source": "/elsewhere/images",
        "uri": "s3://bucket/data",
        "validation_source": "/v",
    },
    "model": {"weights": "/elsewhere/net.pth"},
    "stages": {"backbone": {"epochs": 1, "init_from": "/elsewhere/model.pt"}},
    "cluster": {"storage": "/elsewhere/runs"},
}


def test_paths_may_change_and_settings_may_not(tmp_path: Path) -> None:
    before = config_of(tmp_path)
    assert drift(before, config_of(tmp_path, **PLACES)) == []
    changed = config_of(
        tmp_path, data={"images_per_class": 5, "glyphs": {"seed": 3}}, stages={"backbone": {"epochs": 2}}
    )
    assert [line.partition(":")[0] for line in drift(before, changed)] == [
        "data.glyphs.seed",
        "data.images_per_class",
        "stages.backbone.epochs",
    ]


def test_a_run_with_stored_paths_that_are_now_refused_can_resume(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    tree = config.model_dump(mode="json")
    tree["cluster"] |= {"storage": "s3://bucket/runs", "num_workers": 3}
    tree["registry"]["name"] = "a/b"
    tree["data"] |= {"folder": "file:///data", "source": "~nobody-has-this-name/x"}
    tree["search"] = {"a field that is gone": 1}
    tree["model"]["weights"] = "s3://bucket/weights.pt"
    tree["stages"]["backbone"]["init_from"] = "~nobody-has-this-name/model.pt"
    with pytest.raises(ConfigError, match=r"has [6-9] problems"):
        parse_config(tree)

    assert drift(stored_config(tree, config, "the run"), config) == []
    tree["seed"] = "many"
    with pytest.raises(ConfigError, match=r"the run has 1 problem:\n  - seed is 'many'\. Give an integer"):
        stored_config(tree, config, "the run")


def test_a_moved_file_is_the_same_input_and_a_changed_one_is_not(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    for name, scale in (("a.pt", 0.5), ("b.pt", 0.25)):
        write_model(tmp_path / name, config, scale)
    shutil.copy(tmp_path / "a.pt", tmp_path / "moved.pt")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()

    def inputs(name: str, digest: str = "0" * 32) -> dict[str, str]:
        start = {"backbone": {"epochs": 1, "init_from": str(tmp_path / name)}}
        return run_inputs(config_of(tmp_path, stages=start, model={"weights": str(tmp_path / name)}), digest)

    refuse_other_inputs(folder, inputs("a.pt"))  # it has not started
    keep_inputs(folder, inputs("a.pt"))
    keep_inputs(folder, inputs("b.pt"))  # the first start counts
    refuse_other_inputs(folder, inputs("moved.pt"))
    with pytest.raises(ValueError, match=r"(?s)model\.weights: .*stages\.backbone\.init_from: .*name=\.\.\.") as raised:
        refuse_other_inputs(folder, inputs("b.pt"))
    assert str(raised.value).count("->") == 2
    with pytest.raises(ValueError, match=r"init_from: '\w+' -> None"):
        refuse_other_inputs(folder, run_inputs(config, "0" * 32))
    with pytest.raises(ValueError, match="prepared data: '0000"):
        refuse_other_inputs(folder, inputs("a.pt", "f" * 32))


def test_the_name_of_published_weights_is_compared(tmp_path: Path) -> None:
    inputs = [
        run_inputs(config_of(tmp_path, model={"weights": name}), "0") for name in ("IMAGENET1K_V1", "IMAGENET1K_V2")
    ]
    assert inputs[0]["model.weights"] == "IMAGENET1K_V1"
    assert inputs[0] != inputs[1]


@pytest.mark.parametrize("job", [train_run, evaluate_run])
def test_other_data_is_refused_before_ray_starts_and_moved_data_is_not(tmp_path: Path, job: Any) -> None:
    prepare_glyphs(tmp_path / "data", seed=0)
    prepare_glyphs(tmp_path / "other", seed=1)
    config = config_of(tmp_path)
    folder = RunFolder.of(config)
    folder.path.mkdir(parents=True)
    write_model(folder.model, config, 0.5)
    keep_inputs(folder, run_inputs(config, load_manifest(tmp_path / "data").digest))

    (tmp_path / "data").rename(tmp_path / "moved")
    moved = config_of(tmp_path, data={"folder": str(tmp_path / "moved")})
    refuse_other_inputs(folder, run_inputs(moved, check_config(moved)[0].digest))
    with pytest.raises(ValueError, match=r"the run run started from other data or files:\n  - prepared data: "):
        job(config_of(tmp_path, data={"folder": str(tmp_path / "other")}))
