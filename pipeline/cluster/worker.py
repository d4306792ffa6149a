"""The work of one Ray Train worker: build model and loaders, resume, train, predict, report."""

from __future__ import annotations

import os
import platform
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from torch import Tensor

from datasets.beton import TRAIN, Manifest, load_manifest
from datasets.loading.loader import MultiResolutionLoader
from datasets.loading.order import count_batches
from datasets.staging import download_dataset
from pipeline.cluster.checkpoints import read_state_on_all_ranks
from pipeline.cluster.progress import Gauges, Labels, StepClock, append_event, event_writer, labeled_logs
from pipeline.cluster.signals import StoppedError, is_stop_requested
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import Config, DataConfig
from pipeline.evaluation.predictions import collect_predictions
from pipeline.models.drnet import DRNet, place_model
from pipeline.tracking.tracker import RunHandle, RunLogger, system_metrics
from pipeline.training import distributed
from pipeline.training.assembly import build_model, equip_for_training, open_loaders, validation_extents
from pipeline.training.checkpoint import STATE_FILE, TrainingState, load_model, save_model
from pipeline.training.loop import train
from pipeline.training.run import (
    BEFORE_JOINT,
    EVALUATE,
    Goodput,
    Progress,
    Run,
    costs_of_run,
    precision_of_run,
    refuse_unreachable,
    with_precision,
)

PREDICTIONS = "predictions"


@dataclass(frozen=True)
class WorkerSettings:
    """The driver's instructions to every worker."""

    config: Config
    run_folder: Path
    data_digest: str
    """The digest of the driver's data. A worker refuses other data."""
    tracking: RunHandle | None
    evaluate_model: Path | None = None
    """A model.pt to evaluate instead of training."""


def run_worker(settings: WorkerSettings) -> None:
    """Do all work of one worker of a run. See `run_group` for the errors that end the run."""
    goodput = Goodput()
    context, folder = ray.train.get_context(), RunFolder(settings.run_folder)
    device = ray.train.torch.get_device()
    precision = precision_of_run(settings.config, device, folder.precision)
    settings = replace(settings, config=with_precision(settings.config, precision))
    config = settings.config
    # Only rank 0's node writes this file, because two machines must not append to one file over a network.
    show = event_writer(settings.run_folder if context.get_node_rank() == 0 else None)
    manifest = data_of_node(config.data, settings.data_digest, show)
    with ExitStack() as stack:
        labels = stack.enter_context(labeled_logs(config.name, context.get_world_rank()))
        reporter = WorkerReporter(settings, context.get_world_rank(), manifest, goodput, labels)
        stack.callback(reporter.close)
        if settings.tracking and config.tracking.system_metrics and context.get_local_rank() == 0:
            stack.enter_context(system_metrics(settings.tracking, f"node-{context.get_node_rank()}"))
        train_loader, validation_loader = stack.enter_context(
            open_loaders(
                config,
                context.get_world_rank(),
                context.get_world_size(),
                config.loader.num_threads or _worker_cpus(),
            )
        )
        if settings.evaluate_model:
            loaded = load_model(settings.evaluate_model).model
            model = place_model(loaded, device, channels_last=config.training.channels_last)
            models = {PREDICTIONS: model}
            if config.cost == "milliseconds":
                costs_of_run(model, config, folder.latency, resumed=False)
        else:
            model, state = build_model(config, manifest, device), _last_state()
            # Measure before the network gets what only training needs, because rank 0 measures alone.
            costs = costs_of_run(model, config, folder.latency, resumed=state is not None)
            refuse_unreachable(config, costs)
            equip_for_training(model, config)
            run = Run(
                config,
                model,
                costs,
                train_loader,
                validation_loader,
                device,
                reporter,
                manifest,
                folder.tables,
                goodput,
            )
            start = f"resuming from {state.name}" if state else "starting"
            num_workers = context.get_world_size()
            reporter.message(f"{start} with {num_workers} worker{'s' if num_workers > 1 else ''}")
            reporter.message(f"training.precision: {precision}")
            train(run, state)
            models = {PREDICTIONS: model}
            if config.stages.joint and folder.before_joint.exists():
                before = load_model(folder.before_joint).model
                models[BEFORE_JOINT] = place_model(before, device, channels_last=config.training.channels_last)
        with goodput.inside(EVALUATE):
            reporter.predictions(models, validation_loader)
        if not settings.evaluate_model:
            reporter.goodput(goodput)


def data_of_node(data: DataConfig, digest: str, show: Callable[[str], None]) -> Manifest:
    """Return the manifest of this node's data.folder. If the data has an address, download it first.

    Args:
        digest: digest of the driver's data.
        show: called with lines of text about the download.

    Raises:
        ValueError: the data cannot be downloaded, or differs from the driver's.
        OSError: the address cannot be read, or the disk is full.
    """
    manifest = download_dataset(data.uri, data.folder, show=show) if data.uri else load_manifest(data.folder)
    if manifest.digest != digest:
        raise ValueError(
            f"{data.folder} on {platform.node()} has other data (digest {manifest.digest}) than the driver's "
            f"(digest {digest}). Copy the same data to every node; if the data at data.uri has just changed, rerun "
            "the command."
        )
    return manifest


class WorkerReporter:
    """The training loop's Reporter: report to the progress file, MLflow, gauges and Ray Train."""

    def __init__(self, settings: WorkerSettings, rank: int, manifest: Manifest, goodput: Goodput, labels: Labels):
        self.settings, self.rank, self.manifest, self.labels = settings, rank, manifest, labels
        self.gauges = Gauges(settings.config.name, rank, goodput)
        self.logger = RunLogger(settings.tracking) if settings.tracking and rank == 0 else None
        num_images = manifest.splits[TRAIN].count
        self.clock = StepClock(num_images / count_batches(num_images, settings.config.training.batch_size))
        self._written = threading.Event()
        self._written.set()

    def step(self, progress: Progress, loss: Tensor) -> None:
        """Show a step every few seconds: on every rank in the gauges, on rank 0 also in the progress file."""
        done = progress.epoch * progress.steps + progress.step
        self.labels.stage = progress.stage
        if not self.clock.due(progress.stage, done):
            return
        self.gauges.waiting(progress.stage)
        if self.rank == 0:
            speed, loss_value = self.clock.speed(done, progress.epochs * progress.steps), loss.item()
            self._show({**vars(progress), "loss": loss_value, **speed})
            self.gauges.set("drnet_images_per_second", speed["images_per_second"], progress.stage)
            self.gauges.set("drnet_loss", loss_value, progress.stage)

    def epoch(self, progress: Progress, values: Mapping[str, float]) -> None:
        """Report an epoch's values to the progress file, the gauges and MLflow."""
        if self.rank == 0:
            self._show({**vars(progress), "values": dict(values)})
            self.gauges.epoch(progress.stage, progress.epochs_done, values)
        if self.logger:
            self.logger.metrics(progress.stage, values, progress.epoch + 1)

    def message(self, text: str) -> None:
        """Write a message to the progress file, on rank 0."""
        if self.rank == 0:
            self._show({"message": text})

    def checkpoint(self, state: TrainingState, values: Mapping[str, float]) -> None:
        """Report the state, then stop if a stop was requested.

        Raises:
            StoppedError: on every rank.
        """
        self._report(state, values)
        requested = self.rank == 0 and is_stop_requested(RunFolder(self.settings.run_folder))
        if distributed.sum_over_ranks(torch.tensor(float(requested), device=ray.train.torch.get_device())) > 0:
            raise StoppedError(f"stopped after {state.name}; the same command resumes from there")

    def keep(self, name: str, model: DRNet) -> None:
        """Save the model as NAME.pt in the run's folder, on rank 0."""
        if self.rank == 0:
            file = self.settings.run_folder / f"{name}.pt"
            save_model(file, model, self.settings.config, classes=self.manifest.classes)

    def _report(self, state: TrainingState, values: Mapping[str, float]) -> None:
        """Copy the state now, and let Ray Train's upload thread write the copy while training continues.

        The thread writes the file to its final place, so Ray does not copy it. An error in the thread fails the worker.
        At most one copy waits to be written: the next checkpoint waits for it. Ray's controller accepts a report at its
        next poll, so checkpoints that are closer together than its polls (see `run_group`) delay training.
        """
        if self.rank != 0:  # every rank reports, so that Ray counts the same on all of them
            ray.train.report(dict(values), checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return
        self._written.wait()
        self._written.clear()
        kept, run_folder, written = state.copy(), self.settings.run_folder, self._written

        def write(_: Checkpoint, name: str) -> Checkpoint:
            try:
                folder = run_folder / name
                folder.mkdir(exist_ok=True)
                kept.save(folder / STATE_FILE)
                return Checkpoint.from_directory(folder)
            finally:
                written.set()

        ray.train.report(
            dict(values),
            # Ray passes this folder to `write` and deletes it afterwards, so it must be an empty one.
            checkpoint=Checkpoint.from_directory(tempfile.mkdtemp()),
            checkpoint_dir_name=state.name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=write,
        )

    def predictions(self, models: Mapping[str, DRNet], validation_loader: MultiResolutionLoader) -> None:
        """Report the model, and each rank's predictions for its part of the validation images.

        Args:
            models: networks by name; the run's own is PREDICTIONS. The predictions of each are written to
                NAME-RANK.npz.
        """
        model = models[PREDICTIONS]
        self.message(f"evaluating {validation_loader.num_samples} validation images")
        config = self.settings.config
        extents_N = validation_extents(config)
        with tempfile.TemporaryDirectory() as folder:
            for name, each in models.items():
                found = collect_predictions(each, validation_loader.epoch(0), placebo=True)
                found = replace(found, extents_N=extents_N[found.indices_N])
                found.save(Path(folder) / f"{name}-{self.rank}.npz")
            if self.rank == 0:
                save_model(RunFolder(Path(folder)).model, model, config, classes=self.manifest.classes)
                # If the driver dies after this report, the resumed run finds nothing left to train.
                TrainingState.finished(model, config, self.manifest.digest).save(Path(folder) / STATE_FILE)
            ray.train.report({}, checkpoint=Checkpoint.from_directory(folder))

    def goodput(self, goodput: Goodput) -> None:
        """Report how this attempt spent its time."""
        if self.rank == 0:
            self._show({"goodput": dict(goodput.seconds)})
        if self.logger:
            epochs = sum(stage.epochs for _, stage in self.settings.config.stages.present())
            self.logger.metrics(None, goodput.metrics(), epochs)

    def close(self) -> None:
        """Stop logging to MLflow."""
        if self.logger:
            self.logger.close()

    def _show(self, event: Mapping) -> None:
        append_event(self.settings.run_folder, event)


def _last_state() -> TrainingState | None:
    """Return the state in the run's latest checkpoint, or None. Raise DamagedCheckpointError if a rank cannot read."""
    checkpoint = ray.train.get_checkpoint()
    return None if checkpoint is None else read_state_on_all_ranks(Path(checkpoint.path))


def _worker_cpus() -> int:
    """Return the number of CPUs that Ray assigned to this worker, at least one."""
    assigned = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    return max(1, min(int(assigned), os.cpu_count() or 1))
