"""bench order: random order against windows of pages, for a beton larger than memory, with a cold page cache."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import Row, Side, compare
from benchmarks.photographs import write_photographs
from datasets.beton import PAGE_SIZE, TRAIN, beton_path, read_layout
from datasets.loading.loader import MultiResolutionLoader, RandomResizedCrop
from datasets.loading.order import PageWindows, SampleOrder, sample_indices
from datasets.prepare.prepare import prepare

NUM_IMAGES = 6144
TIMES_MEMORY = 4
"""The size of the beton, as a multiple of the memory."""
RANKS = (1, 2)
BATCH, SIDE = 64, 224


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """Measure all rows of the table, and return them with notes."""
    with TemporaryDirectory(prefix="bench-order-") as scratch, ExitStack() as stack:
        data = Path(scratch) / "data"
        prepare(
            "imagefolder",
            data,
            source=write_photographs(Path(scratch) / "images", images, NUM_IMAGES),
            validation_fraction=0.01,
        )
        beton = beton_path(data, TRAIN)
        memory = beton.stat().st_size // TIMES_MEMORY
        window = max(1, memory // PAGE_SIZE // 2)  # memory holds two: the one in use and the next

        def side(name: str, world_size: int, window_pages: int | None) -> Side:
            arguments = {"beton": str(beton), "memory": memory, "world_size": world_size, "window_pages": window_pages}
            return stack.enter_context(Side(f"{__name__}:{name}", arguments | {"threads": threads}, threads))

        rows = []
        for world_size in RANKS:
            of = f"rank 0 of {world_size}"
            for side_name, what in (("decoded", "decoded to 224"), ("read", "read only")):
                ours, peer = side(side_name, world_size, window), side(side_name, world_size, None)
                name = f"{what}, {of}, windows against random order"
                rows.append(compare(name, "images/s", ours.measure, peer.measure, runs))
    pages = memory * TIMES_MEMORY // PAGE_SIZE
    return rows, [
        f"{threads} threads, a beton of {pages} pages, memory for {memory // PAGE_SIZE}, windows of {window}",
        f"two images of a batch are in the same page with probability 1/{window} in windows, 1/{pages} in random order",
        "memory is limited by dropping the page cache each time that many bytes were read",
    ]


def decoded(beton: str, memory: int, world_size: int, window_pages: int | None, threads: int) -> Iterator[float]:
    """Yield the images/s that are read, decoded and resized, as in training."""
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
    mapped: Any = loader._decoder.mapped.base  # the only way to drop its pages

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
    """Yield the images/s that are only read, by one thread: the gain of the order if decoding is not the limit."""
    path = Path(beton)
    allocations = read_layout(path).allocations
    pages_N = allocations["ptr"].astype("int64") // PAGE_SIZE
    windows = PageWindows(pages_N, window_pages) if window_pages else None
    order = SampleOrder(len(pages_N), BATCH * world_size, shuffle=True, world_size=world_size, windows=windows)
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
    """Call `forget` at the start, and each time that `memory` bytes have been used since the last call."""

    def __init__(self, memory: int, forget: Callable[[], None]):
        self._memory, self._forget, self._used = memory, forget, 0
        forget()

    def use(self, size: int) -> None:
        """Count `size` bytes as used."""
        self._used += size
        if self._used > self._memory:
            self._forget()
            self._used = 0


def drop_cache(path: Path) -> None:
    """Make the system drop a file from its page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
