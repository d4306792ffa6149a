"""Which Ray cluster a job runs on, and work in chunks as its tasks."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, WorkerCrashedError

from datasets.parallel import CHUNKS_AHEAD


@contextmanager
def ray_cluster() -> Iterator[None]:
    """The cluster to run on: one that is initialised, the one of RAY_ADDRESS (as in a Ray job), or a new local one.

    A cluster that merely runs on this machine is not joined: it may be the private one of another run, and end with it.
    """
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "WARNING"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        ray.init(address="local", include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


Work = TypeVar("Work")
Result = TypeVar("Result")


def map_on_cluster(function: Callable[[Work], Result], work: Iterable[Work], /) -> Generator[Result, None, None]:
    """Yield `function(item)` for every item of `work`, in order, each computed by a Ray task of one CPU.

    It connects to the cluster when the first item is asked for. As many tasks as CHUNKS_AHEAD for each CPU that the
    cluster has at the time are under way or wait to be taken, so memory does not grow with the work. A task whose
    worker or machine dies is run again, a few times.

    Raises:
        ChildProcessError: the workers of a task died again and again, for instance because memory ran out.
    """
    with ray_cluster():
        shipped, remaining = ray.put(function), iter(work)
        pending: deque[ray.ObjectRef] = deque()
        try:
            while True:
                wanted = CHUNKS_AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1))) - len(pending)
                pending.extend(_apply.remote(shipped, item) for item in islice(remaining, max(wanted, 0)))
                if not pending:
                    return
                yield ray.get(pending.popleft())
        except (WorkerCrashedError, ObjectLostError, OutOfMemoryError) as error:
            raise ChildProcessError(f"a Ray task was lost, and so was every attempt to run it again: {error}") from None
        finally:
            for task in pending:
                ray.cancel(task)


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def _apply(function: Callable[[Work], Result], item: Work) -> Result:
    return function(item)
