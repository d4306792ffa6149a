"""What signals do to a run: SIGTERM stops it after its next checkpoint, and the signal of a crash leaves a trace.

Stopping: SIGTERM is what `ray job stop` and `kill` send. The driver writes to a file in the run's folder, rank 0 reads
it after each checkpoint, and all ranks end together. No work is lost, and the resumed run gives exactly the same
result. An extra checkpoint at the time of the signal would change the result, because a checkpoint averages the ranks'
batch norm statistics.

Crashes: Ray reports every dead process in the same way, so each worker makes Python's faulthandler write to a file in
the run's folder. A crash in native code leaves the signal and the Python stack there. SIGKILL, which no process can
catch, leaves the file empty.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from pipeline.config.run_folder import RunFolder

JOB_VARIABLE, WAIT_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_STOP_WAIT_TIME_S"
DEFAULT_WAIT_SECONDS = 3.0
"""Ray's default of WAIT_VARIABLE."""
SECONDS_TO_END = 10.0
"""Seconds reserved at the end of a job's time to stop the workers and update MLflow."""


class StoppedError(Exception):
    """A run stopped after a checkpoint because the user requested it."""


def seconds_after_sigterm() -> float | None:
    """Return how many seconds a run may continue after SIGTERM, or None if no limit is known."""
    if JOB_VARIABLE not in os.environ:
        return None
    return max(0.0, float(os.environ.get(WAIT_VARIABLE, DEFAULT_WAIT_SECONDS)) - SECONDS_TO_END)


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

    A second SIGTERM, or the end of a job's time (`seconds_after_sigterm`), raises SystemExit immediately.
    """
    request, seconds = folder.stop, seconds_after_sigterm()
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


SIGNALS = {
    "Segmentation fault": "SIGSEGV",
    "Bus error": "SIGBUS",
    "Aborted": "SIGABRT",
    "Illegal instruction": "SIGILL",
    "Floating-point exception": "SIGFPE",
    "Floating point exception": "SIGFPE",
}
"""Maps what faulthandler writes to the name of the signal."""
_FRAME = re.compile(r'^Current thread .*\n  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)$', re.MULTILINE)


def trace_file(folder: Path, rank: int) -> Path:
    """Return the file to which a worker's crash is written."""
    return folder / f"crash-rank-{rank}.txt"


@contextmanager
def crash_traced(folder: Path, rank: int) -> Iterator[None]:
    """Write the signal and the Python stack to `trace_file` if this process crashes; otherwise remove the file."""
    path, was_enabled = trace_file(folder, rank), faulthandler.is_enabled()
    try:
        file = path.open("w")
    except OSError:  # a full or read-only disk, which training reports itself
        yield
        return
    with file:
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
            if was_enabled:
                faulthandler.enable(all_threads=False)  # as Ray enables it
            with suppress(OSError):
                path.unlink(missing_ok=True)


def explain_death(trace: Path | None) -> str:
    """Say which signal ended a process, the likely cause, and what to try.

    Args:
        trace: the `trace_file` of the process, or None.
    """
    try:
        text = trace.read_text(errors="replace") if trace else None
    except OSError:
        text = None
    if text is None:
        return "its process died (killed, out of memory, or a crash: see Ray's logs)"
    if not text.strip():
        return (
            "its process died without a trace, most likely by SIGKILL because its node ran out of memory (see `dmesg` "
            "there); lower loader.batches_ahead or use nodes with more memory"
        )
    name = next((name for words, name in SIGNALS.items() if words in text.partition("\n")[0]), "a signal")
    frame = _FRAME.search(text)
    where = ""
    if frame:
        file = frame["file"].rpartition("site-packages/")[2]
        where = f" called from {file}:{frame['line']} ({frame['function']})"
    disk = "a full /dev/shm, a truncated file, " if name == "SIGBUS" else ""
    return (
        f"its process crashed with {name} in native code{where}, which suggests {disk}a bug in a library such as "
        "oneDNN, numba or libjpeg, or bad memory; if it happens again, try cluster.cpus_per_worker=1, or "
        f"training.channels_last=false in a new run (stack: {trace})"
    )
