"""A fresh store, a finished run and a wait, for the tests of pipeline/tracking."""

from __future__ import annotations

import json
import random
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from datasets.beton import FORMAT, TRAIN, VALIDATION, Manifest, Split
from pipeline.config.load import parse_config
from pipeline.config.schema import Config
from pipeline.evaluation.gate import ANSWERS_FILE, Answers
from pipeline.models.drnet import DRNet, build_drnet
from pipeline.tracking.registry import register_model
from pipeline.tracking.tracker import close_run, open_run
from pipeline.training.checkpoint import save_model
from tests.small import tree_of, with_fields


def fresh_store(tmp_path: Path, factory: pytest.TempPathFactory) -> str:
    """Return the address of a new SQLite store; creating the tables takes seconds, so they are copied."""
    template = factory.getbasetemp() / "mlflow-template.db"
    if not template.exists():
        MlflowClient(f"sqlite:///{template}").search_experiments()
    shutil.copy(template, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def make_config(tmp_path: Path, **sections: dict) -> Config:
    """Return a small configuration with all three stages; `sections` override it."""
    routed = {"epochs": 1, "alpha_gflops": 0.01}
    tree = tree_of(
        tmp_path,
        name="small",
        model={"backbone_width": 0.25, "predictor": {"input_size": 32, "width": 0.125}},
        stages={"backbone": {"epochs": 2}, "predictor": routed, "joint": routed},
    )
    return parse_config(with_fields(tree, sections))


def make_manifest() -> Manifest:
    splits = {
        name: Split(
            file=f"{name}.beton", count=count, class_counts=[count], size_bytes=1, sha256=name[0] * 64, attributes={}
        )
        for name, count in ((TRAIN, 90), (VALIDATION, 10))
    }
    return Manifest(
        format=FORMAT,
        dataset="glyphs",
        classes=["a", "b"],
        settings={},
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        source_digest="d" * 32,
        skipped=[],
        versions={},
        splits=splits,
    )


def make_model(config: Config, num_classes: int = 5) -> DRNet:
    """Return a network with random weights, different batch norms, and a predictor that uses both resolutions."""
    torch.manual_seed(3)
    model = build_drnet(config.model, num_classes, (0.5, 0.4, 0.6), (0.25, 0.2, 0.3))
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for values in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                torch.nn.init.uniform_(values, 0.5, 1.5)
    model.eval()
    with torch.no_grad():
        model.predictor.fc.bias.sub_(model.predictor_logits(random_crops(model, 40)).median(dim=0).values)
    return model


def finish_run(config: Config, folder: Path, model: DRNet) -> tuple[Path, Path]:
    """Write what training leaves in a run's folder and in MLflow; return model.pt and report.json."""
    close_run(open_run(config, folder, make_manifest()), "FINISHED")
    classes = [f"class {index}" for index in range(model.static_logits(zeros(model), 0).shape[1])]
    save_model(folder / "model.pt", model, config, classes=classes)
    report = evaluated(folder / "report.json", np.arange(960) % 16 > 0)
    return folder / "model.pt", report


POLICIES = {
    "chosen": {"members": [1, 0], "thresholds": [0.0], "start_bias": 0.0},
    "front": [
        {"members": [1], "thresholds": [], "start_bias": None, "gflops": 0.01, "accuracy": 0.8},
        {"members": [1, 0], "thresholds": [0.5], "start_bias": None, "gflops": 0.02, "accuracy": 0.9},
        {"members": [0], "thresholds": [], "start_bias": None, "gflops": 0.03, "accuracy": 0.95},
    ],
}
"""As in report.json: the predictor decides; a request may ask for a static resolution or a cascade."""


def evaluated(report: Path, right_N: np.ndarray, mean_gflops: float = 0.0123) -> Path:
    """Write what an evaluation leaves when the routed network classifies the images of `right_N` correctly."""
    Answers("", np.arange(len(right_N)), right_N, mean_gflops).save(report.with_name(ANSWERS_FILE))
    top1 = float(right_N.mean())
    headline = {"top1": top1, "top1_low": top1 - 0.02, "top1_high": top1 + 0.02, "mean_gflops": mean_gflops}
    report.write_text(json.dumps({"headline": headline, "policies": POLICIES, "budget_curve": [{}]}))
    return report


def zeros(model: DRNet) -> dict[int, torch.Tensor]:
    return {side: torch.zeros(1, side, side, 3, dtype=torch.uint8) for side in model.sides}


def random_crops(model: DRNet, count: int) -> dict[int, torch.Tensor]:
    """Return images of different brightness and grain, uint8 (count, side, side, 3) at every side."""
    generator = torch.Generator().manual_seed(5)
    brightness = torch.rand(count, 1, 1, 1, generator=generator)
    return {
        side: (255 * brightness * torch.rand(count, side, side, 3, generator=generator)).to(torch.uint8)
        for side in model.sides
    }


def routed_logits(model: DRNet, crops: dict[int, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (N, K) at the chosen resolution and the choice (N,), by running every resolution."""
    with torch.inference_mode():
        choice_N = model.predictor_logits(crops).argmax(dim=1)
        logits_NRK = torch.stack([model.static_logits(crops, j) for j in range(len(model.resolutions))], dim=1)
    return logits_NRK[torch.arange(len(choice_N)), choice_N], choice_N


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"timed out after 120 s, waiting until {what}"
        time.sleep(0.05)


def free_port() -> int:
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Return unused ports below the range that the system assigns, which Ray clusters use."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1_000):
        with closing(socket.socket()) as each:
            if each.connect_ex(("127.0.0.1", port)):
                found.append(port)
        if len(found) == count:
            break
    return found


def registered_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the address of a new store with the model `drnet@champion`."""
    folder = tmp_path_factory.mktemp("registry")
    config = make_config(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", fresh_store(folder, tmp_path_factory))
        register_model(config, folder / "run", *finish_run(config, folder / "run", make_model(config)))
    return f"sqlite:///{folder / 'mlflow.db'}"
