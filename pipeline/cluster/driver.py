"""Drive a run: check everything, start Ray, train in one worker group, then report, track and finish."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray
import torch
import yaml

from datasets.beton import VALIDATION, Manifest, beton_path, enlarged_shares, enlarged_text, read_jpeg, split_keys
from datasets.files import lock_file, write_whole
from datasets.sources.catalog import find_dataset
from datasets.staging import download_dataset
from pipeline.cluster.checkpoints import with_readable_checkpoints
from pipeline.cluster.connection import ray_cluster
from pipeline.cluster.doctor import require_healthy
from pipeline.cluster.group import run_group
from pipeline.cluster.preflight import check_config
from pipeline.cluster.progress import FAILURES, append_event, followed, show_line
from pipeline.cluster.signals import sigterm_as_sigint, stoppable
from pipeline.cluster.worker import PREDICTIONS, WorkerSettings, run_worker
from pipeline.config.load import drift, refuse_changes, stored_config, with_absolute_paths
from pipeline.config.run_folder import RunFolder, keep_inputs, refuse_other_inputs, run_inputs
from pipeline.config.schema import Config
from pipeline.evaluation.predictions import Predictions, merge
from pipeline.evaluation.report import Evaluation, write_report
from pipeline.models.cost import Costs, Latency
from pipeline.models.drnet import validation_crop
from pipeline.policies.calibrate import Budget, JointComparison, Split, compare_joint
from pipeline.tracking.runs import COMMIT_TAG, git_tags
from pipeline.tracking.store import PROJECT_FOLDER
from pipeline.tracking.tracker import replay, tracked_run
from pipeline.training.checkpoint import load_model
from pipeline.training.run import BEFORE_JOINT, Precision


@dataclass(frozen=True)
class RunResult:
    """The folder and report of a finished run."""

    folder: RunFolder
    report: dict[str, Any]
    already_finished: bool = False


def train_run(config: Config) -> RunResult:
    """Train, evaluate and report. Resume from the last checkpoint; do nothing if the run is finished.

    Raises:
        ConfigError: lists every problem that is found before Ray starts, or on the cluster.
        ValueError: the run exists with another configuration, another driver is working on it, or training diverged.
    """
    folder = RunFolder.of(config)
    _refuse_drift(folder, config)
    if folder.finished.exists():
        replay(config, folder.path)
        return RunResult(folder, json.loads(folder.report_json.read_text()), already_finished=True)
    manifest, costs = check_config(config)
    inputs = run_inputs(config, manifest.digest)
    refuse_other_inputs(folder, inputs)
    download_validation_split(config)
    if len(config.model.resolutions) > 1:
        split_of(config).parts(split_keys(config.data.folder))  # refuses too few images before training
    folder.path.mkdir(parents=True, exist_ok=True)
    with only_driver(folder.driver_lock):
        write_whole(folder.config, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        keep_inputs(folder, inputs)
        with ray_cluster(), sigterm_as_sigint(), tracked_run(config, folder.path, folder.report, manifest) as tracking:
            settings = WorkerSettings(config, folder.path, manifest.digest, tracking)
            checkpoint = _fit(config, folder.path, settings)
            costs = _measured(config, folder, costs)
            kept = _collect(checkpoint, folder, partial(_evaluation, config, costs))
            report = _write_report(config, folder, manifest, costs, kept)
            write_whole(folder.finished, json.dumps({"finished": time.time(), "joint_stage": kept}))
    return RunResult(folder, report)


def evaluate_run(config: Config, cost: Literal["flops", "milliseconds"] | None = None) -> RunResult:
    """Evaluate a run's model.pt again and rewrite its report.

    Args:
        cost: unit of cost in the report instead of the run's own. Milliseconds that the run has measured are reused.

    Raises:
        ConfigError: as in `train_run`.
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
        # Ray Train resumes from what it finds under a run's name, so every evaluation gets its own name.
        with tempfile.TemporaryDirectory(dir=folder.path, prefix="evaluation-") as storage:
            merged(_fit(config, Path(storage), settings), PREDICTIONS).save(folder.predictions)
    return RunResult(folder, _write_report(config, folder, manifest, _measured(config, folder, costs)))


def calibrate_run(config: Config) -> RunResult:
    """Fit a finished run's policies again from its stored logits, choose one by the budget, and rewrite the report.

    Raises:
        ConfigError: as in `train_run`.
        ValueError: the run has not finished, or no policy meets the budget.
    """
    folder = RunFolder.of(config)
    _refuse_drift(folder, config)
    if not folder.predictions.exists():
        raise ValueError(f"{folder.predictions} does not exist; train the run first (python -m jobs.train)")
    manifest, costs = check_config(config)
    refuse_other_inputs(folder, run_inputs(config, manifest.digest))
    download_validation_split(config)
    with only_driver(folder.driver_lock):
        return RunResult(folder, _write_report(config, folder, manifest, _measured(config, folder, costs)))


def _measured(config: Config, folder: RunFolder, costs: Costs) -> Costs:
    """Return the costs, including the milliseconds that a worker measured if the run's cost is in milliseconds."""
    return costs if config.cost == "flops" else replace(costs, latency=Latency.load(folder.latency))


def _precision(config: Config, folder: RunFolder) -> str:
    """Return the precision of the run's forward passes in training and the reason for it."""
    return str(Precision.load(folder.precision)) if folder.precision.exists() else config.training.precision


def _fit(config: Config, storage: Path, settings: WorkerSettings) -> Path:
    """Run the worker group and return the folder of the last checkpoint. Raise what `run_group` raises."""
    require_healthy(config, settings.data_digest)
    shipped = replace(settings, config=with_absolute_paths(config))

    def show(line: str) -> None:
        append_event(settings.run_folder, {"message": line}, FAILURES)

    def attempt() -> Path:
        # An evaluation has no checkpoints to stop at.
        with nullcontext() if settings.evaluate_model else stoppable(RunFolder(settings.run_folder)):
            result = run_group(run_worker, shipped, config, storage=storage, event_folder=settings.run_folder)
            return Path(result.checkpoint.path)

    with followed(settings.run_folder):
        return with_readable_checkpoints(storage, show, attempt)


def _collect(checkpoint: Path, folder: RunFolder, evaluation: Callable[[Predictions], Evaluation]) -> str | None:
    """Copy the workers' last report into the run's folder: the model, and the merged predictions of all ranks.

    Args:
        evaluation: returns the Evaluation of a model's predictions.

    Returns:
        A sentence that says which model the run keeps, if there is one from before and one from after the joint stage.
    """
    predictions, model, kept = merged(checkpoint, PREDICTIONS), checkpoint / folder.model.name, None
    if list(checkpoint.glob(f"{BEFORE_JOINT}-*.npz")):
        before = merged(checkpoint, BEFORE_JOINT)
        before.save(folder.predictions_before_joint)
        predictions.save(folder.predictions_after_joint)
        kept = kept_model(evaluation(before), evaluation(predictions))
        append_event(folder.path, {"message": f"joint stage: {kept}"})
        show_line(f"joint stage: {kept}")  # `followed` has ended with the workers
        if not kept.is_after:
            predictions, model = before, folder.before_joint
    predictions.save(folder.predictions)
    write_whole(folder.model, model.read_bytes())
    return str(kept) if kept else None


def kept_model(before: Evaluation, after: Evaluation) -> JointComparison:
    """Decide between the models from before and after the joint stage."""
    return compare_joint(before.images, after.images, after.keys_N, after.budget, after.split)


def merged(checkpoint: Path, name: str) -> Predictions:
    """Merge the predictions of one model from all ranks."""
    return merge([Predictions.load(path) for path in sorted(checkpoint.glob(f"{name}-*.npz"))])


def download_validation_split(config: Config) -> None:
    """Download the validation images to the driver's node before training, because the report shows some of them."""
    if config.data.uri:
        download_dataset(config.data.uri, config.data.folder, splits=[VALIDATION])


def _write_report(
    config: Config, folder: RunFolder, manifest: Manifest, costs: Costs, kept: str | None = None
) -> dict[str, Any]:
    """Write the report and return its content.

    Args:
        kept: a sentence that says which model the run keeps after a joint stage. If it is None and the run is finished,
            the sentence is read from the run's folder.
    """
    if kept is None and folder.finished.exists():
        kept = json.loads(folder.finished.read_text()).get("joint_stage")
    validation = beton_path(config.data.folder, VALIDATION)
    enlarged = enlarged_shares(validation, costs.resolutions, validation_crop(config))
    return write_report(
        folder.report,
        evaluation_of(config, folder, costs),
        classes=manifest.classes,
        attributes=manifest.splits[VALIDATION].attributes,
        read_image=lambda index: read_jpeg(validation, index),
        name=config.name,
        context={
            "dataset": manifest.dataset,
            "git_commit": git_tags(PROJECT_FOLDER).get(COMMIT_TAG),
            "references": [asdict(published) for published in find_dataset(manifest.dataset).published],
            "data digest": manifest.digest,
            "enlarged images": enlarged_text(enlarged, costs.resolutions),
            "precision": _precision(config, folder),
            **({"joint stage": kept} if kept else {}),
            **environment(),
        },
    )


def evaluation_of(config: Config, folder: RunFolder, costs: Costs) -> Evaluation:
    """Return the inputs of a finished run's report. The validation images must be on this node."""
    predictions, other, name = Predictions.load(folder.predictions), None, ""
    if folder.predictions_before_joint.exists():
        other, name = Predictions.load(folder.predictions_before_joint), "before joint"
        if folder.model.read_bytes() == folder.before_joint.read_bytes():
            other, name = Predictions.load(folder.predictions_after_joint), "after joint"
    return replace(_evaluation(config, costs, predictions), other=other, other_name=name)


def _evaluation(config: Config, costs: Costs, predictions: Predictions) -> Evaluation:
    """Return the evaluation of a model's predictions by this configuration, without a second model beside it."""
    policy = config.policy
    highest = policy.budget_gflops if config.cost == "flops" else policy.budget_milliseconds
    drop = policy.max_accuracy_drop
    return Evaluation(
        predictions,
        costs,
        split_keys(config.data.folder)[predictions.indices_N],
        budget=Budget(highest, None if drop is None else drop / 100),
        split=split_of(config),
        balanced=policy.select_by == "balanced_accuracy",  # models and policies are chosen by the mean over the classes
        has_predictor=bool(config.stages.predictor or config.stages.joint),
    )


def split_of(config: Config) -> Split:
    """Return the split of the validation images into those for choosing and those for reporting.

    It is the same for all runs on the same data. If it depended on the run's seed, one run would be reported on images
    that another run was chosen on.
    """
    policy = config.policy
    return Split(policy.select_share, policy.cross_fit_below, policy.folds)


def environment() -> dict[str, str]:
    """Return the versions and hardware that belong to a published figure."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, GPU {gpu}",
    }


@contextmanager
def only_driver(lock: Path) -> Iterator[None]:
    """Keep a second driver out of the folder of `lock`. The lock ends with the process, even if it is killed."""
    with lock.open("w") as file:
        if not lock_file(file.fileno(), lock):
            raise ValueError(
                f"another driver is at work on {lock.parent}. Wait for it, stop it, or give this run another name."
            )
        yield


def _refuse_drift(folder: RunFolder, config: Config) -> None:
    """Raise ValueError if a run would resume with another configuration than it started with."""
    if not folder.config.exists():
        return
    started_with = stored_config(yaml.safe_load(folder.config.read_text()), config, str(folder.config))
    refuse_changes(
        drift(started_with, config),
        f"The run {config.name} started with another configuration",
        f"Restore these values, choose another name (name=...), or remove {folder.path}.",
    )
