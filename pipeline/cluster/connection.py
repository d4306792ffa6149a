"""Which Ray cluster a job runs on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray


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
