"""A group of Ray Train workers from its start to its end: what befalls it is told, and how it ends is an exception."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import ray.train
from ray.exceptions import RayActorError
from ray.train import TrainingFailedError
from ray.train.torch import TorchTrainer

from pipeline.cluster.checkpoints import DamagedCheckpointError
from pipeline.cluster.failures import FailureTeller, WaitTeller, explain_end
from pipeline.cluster.preflight import worker_resources
from pipeline.cluster.stopping import StoppedError, restored
from pipeline.config import Config
from pipeline.config_file import ConfigError
from pipeline.training.checkpoint import OtherRunError
from pipeline.training.divergence import DivergedError
from pipeline.training.logit_table import UnfillableTableError

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
            callbacks=[FailureTeller(told), WaitTeller(told)],
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
