"""A real Ray Train run of two workers: all stages, a killed worker, finished, changed, registered, evaluated again."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import psutil
import pytest
import torch

from datasets.glyphs import GlyphSettings
from datasets.prepare import prepare
from pipeline.cluster.launch import evaluate_run, train_run
from pipeline.config import Config
from pipeline.config_file import ConfigError, parse_config
from pipeline.run_folder import RunFolder
from pipeline.tracking.inference import classify_files, open_model
from pipeline.tracking.registry import register_model
from pipeline.training.checkpoint import load_model

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data: 203 generated letters to train on, so that the two ranks' parts of a batch differ."""
    folder = tmp_path_factory.mktemp("training")
    glyphs = GlyphSettings(num_train=203, num_validation=50, image_size=64)
    prepare("glyphs", folder / "data", glyphs=glyphs, num_processes=1, show_progress=False)
    return folder


def config_of(folder: Path, name: str, **changed: object) -> Config:
    routed = {"epochs": 1, "alpha_gflops": 0.0012, "lr": 0.01}
    return parse_config(
        {
            "name": name,
            "data": {"dataset": "glyphs", "folder": str(folder / "data")},
            "model": {
                "backbone": "small_resnet",
                "backbone_width": 0.5,
                "resolutions": [48, 32],
                "predictor": {"input_size": 24, "width": 0.25},
            },
            "training": {"batch_size": 20},
            "stages": {"backbone": {"epochs": 6, "lr": 0.02}, "predictor": routed, "joint": routed},
            "cluster": {"num_workers": 2, "cpus_per_worker": 1, "storage": str(folder / "runs")},
            "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
            **changed,
        }
    )


@pytest.fixture(scope="module")
def undisturbed(folder: Path, ray_cluster: str) -> Config:
    config = config_of(folder, "undisturbed")
    train_run(config)
    return config


def test_a_run_leaves_a_model_a_report_and_all_predictions(undisturbed: Config) -> None:
    folder = RunFolder.of(undisturbed)
    report = json.loads(folder.report_json.read_text())
    assert report["n"] == 50
    assert {row["id"] for row in report["rows"]} >= {"static-48", "static-32", "routed", "random", "oracle"}
    assert load_model(folder.model).classes == tuple("BCDEFGHKRS")
    epochs = [json.loads(line) for line in (folder.path / "progress.jsonl").read_text().splitlines()]
    assert [event["stage"] for event in epochs if "values" in event] == ["backbone"] * 6 + ["predictor", "joint"]


def test_a_finished_run_does_nothing_and_a_changed_one_is_refused(undisturbed: Config, folder: Path) -> None:
    before = RunFolder.of(undisturbed).model.stat().st_mtime_ns
    assert train_run(undisturbed).already_finished
    assert RunFolder.of(undisturbed).model.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="seed: 0 -> 5"):
        train_run(config_of(folder, "undisturbed", seed=5))


def test_a_killed_worker_costs_no_bit_of_the_result(undisturbed: Config, folder: Path) -> None:
    config = config_of(folder, "disturbed")
    path, killed = RunFolder.of(config).path, threading.Event()
    over = threading.Event()

    def kill_after_the_first_checkpoint() -> None:
        while not over.wait(0.02):
            if (path / "checkpoint_manager_snapshot.json").exists():
                workers = [process for process in psutil.process_iter() if "RayTrainWorker" in process.name()]
                if workers:
                    os.kill(workers[0].pid, signal.SIGKILL)
                    killed.set()
                    return

    killer = threading.Thread(target=kill_after_the_first_checkpoint)
    killer.start()
    try:
        train_run(config)
    finally:
        over.set()
        killer.join()
    assert killed.is_set(), "the run was over before a worker could be killed"
    lines = [json.loads(line) for line in (path / "progress.jsonl").read_text().splitlines()]
    assert sum("message" in line for line in lines) == 1, "evaluated once, at the end"
    model, other = (load_model(RunFolder.of(each).model).model for each in (config, undisturbed))
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


def test_evaluating_again_gives_the_same_report(undisturbed: Config) -> None:
    before = json.loads(RunFolder.of(undisturbed).report_json.read_text())
    assert evaluate_run(undisturbed).report["rows"] == before["rows"]


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


def test_a_stage_starts_from_another_runs_model(undisturbed: Config, folder: Path) -> None:
    start = {"epochs": 1, "alpha_gflops": 0.0012, "lr": 1e-9, "init_from": str(RunFolder.of(undisturbed).model)}
    config = config_of(folder, "started", stages={"predictor": start})
    train_run(config)
    model, other = (load_model(RunFolder.of(each).model).model.backbone for each in (config, undisturbed))
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))
    wrong = config_of(folder, "wrong", stages={"predictor": start}, model={"resolutions": [64, 48, 32]})
    with pytest.raises(ConfigError, match=r"model\.resolutions"):
        train_run(wrong)


def test_every_problem_is_told_before_ray_is_asked(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        "wrong",
        stages={"joint": {"epochs": 1, "alpha_gflops": 9.0, "init_from": str(tmp_path / "none.pt")}},
    )
    with pytest.raises(ConfigError) as caught:
        train_run(config)
    problems = "\n".join(caught.value.problems)
    for expected in ("jobs.prepare", "alpha_gflops", "none.pt"):
        assert expected in problems
    assert not RunFolder.of(config).path.exists()
