"""Work in chunks as Ray tasks: on any machine of the cluster, the results in the order of the work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from itertools import islice
from typing import TypeVar

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, WorkerCrashedError

from datasets.parallel import CHUNKS_AHEAD
from pipeline.cluster.connection import ray_cluster

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
