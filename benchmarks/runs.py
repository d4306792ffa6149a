"""The runs of benches: training without Ray and MLflow, small runs on Ray clusters, and the images of finished runs."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import EVENTS
from datasets.beton import load_manifest
from datasets.prepare.prepare import prepare
from datasets.sources.glyphs import GlyphSettings
from pipeline.config.load import parse_config
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import Config
from pipeline.evaluation.predictions import Predictions
from pipeline.models.cost import Costs, measure_costs
from pipeline.models.drnet import DRNet
from pipeline.policies.route import Images
from pipeline.training import distributed
from pipeline.training.assembly import build_model, equip_for_training, open_loaders
from pipeline.training.checkpoint import TrainingState
from pipeline.training.run import Progress, Run, precision_of_run, with_precision

CPU = torch.device("cpu")


@contextmanager
def opened_run(config: Config, folder: Path, device: torch.device = CPU) -> Iterator[Run]:
    """Open what this rank trains with, without Ray and MLflow."""
    config = with_precision(config, precision_of_run(config, device, RunFolder(folder).precision))
    manifest = load_manifest(config.data.folder)
    threads = config.loader.num_threads or torch.get_num_threads()
    with open_loaders(config, distributed.rank(), distributed.world_size(), threads) as (training, validation):
        model = build_model(config, manifest, device)
        costs, reporter = measure_costs(model), FileReporter(folder)
        equip_for_training(model, config)
        yield Run(config, model, costs, training, validation, device, reporter, manifest, folder / "tables")


class FileReporter:
    """The loop's Reporter. On rank 0 it writes epochs to the progress file, and the last state."""

    def __init__(self, folder: Path):
        self.folder = folder if distributed.rank() == 0 else None

    def step(self, progress: Progress, loss: Tensor) -> None:
        pass

    def epoch(self, progress: Progress, values: Mapping[str, float]) -> None:
        if self.folder:
            with (self.folder / EVENTS).open("a") as file:
                file.write(json.dumps({**vars(progress), "values": dict(values)}) + "\n")

    def message(self, text: str) -> None:
        pass

    def keep(self, name: str, model: DRNet) -> None:
        pass

    def checkpoint(self, state: TrainingState, values: Mapping[str, float]) -> None:
        if self.folder:
            state.save(self.folder / "state.pt")


def images_of(predictions: Predictions, costs: Costs) -> Images:
    """Return the images of predictions, as policies need them."""
    logits = predictions.logits_NRK, predictions.labels_N, predictions.predictor_logits_NR
    return Images.of(*logits, costs, extents_N=predictions.extents_N)


def prepare_letters(folder: Path, num_train: int) -> Path:
    """Prepare generated letters in `folder`."""
    glyphs = GlyphSettings(num_train=num_train, num_validation=64, image_size=128)
    prepare("glyphs", folder, glyphs=glyphs, num_processes=1, show_progress=False)
    return folder


def small_config(data: Path, storage: Path, name: str, epochs: int, **training: Any) -> Config:
    """Return a configuration with two workers of one CPU and only the backbone stage.

    A step takes long compared with its communication.
    """
    return parse_config(
        {
            "name": name,
            "data": {"dataset": "glyphs", "folder": str(data)},
            "model": {
                "backbone": "small_resnet",
                "resolutions": [96, 48],
                "predictor": {"input_size": 32, "width": 0.25},
            },
            "training": {"batch_size": 64, "evaluate_epochs": epochs, **training},
            "stages": {"backbone": {"epochs": epochs, "lr": 0.02}},
            "cluster": {"num_workers": 2, "cpus_per_worker": 1, "use_gpu": False, "storage": str(storage)},
            "tracking": {"uri": f"sqlite:///{storage / 'mlflow.db'}", "system_metrics": False},
        }
    )


def use_token() -> None:
    """Make the clusters of this process require a secret token."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
