"""What one Ray Train worker does: build model and loaders, go on from the last checkpoint, train, predict, report."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint
from torch import Tensor

from datasets.beton import TRAIN, VALIDATION, Manifest, beton_path, load_manifest
from datasets.loader import CenterCrop, MultiResolutionLoader, RandomResizedCrop
from pipeline.cluster.progress import StepClock, append_event
from pipeline.config import Config
from pipeline.evaluation.predictions import collect_predictions
from pipeline.models.cost import measure_costs
from pipeline.models.drnet import DRNet, build_drnet
from pipeline.run_folder import RunFolder
from pipeline.tracking.tracker import RunHandle, RunLogger, system_metrics
from pipeline.training.checkpoint import TrainingState, load_model, save_model
from pipeline.training.loop import Progress, Run, train

STATE_FILE = "state.pt"


@dataclass(frozen=True)
class WorkerSettings:
    """What the driver hands to every worker."""

    config: Config
    run_folder: Path
    tracking: RunHandle | None
    evaluate_model: Path | None = None
    """evaluate this model.pt and train nothing"""


def run_worker(settings: WorkerSettings) -> None:
    """Ray Train's train function."""
    config, context = settings.config, ray.train.get_context()
    device = ray.train.torch.get_device()
    manifest = load_manifest(config.data.folder)
    with ExitStack() as stack:
        reporter = WorkerReporter(settings, context.get_world_rank(), manifest)
        stack.callback(reporter.close)
        if settings.tracking and config.tracking.system_metrics and context.get_local_rank() == 0:
            stack.enter_context(system_metrics(settings.tracking, f"node-{context.get_node_rank()}"))
        train_loader, validation_loader = stack.enter_context(loaders(config, context))
        if settings.evaluate_model:
            model = load_model(settings.evaluate_model).model.to(device)
        else:
            torch.manual_seed(config.seed)  # the same initial weights on every rank
            model = build_drnet(config.model, len(manifest.classes), manifest.mean, manifest.std)
            model = model.to(device)
            if config.training.channels_last:
                model = model.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]
            if config.training.compile:
                model.backbone.compile()
            run = Run(config, model, measure_costs(model), train_loader, validation_loader, device, reporter)
            train(run, _last_state())
        reporter.predictions(model, validation_loader)


@contextmanager
def loaders(config: Config, context) -> Iterator[tuple[MultiResolutionLoader, MultiResolutionLoader]]:
    """This rank's training and validation loaders."""
    threads = config.loader.num_threads or _worker_cpus()
    shared = {
        "sides": {*config.model.resolutions, config.model.predictor.input_size},
        "batch_size": config.training.batch_size,
        "seed": config.seed,
        "rank": context.get_world_rank(),
        "world_size": context.get_world_size(),
        "num_threads": threads,
        "batches_ahead": config.loader.batches_ahead,
    }
    settings = config.loader
    augmented = RandomResizedCrop(settings.crop_scale, settings.crop_ratio, settings.flip)
    folder = config.data.folder
    train_loader = MultiResolutionLoader(beton_path(folder, TRAIN), crop=augmented, shuffle=True, **shared)
    validation_loader = MultiResolutionLoader(
        beton_path(folder, VALIDATION), crop=CenterCrop(settings.validation_crop), shuffle=False, **shared
    )
    try:
        yield train_loader, validation_loader
    finally:
        train_loader.close()
        validation_loader.close()


class WorkerReporter:
    """The loop's Reporter: progress file, MLflow, Ray Train checkpoints."""

    def __init__(self, settings: WorkerSettings, rank: int, manifest: Manifest):
        self.settings, self.rank, self.manifest = settings, rank, manifest
        self.logger = RunLogger(settings.tracking) if settings.tracking and rank == 0 else None
        self.clock = StepClock(settings.config.training.batch_size)

    def step(self, progress: Progress, loss: Tensor) -> None:
        done = progress.epoch * progress.steps + progress.step
        if self.rank == 0 and self.clock.due(progress.stage, done):
            speed = self.clock.speed(done, progress.epochs * progress.steps)
            self._show({**vars(progress), "loss": loss.item(), **speed})

    def epoch(self, progress: Progress, values: Mapping[str, float]) -> None:
        if self.rank == 0:
            self._show({**vars(progress), "values": dict(values)})
        if self.logger:
            self.logger.metrics(progress.stage, values, progress.epoch + 1)

    def checkpoint(self, state: TrainingState, values: Mapping[str, float]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if self.rank == 0:
                state.save(Path(folder) / STATE_FILE)
            self._report(folder if self.rank == 0 else None, values)

    def predictions(self, model: DRNet, validation_loader: MultiResolutionLoader) -> None:
        """The last report: the model, and each rank's predictions for its part of the validation images."""
        if self.rank == 0:
            self._show({"message": f"evaluating {validation_loader.num_samples} validation images"})
        with tempfile.TemporaryDirectory() as folder:
            collect_predictions(model, validation_loader.epoch(0)).save(Path(folder) / f"predictions-{self.rank}.npz")
            if self.rank == 0:
                config = self.settings.config
                about = {"classes": self.manifest.classes, "mean": self.manifest.mean, "std": self.manifest.std}
                save_model(RunFolder(Path(folder)).model, model, config, **about)
                # A driver that dies after this report comes back to a checkpoint that has nothing left to train.
                TrainingState.finished(model, config).save(Path(folder) / STATE_FILE)
            self._report(folder, {})

    def close(self) -> None:
        if self.logger:
            self.logger.close()

    def _report(self, folder: str | None, values: Mapping[str, float]) -> None:
        checkpoint = Checkpoint.from_directory(folder) if folder else None
        ray.train.report(dict(values), checkpoint=checkpoint)

    def _show(self, event: Mapping) -> None:
        append_event(self.settings.run_folder, event)


def _last_state() -> TrainingState | None:
    """The state in the run's latest checkpoint, if it has one."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return TrainingState.load(Path(folder) / STATE_FILE)


def _worker_cpus() -> int:
    """CPUs that Ray assigned to this worker, at least one."""
    assigned = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    return max(1, min(int(assigned), os.cpu_count() or 1))
