"""Ending a run from outside: SIGTERM, which `ray job stop` and `kill` send, lets it go on to its next checkpoint.

The driver writes into a file of the run's folder, rank 0 reads it after each checkpoint, and all ranks end together. So
nothing of the work is lost, and the run that goes on from there ends with the same bits. A checkpoint of its own at the
moment of the signal would not give the same: checkpoints bring the ranks' statistics together.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.config.run_folder import RunFolder

JOB_VARIABLE, WAIT_VARIABLE, RAYS_WAIT_SECONDS = "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_STOP_WAIT_TIME_S", 3.0
SECONDS_TO_END = 10.0
"""of a job's patience, kept for ending in order: stopping the workers, and telling MLflow"""


class StoppedError(Exception):
    """A run has ended after a checkpoint because it was asked to."""


def patience() -> float | None:
    """Seconds that a run may go on after SIGTERM; None where nobody is known to kill it."""
    if JOB_VARIABLE not in os.environ:
        return None
    return max(0.0, float(os.environ.get(WAIT_VARIABLE, RAYS_WAIT_SECONDS)) - SECONDS_TO_END)


@contextmanager
def restored(*numbers: signal.Signals) -> Iterator[bool]:
    """Put signals' handlers back, which only the main thread can: whether this is it.

    Ray Train leaves its own for SIGINT, which asks a controller that is gone, and ends the process with exit code 0.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield in_main_thread
    finally:
        if in_main_thread:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def sigterm_as_sigint() -> Iterator[None]:
    """Let SIGTERM end a run in order while no workers train, as Ctrl-C does."""
    with restored(signal.SIGTERM) as in_main_thread:
        if in_main_thread:
            signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        yield


@contextmanager
def stoppable(folder: RunFolder) -> Iterator[None]:
    """In the driver: inside, SIGTERM asks the workers to stop after their next checkpoint.

    A second SIGTERM ends the driver at once, as SystemExit, and so does a job's patience when it is at its end.
    """
    asked, seconds = folder.stop, patience()
    asked.write_text("")

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.read_text() or seconds == 0:
            end(number, frame)
        asked.write_text("stop")
        # Not print: what the signal interrupted may be a print.
        os.write(2, b"stopping at the next checkpoint; another SIGTERM ends the run at once\n")
        if seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    with restored(signal.SIGTERM, signal.SIGALRM) as in_main_thread:
        if not in_main_thread:  # where no handler can be set
            yield
            return
        signal.signal(signal.SIGTERM, ask)
        signal.signal(signal.SIGALRM, end)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def is_stop_asked(folder: RunFolder) -> bool:
    """Whether the run's driver was asked to stop.

    The file is always there and is opened to be read: that is how a network file system shows what another machine
    wrote. Whether a file exists it may remember for a minute.
    """
    try:
        return bool(folder.stop.read_text())
    except FileNotFoundError:
        return False
