"""A real Ray Train run of two workers: all stages, then rerun, changed, registered and evaluated again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from datasets.beton import load_manifest, verify_betons
from pipeline.cluster.connection import require_head
from pipeline.cluster.driver import evaluate_run, evaluation_of, kept_model, train_run
from pipeline.config.load import ConfigError
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import Config
from pipeline.evaluation.predictions import Predictions
from pipeline.models.cost import Latency, measure_costs
from pipeline.search.source import backbone_path
from pipeline.serving.package import classify_files
from pipeline.tracking.registry import open_model, register_model
from pipeline.training.checkpoint import load_model
from tests.chaos.matrix import Row, record
from tests.chaos.runs import config_of

pytestmark = pytest.mark.distributed

STATIC = ("static-48", "static-32")
KNOWN = Latency((3.0, 1.0), 0.125, 4, "float32", "another machine", 1, "2.13")


def only(**stages: dict[str, Any]) -> dict[str, Any]:
    """Return the section of a run that has no other stages."""
    return {"backbone": None, "predictor": None, "joint": None} | stages


def test_a_run_leaves_a_model_a_report_and_all_predictions(undisturbed: Config) -> None:
    folder = RunFolder.of(undisturbed)
    report = json.loads(folder.report_json.read_text())
    assert report["n"] == 50
    assert {row["id"] for row in report["rows"]} >= {"static-48", "static-32", "routed", "random", "oracle"}
    chosen = json.loads(folder.precision.read_text())
    assert report["environment"]["precision"] == f"{chosen['name']}, because {chosen['reason']}"
    assert chosen["name"] in ("float32", "bfloat16")
    assert load_model(folder.model).classes == tuple("BCDEFGHKRS")
    before, after, final = map(
        Predictions.load, (folder.predictions_before_joint, folder.predictions_after_joint, folder.predictions)
    )
    costs = measure_costs(load_model(folder.model).model)
    final_evaluation = evaluation_of(undisturbed, folder, costs)
    kept = kept_model(*(replace(final_evaluation, predictions=each) for each in (before, after)))
    assert report["environment"]["joint stage"] == str(kept)
    assert np.array_equal(final.logits_NRK, (after if kept.is_after else before).logits_NRK)
    same = torch.equal(
        *(load_model(file).model.backbone.network.fc.weight for file in (folder.model, folder.before_joint))
    )
    assert same != kept.is_after
    backbone, routed = (load_model(file).model.state_dict() for file in (folder.backbone, folder.before_joint))
    assert all(torch.equal(value, routed[name]) for name, value in backbone.items() if name.startswith("backbone."))
    assert backbone_path(undisturbed) == folder.backbone
    epochs = [json.loads(line) for line in (folder.path / "progress.jsonl").read_text().splitlines()]
    assert [event["stage"] for event in epochs if "values" in event] == ["backbone"] * 3 + ["predictor"] * 2 + [
        "joint"
    ] * 2


def test_only_the_head_with_this_token_is_accepted(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_head(ray_cluster)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(ConnectionError, match=f"RAY_ADDRESS is {ray_cluster}, whose head refuses this token"):
        require_head(ray_cluster)
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(ConnectionError, match="whose head needs a token"):
        require_head(ray_cluster)
    monkeypatch.undo()
    (node,) = ray.nodes()
    with pytest.raises(ConnectionError, match="something else listens there"):
        require_head(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")


def test_a_finished_run_does_nothing_and_a_changed_one_is_refused(undisturbed: Config) -> None:
    before = RunFolder.of(undisturbed).model.stat().st_mtime_ns
    assert train_run(undisturbed).already_finished
    assert RunFolder.of(undisturbed).model.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="seed: 0 -> 5"):
        train_run(undisturbed.model_copy(update={"seed": 5}))


@pytest.mark.chaos
def test_a_diverged_run_says_so_and_is_not_retried(folder: Path, ray_cluster: str) -> None:
    config = config_of(folder, "diverged", stages=only(backbone={"epochs": 1, "lr": 1e25}))
    with pytest.raises(ValueError, match="diverged in stage backbone, epoch 1 of 1, step 2 of 11") as caught:
        train_run(config)
    assert "before it: none" in str(caught.value), "one attempt: three retries would end the same way"
    assert not RunFolder.of(config).finished.exists()
    seen = str(caught.value).partition(" To change")[0]
    record(Row("loss not finite", f"`error: {seen}`", "the run ends at once; nothing that is not finite is saved"))


def test_the_registered_model_classifies_files(
    undisturbed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.of(undisturbed)
    model = register_model(undisturbed, run.path, run.model, run.report_json)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(undisturbed.tracking.uri))
    images = sorted((undisturbed.data.folder / "images" / "validation").rglob("*.jpg"))[:20]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(images[0].read_bytes()[:300])
    *rows, last = classify_files(open_model(model.uri), [*images, broken])
    assert [row["error"] for row in rows] == [None] * 20
    assert {row["resolution"] for row in rows} <= {48, 32}
    assert last["error"]


@pytest.fixture(scope="module")
def timed(undisturbed: Config, folder: Path) -> tuple[Config, dict[str, Any]]:
    """Train a predictor on another run's model, with data from an address; return configuration and report.

    The milliseconds exist before the run starts, as in a run that was interrupted on another machine.
    """
    start = {"epochs": 1, "alpha_milliseconds": 2.0, "init_from": str(RunFolder.of(undisturbed).model)}
    config = config_of(
        folder,
        "timed",
        cost="milliseconds",
        cost_batch_size=4,
        data={"folder": str(folder / "node"), "uri": (folder / "data").as_uri()},
        stages=only(predictor=start),
    )
    run = RunFolder.of(config)
    run.path.mkdir(parents=True)
    KNOWN.save(run.latency)
    return config, train_run(config).report


def test_a_stage_starts_from_another_runs_model_and_the_data_from_its_address(
    timed: tuple[Config, dict[str, Any]], undisturbed: Config, folder: Path
) -> None:
    config, _ = timed
    assert verify_betons(folder / "node", full=True) == load_manifest(folder / "data")
    model, other = (load_model(RunFolder.of(each).model).model.backbone for each in (config, undisturbed))
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))
    start = {"epochs": 1, "alpha_gflops": 0.0012, "init_from": str(RunFolder.of(undisturbed).model)}
    changed: dict[str, Any] = {"model": {"resolutions": [64, 48, 32]}, "loader": {"validation_crop": 0.5}}
    wrong = config_of(folder, "wrong", stages=only(predictor=start), **changed)
    with pytest.raises(
        ConfigError, match=r"(?s)model\.resolutions.*center crop of .* Set loader\.validation_crop="
    ) as raised:
        train_run(wrong)
    assert "this run uses 0.5" in str(raised.value)


def test_a_run_trains_and_reports_by_the_milliseconds_in_its_folder(
    timed: tuple[Config, dict[str, Any]], folder: Path
) -> None:
    config, report = timed
    run = RunFolder.of(config)
    assert report["costs"]["latency"]["device"] == KNOWN.device
    (trained,) = [point for point in report["budget_curve"] if point["budget_bias"] == 0]  # the predictor's own choice
    share, _ = trained["shares"]
    assert trained["mean_cost"] == pytest.approx(3 * share + (1 - share) + 0.125)
    lines = [json.loads(line) for line in (run.path / "progress.jsonl").read_text().splitlines()]
    (values,) = [line["values"] for line in lines if line.get("stage") == "predictor" and "values" in line]
    assert 1 <= values["train_milliseconds_backbone"] <= 3
    assert values["milliseconds_routed"] == pytest.approx(trained["mean_cost"])

    (folder / "moved").symlink_to(folder / "node")
    moved = config.model_copy(update={"data": config.data.model_copy(update={"folder": folder / "moved"})})
    run.latency.unlink()
    again = evaluate_run(moved, "milliseconds").report
    accuracies = ({row["id"]: row["top1"] for row in each["rows"] if row["id"] in STATIC} for each in (again, report))
    assert next(accuracies) == next(accuracies), "the same from where the data are now"
    measured = again["costs"]["latency"]
    assert (measured["batch_size"], measured["device"]) == (4, "the CPU")
    assert Latency.load(run.latency).backbone_milliseconds == tuple(measured["backbone_milliseconds"])


def test_a_target_in_milliseconds_out_of_reach_ends_the_run_at_once(folder: Path, ray_cluster: str) -> None:
    stages = only(predictor={"epochs": 1, "alpha_milliseconds": 1e9})
    config = config_of(folder, "unreachable", cost="milliseconds", cost_batch_size=2, stages=stages)
    with pytest.raises(ConfigError, match=r"(?s)alpha_milliseconds is 1e\+09.*reaches .* ms \(median of 15 rounds"):
        train_run(config)
    assert Latency.load(RunFolder.of(config).latency).batch_size == 2


def test_every_problem_is_reported_before_ray_starts(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        "wrong",
        stages=only(joint={"epochs": 1, "alpha_gflops": 9.0, "init_from": str(tmp_path / "none.pt")}),
    )
    with pytest.raises(ConfigError) as caught:
        train_run(config)
    problems = "\n".join(caught.value.problems)
    for expected in ("jobs.prepare", "alpha_gflops", "none.pt"):
        assert expected in problems
    assert not RunFolder.of(config).path.exists()
