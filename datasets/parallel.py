"""Run a function over chunks of work in processes, with ordered results, and show progress."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Work = TypeVar("Work")
Result = TypeVar("Result")

CHUNKS_AHEAD = 3


class OrderedMap(Protocol):
    """A function that yields `function(item)` for every item of `work`, in order, computed in parallel."""

    def __call__(
        self, function: Callable[[Work], Result], work: Iterable[Work], /
    ) -> Generator[Result, None, None]: ...


def available_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def map_ordered(
    function: Callable[[Work], Result], work: Iterable[Work], num_processes: int
) -> Generator[Result, None, None]:
    """Yield `function(item)` for every item of `work`, in order, computed by `num_processes` processes.

    At most CHUNKS_AHEAD results per process wait to be consumed, so memory does not grow with the work. Processes are
    spawned, never forked, because the caller may have threads. With one process, the caller does the work itself.

    Raises:
        ChildProcessError: a process died, for example because memory ran out.
    """
    if num_processes == 1:
        yield from map(function, work)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_start_process)
    remaining = iter(work)
    pending: deque[Future[Result]] = deque()
    try:
        while True:
            wanted = CHUNKS_AHEAD * num_processes - len(pending)
            pending.extend(pool.submit(function, item) for item in islice(remaining, wanted))
            if not pending:
                return
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError(
            f"one of {num_processes} processes died; if memory ran out, lower data.num_processes"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_process() -> None:
    # Ctrl-C reaches the whole process group; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # If the parent is killed, nothing that the pool's processes wait for is closed, so they would wait forever.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed or 0
        return Text(f"{rate:,.0f} images/s")


@contextmanager
def progress_bar(description: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error and yield the function that advances it by a number of images.

    If standard error is a log file, only the final state is printed.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)
