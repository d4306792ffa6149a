"""The driver of a run: check everything, start Ray, train in one worker group, then report, track and finish."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import yaml
from ray.train.torch import TorchTrainer

from datasets.beton import VALIDATION, Manifest, beton_path, read_jpeg
from pipeline.cluster.preflight import check_cluster, check_config, worker_resources
from pipeline.cluster.progress import followed
from pipeline.cluster.worker import MODEL_FILE, WorkerSettings, run_worker
from pipeline.config import Config, ConfigError, differences, parse_config, with_absolute_paths
from pipeline.evaluation.predictions import Predictions, merge
from pipeline.evaluation.report import write_report
from pipeline.files import write_atomically
from pipeline.models.cost import Costs
from pipeline.tracking.tracker import RunHandle, close_run, open_run
from pipeline.training.checkpoint import load_model

CONFIG_FILE, PREDICTIONS_FILE, FINISHED_FILE = "config.yaml", "predictions.npz", "finished.json"
REPORT_FOLDER = "report"
# Fields that may change between the sittings of one run: where it runs, not what it computes.
FREE_TO_CHANGE = ("cluster.", "tracking.", "registry.", "data.num_processes", "loader.num_threads", "loader.batches_ahead")


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: Path
    report: dict[str, Any]
    already_finished: bool = False


def run_folder(config: Config) -> Path:
    """Where a run keeps everything, absolute: Ray's workers have other working folders."""
    return Path(config.cluster.storage).resolve() / config.name


def train_run(config: Config) -> RunResult:
    """Train, evaluate and report; goes on from the last checkpoint, and does nothing for a finished run.

    Raises:
        ConfigError: with every problem that can be known before Ray starts, or that the cluster shows.
        ValueError: the run exists with another configuration, or another driver is at work on it.
    """
    folder = run_folder(config)
    _refuse_drift(folder, config)
    if (folder / FINISHED_FILE).exists():
        return RunResult(folder, json.loads((folder / REPORT_FOLDER / "report.json").read_text()), True)
    manifest, costs = check_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_driver(folder):
        write_atomically(folder / CONFIG_FILE, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        with ray_cluster(), _tracked(config, folder, manifest) as tracking:
            checkpoint = _fit(config, folder, WorkerSettings(with_absolute_paths(config), folder, tracking))
            _collect(checkpoint, folder)
            report = _write_report(config, folder, manifest, costs)
            write_atomically(folder / FINISHED_FILE, json.dumps({"finished": time.time()}))
    return RunResult(folder, report)


def evaluate_run(config: Config) -> RunResult:
    """Evaluate a run's model.pt again and write its report anew."""
    folder = run_folder(config)
    manifest, costs = check_config(config)
    load_model(folder / MODEL_FILE)
    with ray_cluster():
        settings = WorkerSettings(with_absolute_paths(config), folder, None, evaluate_model=folder / MODEL_FILE)
        _collect(_fit(config, folder / "evaluations", settings), folder)
    return RunResult(folder, _write_report(config, folder, manifest, costs))


@contextmanager
def ray_cluster() -> Iterator[None]:
    """The cluster to run on: one that is initialised, the one of RAY_ADDRESS or of this machine, or a new local one."""
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "WARNING"}
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        if os.environ.get("RAY_ADDRESS"):
            raise
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
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(num_workers=config.cluster.num_workers, **worker_resources(config)),
        run_config=ray.train.RunConfig(
            name=storage.name,
            storage_path=str(storage.parent),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(max_failures=config.cluster.max_failures),
        ),
    )
    with followed(settings.run_folder):
        result = trainer.fit()
    return Path(result.checkpoint.path)


def _collect(checkpoint: Path, folder: Path) -> None:
    """Put what the workers reported last into the run's folder: the model, and all ranks' predictions as one."""
    parts = [Predictions.load(path) for path in sorted(checkpoint.glob("predictions-*.npz"))]
    merge(parts).save(folder / PREDICTIONS_FILE)
    write_atomically(folder / MODEL_FILE, (checkpoint / MODEL_FILE).read_bytes())


def _write_report(config: Config, folder: Path, manifest: Manifest, costs: Costs) -> dict[str, Any]:
    validation = beton_path(config.data.folder, VALIDATION)
    return write_report(
        folder / REPORT_FOLDER,
        Predictions.load(folder / PREDICTIONS_FILE),
        costs,
        classes=manifest.classes,
        attributes=manifest.splits[VALIDATION].attributes,
        read_image=lambda index: read_jpeg(validation, index),
        name=config.name,
        context={"dataset": manifest.dataset, "data digest": manifest.digest, **environment()},
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
def _tracked(config: Config, folder: Path, manifest: Manifest) -> Iterator[RunHandle]:
    """The run's MLflow run; it ends FINISHED with the report as artifact, or FAILED or KILLED."""
    tracking, status = open_run(config, folder, manifest), "FAILED"
    try:
        yield tracking
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        close_run(tracking, status, artifacts=folder / REPORT_FOLDER)


@contextmanager
def _only_driver(folder: Path) -> Iterator[None]:
    """Hold the run against a second driver; the lock ends with the process, however that ends."""
    with (folder / ".driver.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another driver is at work on {folder}; wait for it, stop it, or give this run another name"
            ) from None
        yield


def _refuse_drift(folder: Path, config: Config) -> None:
    """A run goes on with the configuration it began with."""
    if not (folder / CONFIG_FILE).exists():
        return
    before = parse_config(yaml.safe_load((folder / CONFIG_FILE).read_text()), str(folder / CONFIG_FILE))
    changed = [line for line in differences(before, config) if not line.startswith(FREE_TO_CHANGE)]
    if changed:
        advice = f"put them back, choose another name (name=...), or remove {folder}"
        raise ConfigError([*changed, advice], f"the run {config.name} began with other values, so it")
