"""The driver of a run: check everything, start Ray, train in one worker group, then report, track and finish."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
import torch
import yaml

from datasets.beton import VALIDATION, Manifest, beton_path, read_jpeg
from datasets.files import write_whole
from datasets.sources.catalog import find_dataset
from datasets.staging import download_dataset
from pipeline.cluster.checkpoints import DamagedCheckpointError, mend_snapshot
from pipeline.cluster.connection import ray_cluster
from pipeline.cluster.doctor import require_healthy
from pipeline.cluster.group import run_group
from pipeline.cluster.preflight import check_config
from pipeline.cluster.progress import FAILURES, append_event, followed
from pipeline.cluster.stopping import sigterm_as_sigint, stoppable
from pipeline.cluster.worker import WorkerSettings, run_worker
from pipeline.config.inputs import keep_inputs, refuse_other_inputs, run_inputs
from pipeline.config.load import drift, parse_config, with_absolute_paths
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import Config
from pipeline.evaluation.predictions import Predictions, merge
from pipeline.evaluation.report import write_report
from pipeline.models.cost import Costs, Latency
from pipeline.tracking.runs import COMMIT_TAG, git_tags
from pipeline.tracking.store import PROJECT_FOLDER
from pipeline.tracking.tracker import replay, tracked_run
from pipeline.training.checkpoint import load_model


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
        ValueError: the run exists with another configuration, another driver is at work on it, or it diverged.
    """
    folder = RunFolder.of(config)
    _refuse_drift(folder, config)
    if folder.finished.exists():
        replay(config, folder.path)
        return RunResult(folder, json.loads(folder.report_json.read_text()), already_finished=True)
    manifest, costs = check_config(config)
    inputs = run_inputs(config, manifest.digest)
    refuse_other_inputs(folder, inputs)
    folder.path.mkdir(parents=True, exist_ok=True)
    with only_driver(folder.driver_lock):
        write_whole(folder.config, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        keep_inputs(folder, inputs)
        download_validation_split(config)
        with ray_cluster(), sigterm_as_sigint(), tracked_run(config, folder.path, folder.report, manifest) as tracking:
            settings = WorkerSettings(config, folder.path, manifest.digest, tracking)
            _collect(_fit(config, folder.path, settings), folder)
            report = _write_report(config, folder, manifest, _measured(config, folder, costs))
            write_whole(folder.finished, json.dumps({"finished": time.time()}))
    return RunResult(folder, report)


def evaluate_run(config: Config, cost: Literal["flops", "milliseconds"] | None = None) -> RunResult:
    """Evaluate a run's model.pt again and write its report anew.

    Args:
        cost: of the report, in place of the run's own. Milliseconds that the run has measured are used again.

    Raises:
        ConfigError: as `train_run`.
        ValueError: the run has no readable model.pt.
    """
    folder = RunFolder.of(config)
    _refuse_drift(folder, config)
    load_model(folder.model)
    config = config if cost is None else config.model_copy(update={"cost": cost})
    manifest, costs = check_config(config)
    refuse_other_inputs(folder, run_inputs(config, manifest.digest))
    download_validation_split(config)
    with only_driver(folder.driver_lock), ray_cluster():
        settings = WorkerSettings(config, folder.path, manifest.digest, None, evaluate_model=folder.model)
        # Ray Train goes on from what it finds under a run's name, so every evaluation has a name of its own.
        with tempfile.TemporaryDirectory(dir=folder.path, prefix="evaluation-") as storage:
            _collect(_fit(config, Path(storage), settings), folder)
    return RunResult(folder, _write_report(config, folder, manifest, _measured(config, folder, costs)))


def _measured(config: Config, folder: RunFolder, costs: Costs) -> Costs:
    """With the milliseconds that a worker measured, where they are the cost."""
    return costs if config.cost == "flops" else replace(costs, latency=Latency.load(folder.latency))


def _fit(config: Config, storage: Path, settings: WorkerSettings) -> Path:
    """Run the worker group to its end; returns the folder of the last checkpoint. Raises what `run_group` does."""
    require_healthy(config, settings.data_digest)
    # The controller answers a worker's report at its next look; the default of 2 s would be most of a short epoch.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.cluster.hang_seconds)
    shipped = replace(settings, config=with_absolute_paths(config))
    with followed(settings.run_folder):
        while True:
            for line in mend_snapshot(storage):
                append_event(settings.run_folder, {"message": line}, FAILURES)
            # An evaluation has no checkpoints to stop at.
            stopping = nullcontext() if settings.evaluate_model else stoppable(RunFolder(settings.run_folder))
            with suppress(DamagedCheckpointError), stopping:
                result = run_group(run_worker, shipped, config, storage=storage, told=settings.run_folder)
                return Path(result.checkpoint.path)


def _collect(checkpoint: Path, folder: RunFolder) -> None:
    """Put what the workers reported last into the run's folder: the model, and all ranks' predictions as one."""
    parts = [Predictions.load(path) for path in sorted(checkpoint.glob("predictions-*.npz"))]
    merge(parts).save(folder.predictions)
    if not folder.model.exists():
        write_whole(folder.model, (checkpoint / folder.model.name).read_bytes())


def download_validation_split(config: Config) -> None:
    """Bring the images that the report shows to the driver's node: first, so that it cannot fail for want of them."""
    if config.data.uri:
        download_dataset(config.data.uri, config.data.folder, splits=[VALIDATION])


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
def only_driver(lock: Path) -> Iterator[None]:
    """Hold the folder of `lock` against a second driver; the lock ends with the process, however that ends."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another driver is at work on {lock.parent}; wait for it, stop it, or give this run another name"
            ) from None
        yield


def _refuse_drift(folder: RunFolder, config: Config) -> None:
    """A run goes on with the configuration it began with."""
    if not folder.config.exists():
        return
    changed = drift(parse_config(yaml.safe_load(folder.config.read_text()), str(folder.config)), config)
    if changed:
        listing = "\n".join(f"  - {line}" for line in changed)
        raise ValueError(
            f"the run {config.name} began with another configuration:\n{listing}\n"
            f"put it back, choose another name (name=...), or remove {folder.path}"
        )
