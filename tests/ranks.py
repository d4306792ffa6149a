"""Ranks of a process group as real processes, forked from a server that has imported torch and Ray once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

# The server imports these modules once, so that ranks need not. It ends with this process.
multiprocessing.set_forkserver_preload(["pipeline.cluster.checkpoints", "tests.small", "tests.table_runs"])


def run_ranks(work: Callable[..., None], world_size: int, *args: Any) -> None:
    """Run `work(rank, world_size, *args)` in `world_size` processes.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the first rank that failed; the others are
            ended.
    """
    torch.multiprocessing.start_processes(work, (world_size, *args), nprocs=world_size, start_method="forkserver")
