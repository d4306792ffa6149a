"""Run a group of Ray Train workers, report its failures, and raise when it ends early."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray.train
from ray.exceptions import ActorDiedError, RayActorError
from ray.train import ControllerError, TrainingFailedError, UserCallback, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState, RunningState

from pipeline.cluster.checkpoints import DamagedCheckpointError
from pipeline.cluster.preflight import cluster_capacity, worker_resources
from pipeline.cluster.progress import FAILURES, append_event
from pipeline.cluster.signals import StoppedError, crash_traced, explain_death, restored, trace_file
from pipeline.config.load import ConfigError
from pipeline.config.schema import Config
from pipeline.training.checkpoint import OtherRunError
from pipeline.training.logit_table import UnfillableTableError
from pipeline.training.monitoring import DivergedError

_OF_OTHERS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "NCCL")
"""Parts of the error messages that a worker raises when another worker has died."""


class FailureReporter(UserCallback):
    """Append each worker failure to the run's folder as it happens. This runs in Ray Train's controller."""

    def __init__(self, run_folder: Path):
        self.run_folder = run_folder

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        with suppress(OSError):  # the disk may be the cause, and an error here would fail the controller
            append_event(self.run_folder, {"message": explain_workers(worker_exceptions, self.run_folder)}, FAILURES)


class WaitReporter(ControllerCallback):
    """Report once that workers cannot start, because Ray Train retries silently."""

    def __init__(self, run_folder: Path):
        self.run_folder, self._waiting = run_folder, False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, RunningState):
            self._waiting = False
        elif isinstance(current_state, ReschedulingState) and not self._waiting:
            self._waiting = True  # report once, however often Ray Train retries
            error = current_state.training_failed_error
            said = _explained(error.controller_failure if isinstance(error, ControllerError) else error)
            with suppress(OSError):
                append_event(self.run_folder, {"message": f"the workers have not started yet: {said}"}, FAILURES)


def explain_workers(failures: Mapping[int, Exception], event_folder: Path) -> str:
    """Say in one line which worker failed, and how. Workers that only lost a connection to another one come last."""

    def secondary(rank: int) -> tuple[bool, int]:
        return any(sign in str(failures[rank]) for sign in _OF_OTHERS), rank

    rank = min(failures, key=secondary)
    others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return f"worker {rank}{others}: {_explained(failures[rank], trace_file(event_folder, rank))}"


def explain_end(error: TrainingFailedError | RayActorError, run: str, event_folder: Path, saved: str) -> str:
    """Say why Ray Train gave up, and what to do. The same command resumes from `saved`."""
    if isinstance(error, WorkerGroupError):
        said = explain_workers(error.worker_failures, event_folder)
    elif isinstance(error, ControllerError):
        said = f"Ray Train's controller: {_one_line(error.controller_failure)}"
    else:
        said = f"Ray Train's controller: {_explained(error)}"
    return (
        f"The run {run} ended early. {said.rstrip('.')}.\n"
        f"Fix the cause and rerun the same command; it resumes from {saved}."
    )


def _explained(error: BaseException, trace: Path | None = None) -> str:
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return "no answer for cluster.hang_seconds, so it is considered lost"
    if isinstance(error, WorkerGroupStartupTimeoutError):
        return f"the cluster has no room for {error.num_workers}; waiting for room (`ray status` shows what is free)"
    if isinstance(error, WorkerHealthCheckFailedError):
        return _explained(error.health_check_failure, trace)
    if isinstance(error, RayActorError):
        said = str(error)
        if "its node" in said and "died" in said:
            return "its node died"
        if isinstance(error, ActorDiedError):
            return explain_death(trace)
        return "its process cannot be reached (its node or network is down, or it is overloaded)"
    if any(sign in str(error) for sign in _OF_OTHERS):
        return f"lost its connection to another worker ({_one_line(error)})"
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:600]


Settings = TypeVar("Settings")

# Every rank raises these errors at the same step, and restarted workers would raise them again.
FINAL_ERRORS = (
    ConfigError,
    DivergedError,
    OtherRunError,
    DamagedCheckpointError,
    StoppedError,
    UnfillableTableError,
)


def run_group(
    work: Callable[[Settings], None],
    settings: Settings,
    config: Config,
    *,
    storage: Path,
    event_folder: Path,
    saved: str = "the last checkpoint",
) -> ray.train.Result:
    """Run `work(settings)` on all workers. Failed workers restart up to cluster.max_failures times.

    Args:
        work: the function that each worker runs.
        storage: Ray Train's folder of the group, which resumes from the last checkpoint in it.
        event_folder: folder that `followed` reads; failures and waiting for room are reported there.
        saved: description of what the same command resumes from after an early end.

    Raises:
        FINAL_ERRORS: one of them, raised by the workers; StoppedError is raised as KeyboardInterrupt.
        KeyboardInterrupt: the run was stopped, after a checkpoint or immediately.
        ChildProcessError: workers or Ray Train failed too often.
    """
    cluster = config.cluster
    # The controller answers a worker's report at its next poll. The default interval of 2 s is long for short epochs.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(cluster.hang_seconds)
    elastic = cluster.min_workers not in (None, cluster.num_workers)
    trainer = TorchTrainer(
        partial(_run_worker, work, event_folder),
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=(cluster.min_workers, cluster.num_workers) if elastic else cluster.num_workers,
            **worker_resources(config, cluster_capacity()),
        ),
        run_config=ray.train.RunConfig(
            name=storage.name,
            storage_path=str(storage.parent),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            callbacks=[FailureReporter(event_folder), WaitReporter(event_folder)],
        ),
    )
    try:
        with restored(signal.SIGINT):
            result = trainer.fit()
    except SystemExit:  # raised by Ray Train's handler of SIGINT, or by a handler of SIGTERM
        raise KeyboardInterrupt(f"interrupted; the same command resumes from {saved}") from None
    except (TrainingFailedError, RayActorError) as error:
        raise ChildProcessError(explain_end(error, config.name, event_folder, saved)) from error
    match result.return_value:
        case StoppedError() as stopped:
            raise KeyboardInterrupt(str(stopped))
        case Exception() as error:
            raise error
    return result


def _run_worker(work: Callable[[Settings], None], event_folder: Path, settings: Settings) -> Exception | None:
    """Run `work` and return final errors instead of raising them, because Ray Train would count them as failures and
    retry."""
    try:
        with crash_traced(event_folder, ray.train.get_context().get_world_rank()):
            work(settings)
    except FINAL_ERRORS as error:
        return error
    return None
