"""Connect a job to its Ray cluster, and run work on it as tasks."""

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
    """Connect to the cluster that is initialized, else to the one of RAY_ADDRESS, else start a private local one.

    Ray sets RAY_ADDRESS inside a Ray job. A cluster that only happens to run on this machine is not joined: it may be
    the private cluster of another run, and would end with it.
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

    It connects to the cluster when the first item is requested. At most CHUNKS_AHEAD tasks for each CPU of the cluster
    are running or waiting, so memory does not grow with the work. Ray retries a task whose worker or machine dies.

    Raises:
        ChildProcessError: the workers of a task died repeatedly, for instance because memory ran out.
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
            raise ChildProcessError(f"A Ray task failed, and so did every retry: {error}") from None
        finally:
            for task in pending:
                ray.cancel(task)


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def _apply(function: Callable[[Work], Result], item: Work) -> Result:
    return function(item)
