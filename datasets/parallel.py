"""Run a function over chunks of work in processes, results in the order of the work; and show progress."""

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
    """Yields `function(item)` for every item of `work`, in order, computed somewhere in parallel."""

    def __call__(
        self, function: Callable[[Work], Result], work: Iterable[Work], /
    ) -> Generator[Result, None, None]: ...


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def map_ordered(
    function: Callable[[Work], Result], work: Iterable[Work], num_processes: int
) -> Generator[Result, None, None]:
    """Yield `function(item)` for every item of `work`, in order, computed by `num_processes` processes.

    At most CHUNKS_AHEAD results for each process wait to be taken, so memory does not grow with the work. The
    processes are spawned, never forked, because the caller may have threads. One process means this one.

    Raises:
        ChildProcessError: a process died, for instance because memory ran out.
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
            f"one of {num_processes} processes died; if memory ran out, set data.num_processes to fewer"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_process() -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A killed parent closes nothing that the pool's processes wait for, so they would wait for ever.
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
    """Yield a function that is told how many more images are done. On standard error; only its end in a log file."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)
