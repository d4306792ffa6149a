"""Find out which signal ended a worker's process, because Ray reports every dead process in the same way.

Each worker makes Python's faulthandler write to a file in the run's folder. A crash in native code leaves the signal
and the Python stack there. SIGKILL, which no process can catch, leaves the file empty.
"""

from __future__ import annotations

import faulthandler
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
        f"its process died of {name} in native code{where}, which points to {disk}a bug in a library such as oneDNN, "
        "numba or libjpeg, or bad memory; if it happens again, try cluster.cpus_per_worker=1, or "
        f"training.channels_last=false in a new run (stack: {trace})"
    )
