"""Sides of bench order: images/s of an epoch that begins with a cold page cache and has only so much of it."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from datasets.beton_file import PAGE_SIZE, read_layout
from datasets.loader import MultiResolutionLoader, RandomResizedCrop
from datasets.order import PageWindows, ViewOrder, sample_indices

BATCH, SIDE = 64, 224


def decoded(beton: str, memory: int, world_size: int, window_pages: int | None, threads: int) -> Iterator[float]:
    """Read, decoded and resized, as in training."""
    path = Path(beton)
    loader = MultiResolutionLoader(
        path,
        [SIDE],
        BATCH * world_size,
        crop=RandomResizedCrop(),
        shuffle=True,
        world_size=world_size,
        num_threads=threads,
        window_pages=window_pages,
    )
    sizes_N = read_layout(path).allocations["size"]
    mapped: mmap.mmap = loader._engine._storage.state[0].base  # there is no other way to have its pages dropped

    def forget() -> None:
        mapped.madvise(mmap.MADV_DONTNEED)
        drop_cache(path)

    epoch = 0
    while True:
        limit = Limit(memory, forget)
        start, count = time.perf_counter(), 0
        for batch in loader.epoch(epoch):
            count += len(batch.indices)
            limit.use(int(sizes_N[batch.indices.numpy()].sum()))
        yield count / (time.perf_counter() - start)
        epoch += 1


def read(beton: str, memory: int, world_size: int, window_pages: int | None, threads: int) -> Iterator[float]:
    """Read alone, by one thread: what the order is worth where decoding is not what takes the time."""
    path = Path(beton)
    allocations = read_layout(path).allocations
    pages_N = allocations["ptr"].astype("int64") // PAGE_SIZE
    windows = PageWindows(pages_N, window_pages) if window_pages else None
    order = ViewOrder(len(pages_N), BATCH * world_size, shuffle=True, world_size=world_size, windows=windows)
    epoch = 0
    with path.open("rb") as file:
        while True:
            limit = Limit(memory, lambda: drop_cache(path))
            start, count = time.perf_counter(), 0
            for views, pages in zip(order.batches(epoch), order.pages_ahead(epoch), strict=True):
                for page in pages:
                    os.posix_fadvise(file.fileno(), page * PAGE_SIZE, PAGE_SIZE, os.POSIX_FADV_WILLNEED)
                for index in sample_indices(views):
                    _, ptr, size = allocations[index]
                    limit.use(len(os.pread(file.fileno(), int(size), int(ptr))))
                    count += 1
            yield count / (time.perf_counter() - start)
            epoch += 1


class Limit:
    """Forgets everything at the start, and whenever `memory` bytes were used since."""

    def __init__(self, memory: int, forget: Callable[[], None]):
        self._memory, self._forget, self._used = memory, forget, 0
        forget()

    def use(self, size: int) -> None:
        self._used += size
        if self._used > self._memory:
            self._forget()
            self._used = 0


def drop_cache(path: Path) -> None:
    """Have the system forget what it holds of a file in memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
