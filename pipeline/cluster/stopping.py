"""Stop a run on SIGTERM, which `ray job stop` and `kill` send, right after its next checkpoint.

The driver writes to a file in the run's folder, rank 0 reads it after each checkpoint, and all ranks end together. No
work is lost, and the resumed run gives exactly the same result. An extra checkpoint at the time of the signal would
change the result, because a checkpoint averages the ranks' batch norm statistics.
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
"""Seconds reserved at the end of a job's time to stop the workers and update MLflow."""


class StoppedError(Exception):
    """A run stopped after a checkpoint because the user requested it."""


def patience() -> float | None:
    """Return how many seconds a run may continue after SIGTERM, or None if nothing is known to kill it."""
    if JOB_VARIABLE not in os.environ:
        return None
    return max(0.0, float(os.environ.get(WAIT_VARIABLE, RAYS_WAIT_SECONDS)) - SECONDS_TO_END)


@contextmanager
def restored(*numbers: signal.Signals) -> Iterator[bool]:
    """Restore the handlers of these signals afterwards. Yield whether this is the main thread, which alone can set
    them.

    Ray Train leaves its own handler for SIGINT installed. That handler calls a controller that has ended, and exits
    with code 0.
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
    """Make SIGTERM end a run like Ctrl-C while no workers train."""
    with restored(signal.SIGTERM) as in_main_thread:
        if in_main_thread:
            signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        yield


@contextmanager
def stoppable(folder: RunFolder) -> Iterator[None]:
    """Make SIGTERM to this driver stop the workers after their next checkpoint.

    A second SIGTERM, or the end of a job's time (`patience`), raises SystemExit immediately.
    """
    request, seconds = folder.stop, patience()
    request.write_text("")

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    def request_stop(number: int, frame: FrameType | None) -> None:
        if request.read_text() or seconds == 0:
            end(number, frame)
        request.write_text("stop")
        # Do not use print, because the signal may have interrupted a call of it.
        os.write(2, b"stopping at the next checkpoint; another SIGTERM ends the run at once\n")
        if seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    with restored(signal.SIGTERM, signal.SIGALRM) as in_main_thread:
        if not in_main_thread:  # other threads cannot set a handler
            yield
            return
        signal.signal(signal.SIGTERM, request_stop)
        signal.signal(signal.SIGALRM, end)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def is_stop_requested(folder: RunFolder) -> bool:
    """Return whether a stop of the run was requested.

    The file always exists and is opened for reading, so that a network file system shows what another machine wrote.
    Whether a file exists may be cached for a minute.
    """
    try:
        return bool(folder.stop.read_text())
    except FileNotFoundError:
        return False
