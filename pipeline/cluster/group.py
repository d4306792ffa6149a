"""Run a group of Ray Train workers, report its failures, and raise when it ends early."""

from __future__ import annotations

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
from pipeline.cluster.preflight import worker_resources
from pipeline.cluster.progress import FAILURES, append_event
from pipeline.cluster.stopping import StoppedError, restored
from pipeline.config.load import ConfigError
from pipeline.config.schema import Config
from pipeline.training.checkpoint import OtherRunError
from pipeline.training.logit_table import UnfillableTableError
from pipeline.training.monitoring import DivergedError

_OF_OTHERS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "NCCL")
"""what a worker says when another one has gone"""


class FailureReporter(UserCallback):
    """Adds each failure of workers to the run's folder as it happens. It lives in Ray Train's controller."""

    def __init__(self, run_folder: Path):
        self.run_folder = run_folder

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        with suppress(OSError):  # the disk may be what failed, and an error here would be the controller's own
            append_event(self.run_folder, {"message": explain_workers(worker_exceptions)}, FAILURES)


class WaitReporter(ControllerCallback):
    """Adds that workers cannot be started, which Ray Train tries again without a word for as long as it takes."""

    def __init__(self, run_folder: Path):
        self.run_folder, self._waiting = run_folder, False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, RunningState):
            self._waiting = False
        elif isinstance(current_state, ReschedulingState) and not self._waiting:
            self._waiting = True  # told once, however often it is tried
            error = current_state.training_failed_error
            said = _explained(error.controller_failure if isinstance(error, ControllerError) else error)
            with suppress(OSError):
                append_event(self.run_folder, {"message": f"the workers are not started yet: {said}"}, FAILURES)


def explain_workers(failures: Mapping[int, Exception]) -> str:
    """One line: which worker failed, and how. A worker's end breaks the others' connections: those are told last."""

    def told_late(rank: int) -> tuple[bool, int]:
        return any(sign in str(failures[rank]) for sign in _OF_OTHERS), rank

    rank = min(failures, key=told_late)
    others = f" (and {len(failures) - 1} with it)" if len(failures) > 1 else ""
    return f"worker {rank}{others}: {_explained(failures[rank])}"


def explain_end(error: TrainingFailedError | RayActorError, run: str, saved: str) -> str:
    """Why Ray Train gave up, and what to do; `saved` is what the same command goes on from."""
    if isinstance(error, WorkerGroupError):
        said = explain_workers(error.worker_failures)
    elif isinstance(error, ControllerError):
        said = f"Ray Train's controller: {_one_line(error.controller_failure)}"
    else:
        said = f"Ray Train's controller: {_explained(error)}"
    return (
        f"the run {run} has ended early. {said.rstrip('.')}.\n"
        f"Mend that where it needs mending; then the same command goes on from {saved}"
    )


def _explained(error: BaseException) -> str:
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return "no answer for cluster.hang_seconds; taken for lost"
    if isinstance(error, WorkerGroupStartupTimeoutError):
        return f"the cluster has no room for {error.num_workers}; waiting for it (`ray status` shows what there is)"
    if isinstance(error, WorkerHealthCheckFailedError):
        return _explained(error.health_check_failure)
    if isinstance(error, RayActorError):
        said = str(error)
        if "node" in said and "died" in said and "its node" in said:
            return "lost with its node"
        killed = "its process died" if isinstance(error, ActorDiedError) else "its process cannot be reached"
        return f"{killed} (killed, out of memory, or a crash: see Ray's logs)"
    if any(sign in str(error) for sign in _OF_OTHERS):
        return f"lost its connection to another worker ({_one_line(error)})"
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:600]


Settings = TypeVar("Settings")

# Raised by every rank at the same step; to start the workers again would end the same.
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
    told: Path,
    saved: str = "the last checkpoint",
) -> ray.train.Result:
    """Run `work(settings)` on all workers, which are started again as often as cluster.max_failures says.

    Args:
        work: what a worker does.
        storage: Ray Train's folder of the group; it goes on from the last checkpoint that it finds there.
        told: the folder that `followed` reads, which is told of failures and of waiting for room.
        saved: what the same command goes on from after an early end.

    Raises:
        FINAL_ERRORS: one of them, from the workers; StoppedError as KeyboardInterrupt.
        KeyboardInterrupt: it was stopped, after a checkpoint or at once.
        ChildProcessError: workers failed again and again, or Ray Train did.
    """
    cluster = config.cluster
    elastic = cluster.min_workers not in (None, cluster.num_workers)
    trainer = TorchTrainer(
        partial(_returning_final_errors, work),
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=(cluster.min_workers, cluster.num_workers) if elastic else cluster.num_workers,
            **worker_resources(config),
        ),
        run_config=ray.train.RunConfig(
            name=storage.name,
            storage_path=str(storage.parent),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            callbacks=[FailureReporter(told), WaitReporter(told)],
        ),
    )
    try:
        with restored(signal.SIGINT):
            result = trainer.fit()
    except SystemExit:  # by SIGINT, which Ray Train handles, or by a handler of SIGTERM
        raise KeyboardInterrupt(f"interrupted; the same command goes on from {saved}") from None
    except (TrainingFailedError, RayActorError) as error:
        raise ChildProcessError(explain_end(error, config.name, saved)) from error
    match result.return_value:
        case StoppedError() as stopped:
            raise KeyboardInterrupt(str(stopped))
        case Exception() as error:
            raise error
    return result


def _returning_final_errors(work: Callable[[Settings], None], settings: Settings) -> Exception | None:
    """Ray Train's train function: an error that is returned is not counted as a failure of the worker."""
    try:
        work(settings)
    except FINAL_ERRORS as error:
        return error
    return None
