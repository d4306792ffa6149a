"""The sides of bench search: the predictor stage on logit tables and live, by the training loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.beton import TRAIN, VALIDATION, beton_path, load_manifest
from datasets.decoded import DecodedViews, Ordered
from datasets.loader import CenterCrop, MultiResolutionLoader, RandomResizedCrop
from jobs.benchmarks.search import TRIALS
from pipeline.config import Config
from pipeline.config_file import parse_config
from pipeline.models.cost import measure_costs
from pipeline.models.drnet import build_drnet
from pipeline.training.checkpoint import TrainingState
from pipeline.training.divergence import Watch
from pipeline.training.logit_table import LogitTable, TableKey
from pipeline.training.loop import Run, prepare, train_epoch
from pipeline.training.reporting import Progress
from pipeline.training.stage_data import StageData
from pipeline.training.stages import Forward
from pipeline.training.table_writer import fill_table

STAGE = "predictor"


def on_table(**given: Any) -> Iterator[float]:
    """Images a second of a trial, with its share of the table's cost; yields as often as it is asked."""
    run, scratch = _run(**given), Path(given["scratch"])
    key, views, size = TableKey.of(run.model, run.config, run.manifest, TRAIN), range(1), given["batch_size"]
    started = time.perf_counter()
    backbone_logits = Forward(run.model, key.precision).frozen_backbone
    fill_table(scratch, key, views, run.train, backbone_logits, device=run.device, tell=lambda _: None)
    table_seconds = (time.perf_counter() - started) / run.train.num_samples
    sides = (run.model.predictor_size,)
    decoded = DecodedViews(scratch, beton_path(run.config.data.folder, TRAIN), {}, views, sides)
    decoded.fill(run.train)
    ordered = Ordered(decoded, size, shuffle=True, seed=run.config.seed)
    data = StageData(ordered, run.validation, 0, 1, sides, LogitTable(scratch, key, views))
    run = replace(run, train=ordered, stage_data=data)
    for speed in _speeds(run, given["epochs"]):
        yield 1 / (1 / speed + table_seconds / TRIALS)


def live(**given: Any) -> Iterator[float]:
    """Images a second of the same predictor, with the backbone run in every step."""
    run = _run(**given)
    run = replace(run, stage_data=StageData(run.train, run.validation, 0, 1))
    yield from _speeds(run, given["epochs"])


def _run(model: Mapping[str, Any], batch_size: int, data: str, threads: int, **_: Any) -> Run:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    manifest = load_manifest(Path(data))
    config = _config(model, batch_size, data, manifest.dataset)
    network = build_drnet(config.model, len(manifest.classes), manifest.mean, manifest.std)
    network = network.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]
    costs = measure_costs(network)
    crops = {TRAIN: RandomResizedCrop((0.08, 1.0), (3 / 4, 4 / 3), True), VALIDATION: CenterCrop(0.875)}
    train, validation = (
        MultiResolutionLoader(
            beton_path(Path(data), split),
            network.sides,
            batch_size,
            crop=crop,
            shuffle=split == TRAIN,
            num_threads=threads,
        )
        for split, crop in crops.items()
    )
    return Run(
        config, network, costs, train, validation, torch.device("cpu"), _Silent(), manifest, Path(data) / "tables"
    )


def _config(model: Mapping[str, Any], batch_size: int, data: str, dataset: str) -> Config:
    stage = {"epochs": 1000, "optimizer": "adamw", "lr": 0.001, "alpha_gflops": 1.0}
    return parse_config(
        {
            "name": "bench",
            "data": {"dataset": dataset, "folder": data, "source": data},
            "model": dict(model),
            "training": {"batch_size": batch_size},
            "stages": {STAGE: stage},
        }
    )


def _speeds(run: Run, epochs: int) -> Iterator[float]:
    stage = run.config.stages.predictor
    assert stage is not None
    work, epoch = prepare(run, stage, 0, Watch(None), None), 0
    while True:
        speeds = []
        for _ in range(epochs):
            progress = Progress(STAGE, epoch, stage.epochs, epoch, 0, run.train.num_batches)
            speeds.append(train_epoch(run, work, progress)["train_images_per_second"])
            epoch += 1
        yield statistics.harmonic_mean(speeds)


class _Silent:
    """The loop's Reporter for nobody."""

    def step(self, progress: Progress, loss: Tensor) -> None:
        pass

    def epoch(self, progress: Progress, values: Mapping[str, float]) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def checkpoint(self, state: TrainingState, values: Mapping[str, float]) -> None:
        pass
