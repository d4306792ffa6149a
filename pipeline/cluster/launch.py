"""The driver of a run: check everything, start Ray, train in one worker group, then report, track and finish."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import yaml
from ray.train.torch import TorchTrainer

from datasets.beton import VALIDATION, Manifest, beton_path, read_jpeg
from datasets.catalog import find_dataset
from datasets.files import write_whole
from pipeline.cluster.preflight import check_cluster, check_config, worker_resources
from pipeline.cluster.progress import followed
from pipeline.cluster.worker import WorkerSettings, run_worker
from pipeline.config import Config
from pipeline.config_file import differences, parse_config, with_absolute_paths
from pipeline.evaluation.predictions import Predictions, merge
from pipeline.evaluation.report import write_report
from pipeline.models.cost import Costs
from pipeline.run_folder import RunFolder
from pipeline.tracking.runs import COMMIT_TAG, git_tags
from pipeline.tracking.store import PROJECT_FOLDER
from pipeline.tracking.tracker import RunHandle, close_run, open_run, replay
from pipeline.training.checkpoint import load_model

# Fields that may change between the sittings of one run: where it runs, not what it computes.
FREE_TO_CHANGE = (
    "cluster.",
    "tracking.",
    "registry.",
    "data.num_processes",
    "loader.num_threads",
    "loader.batches_ahead",
)


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: RunFolder
    report: dict[str, Any]
    already_finished: bool = False


def train_run(config: Config) -> RunResult:
    """Train, evaluate and report; goes on from the last checkpoint, and does nothing for a finished run.

    Raises:
        ConfigError: with every problem that can be known before Ray starts, or that the cluster shows.
        ValueError: the run exists with another configuration, or another driver is at work on it.
    """
    folder = RunFolder.of(config)
    _refuse_drift(folder, config)
    if folder.finished.exists():
        replay(config, folder.path)
        return RunResult(folder, json.loads(folder.report_json.read_text()), already_finished=True)
    manifest, costs = check_config(config)
    folder.path.mkdir(parents=True, exist_ok=True)
    with _only_driver(folder):
        write_whole(folder.config, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        with ray_cluster(), _tracked(config, folder, manifest) as tracking:
            _collect(_fit(config, folder.path, WorkerSettings(config, folder.path, tracking)), folder)
            report = _write_report(config, folder, manifest, costs)
            write_whole(folder.finished, json.dumps({"finished": time.time()}))
    return RunResult(folder, report)


def evaluate_run(config: Config) -> RunResult:
    """Evaluate a run's model.pt again and write its report anew.

    Raises:
        ConfigError: as `train_run`.
        ValueError: the run has no readable model.pt.
    """
    folder = RunFolder.of(config)
    _refuse_drift(folder, config)
    load_model(folder.model)
    manifest, costs = check_config(config)
    with _only_driver(folder), ray_cluster():
        settings = WorkerSettings(config, folder.path, None, evaluate_model=folder.model)
        # Ray Train goes on from what it finds under a run's name, so every evaluation has a name of its own.
        with tempfile.TemporaryDirectory(dir=folder.path, prefix="evaluation-") as storage:
            _collect(_fit(config, Path(storage), settings), folder)
    return RunResult(folder, _write_report(config, folder, manifest, costs))


@contextmanager
def ray_cluster() -> Iterator[None]:
    """The cluster to run on: one that is initialised, the one of RAY_ADDRESS (as in a Ray job), or a new local one.

    A cluster that merely runs on this machine is not joined: it may be the private one of another run, and end with it.
    """
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "WARNING"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        ray.init(address="local", include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def _fit(config: Config, storage: Path, settings: WorkerSettings) -> Path:
    """Run the worker group to its end; returns the folder of the last checkpoint."""
    check_cluster(config)
    # The controller answers a worker's report at its next look; the default of 2 s would be most of a short epoch.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    trainer = TorchTrainer(
        run_worker,
        train_loop_config=replace(settings, config=with_absolute_paths(config)),
        scaling_config=ray.train.ScalingConfig(num_workers=config.cluster.num_workers, **worker_resources(config)),
        run_config=ray.train.RunConfig(
            name=storage.name,
            storage_path=str(storage.parent),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(max_failures=config.cluster.max_failures),
        ),
    )
    with followed(settings.run_folder):
        try:
            result = trainer.fit()
        except SystemExit:  # how Ray Train ends a driver that was sent SIGINT
            raise KeyboardInterrupt("interrupted; the same command goes on from the last checkpoint") from None
    return Path(result.checkpoint.path)


def _collect(checkpoint: Path, folder: RunFolder) -> None:
    """Put what the workers reported last into the run's folder: the model, and all ranks' predictions as one."""
    parts = [Predictions.load(path) for path in sorted(checkpoint.glob("predictions-*.npz"))]
    merge(parts).save(folder.predictions)
    if not folder.model.exists():
        write_whole(folder.model, (checkpoint / folder.model.name).read_bytes())


def _write_report(config: Config, folder: RunFolder, manifest: Manifest, costs: Costs) -> dict[str, Any]:
    validation = beton_path(config.data.folder, VALIDATION)
    return write_report(
        folder.report,
        Predictions.load(folder.predictions),
        costs,
        classes=manifest.classes,
        attributes=manifest.splits[VALIDATION].attributes,
        read_image=lambda index: read_jpeg(validation, index),
        name=config.name,
        context={
            "dataset": manifest.dataset,
            "git_commit": git_tags(PROJECT_FOLDER).get(COMMIT_TAG),
            "references": [asdict(published) for published in find_dataset(manifest.dataset).published],
            "data digest": manifest.digest,
            **environment(),
        },
    )


def environment() -> dict[str, str]:
    """Versions and hardware, as a published figure needs them."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, GPU {gpu}",
    }


@contextmanager
def _tracked(config: Config, folder: RunFolder, manifest: Manifest) -> Iterator[RunHandle]:
    """The run's MLflow run; it ends FINISHED with the report as artifact, or FAILED or KILLED."""
    tracking, status = open_run(config, folder.path, manifest), "FAILED"
    try:
        yield tracking
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        close_run(tracking, status, artifacts=folder.report)


@contextmanager
def _only_driver(folder: RunFolder) -> Iterator[None]:
    """Hold the run against a second driver; the lock ends with the process, however that ends."""
    with folder.driver_lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another driver is at work on {folder.path}; wait for it, stop it, or give this run another name"
            ) from None
        yield


def _refuse_drift(folder: RunFolder, config: Config) -> None:
    """A run goes on with the configuration it began with."""
    if not folder.config.exists():
        return
    before = parse_config(yaml.safe_load(folder.config.read_text()), str(folder.config))
    changed = [line for line in differences(before, config) if not line.startswith(FREE_TO_CHANGE)]
    if changed:
        listing = "\n".join(f"  - {line}" for line in changed)
        raise ValueError(
            f"the run {config.name} began with another configuration:\n{listing}\n"
            f"put it back, choose another name (name=...), or remove {folder.path}"
        )
