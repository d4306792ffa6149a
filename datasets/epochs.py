"""One pass over the data: batches decoded ahead by threads, into a ring of memory that is used again and again."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets import turbojpeg
from datasets.beton_file import PAGE_SIZE, checksum, read_jpeg, read_layout
from datasets.engine import Engine, Memory
from datasets.kernels import DECODED
from datasets.order import next_sample, sample_indices

logger = logging.getLogger(__name__)

MIN_ROWS = 4
"""fewest samples that are worth a thread's turn"""
SHOWN = 5
"""damaged samples that an error describes"""


@dataclass(frozen=True)
class Batch:
    """This rank's part of a batch; it may be empty.

    Attributes:
        images: side -> uint8 (N, side, side, 3) RGB: of each image the same crop at every side. Views of the loader's
            memory: valid until the next batch is asked for, and for what is queued by then on the CUDA stream that is
            current when it is asked for. Pinned where there is a GPU.
        labels: int64 (N,).
        indices: int64 (N,), of the samples in the beton.
    """

    images: dict[int, Tensor]
    labels: Tensor
    indices: Tensor


class DecodeError(ValueError):
    """JPEGs in a beton are damaged, more than may be."""


class Slot(NamedTuple):
    """Memory for one batch, and what must have finished on the GPU before it is written again."""

    memory: Memory
    last_use: torch.cuda.Event | None = None


class Job(NamedTuple):
    """A batch in the making."""

    slot: Slot
    views: np.ndarray
    parts: list[Future]


class Epoch(Iterator[Batch]):
    """Batches in order. Leaving the loop, an error, `close` or garbage collection end its threads and free its memory.

    Threads take parts of batches in order and go on to the next batch without waiting for each other. Nothing runs
    between a thread and the consumer that could fail unseen: asking for a batch waits for its parts, and raises what
    they raised.
    """

    def __init__(
        self,
        engine: Engine,
        beton: Path,
        sides: Sequence[int],
        wanted: Collection[int],
        batches: Sequence[np.ndarray],
        pages_ahead: Sequence[np.ndarray],
        num_threads: int,
        batches_ahead: int,
        max_damaged: int,
    ):
        self._engine, self._sides, self._wanted = engine, sides, wanted
        self._damage = DamageLimit(beton, max_damaged)
        self._num_threads = num_threads
        self._waiting = deque(zip(batches, pages_ahead, strict=True))
        self._jobs: deque[Job] = deque()
        self._held: Job | None = None
        num_slots = min(batches_ahead + 1, len(batches))  # one is with the consumer
        capacity = max((len(views) for views in batches), default=0)
        empty = {"image": [place for place, side in enumerate(sides) if side not in wanted]}
        memories = engine.allocate(capacity, num_slots, empty) if num_slots else []
        self._free = deque(Slot(memory) for memory in memories)
        threads = ThreadPoolExecutor(num_threads, thread_name_prefix="loader")
        self._threads = threads
        self._end_threads = weakref.finalize(self, threads.shutdown, wait=False, cancel_futures=True)
        self._submit()

    def __next__(self) -> Batch:
        self._release()
        self._submit()
        if not self._jobs:
            self.close()
            raise StopIteration
        job = self._jobs.popleft()
        try:
            for part in job.parts:
                part.result()
        except BaseException:
            self.close()
            raise
        self._held = job
        return self._batch(job)

    @property
    def damaged(self) -> dict[int, str]:
        """Samples that were found damaged so far, and what is wrong with them; others were shown in their place."""
        return dict(self._damage.found)

    def __enter__(self) -> Epoch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, which takes as long as the images that they are at, and free the memory."""
        self._end_threads()
        self._threads.shutdown(wait=True)
        self._release()
        for slot in self._free:
            if slot.last_use is not None:
                slot.last_use.synchronize()
        self._waiting.clear()
        self._jobs.clear()
        self._free.clear()

    def _release(self) -> None:
        """Take back the memory of the batch that the consumer had."""
        if self._held is None:
            return
        last_use = None
        if torch.cuda.is_initialized():
            last_use = torch.cuda.Event(blocking=True)
            last_use.record()
        self._free.append(Slot(self._held.slot.memory, last_use))
        self._held = None

    def _submit(self) -> None:
        """Hand as many batches to the threads as there is memory for."""
        while self._waiting and self._free:
            slot, (views, pages) = self._free.popleft(), self._waiting.popleft()
            if len(pages):
                self._threads.submit(self._engine.fetch, pages, PAGE_SIZE)
            rows = max(MIN_ROWS, -(-len(views) // self._num_threads))
            parts = [slice(first, min(first + rows, len(views))) for first in range(0, len(views), rows)]
            self._jobs.append(Job(slot, views, [self._decoded(slot, views, part) for part in parts]))

    def _decoded(self, slot: Slot, views: np.ndarray, rows: slice) -> Future[None]:
        return self._threads.submit(_decode, self._engine, slot, views, rows, self._damage)

    def _batch(self, job: Job) -> Batch:
        count = len(job.views)
        *images, _ = job.slot.memory["image"]
        return Batch(
            images={
                side: torch.from_numpy(image[:count])
                for side, image in zip(self._sides, images, strict=True)
                if side in self._wanted
            },
            labels=torch.from_numpy(job.slot.memory["label"][:count].copy()),
            indices=torch.from_numpy(sample_indices(job.views)),
        )


class DamageLimit:
    """Counts the damaged samples of a pass, from any thread, and ends it when there are more than allowed."""

    def __init__(self, beton: Path, most: int):
        self._beton, self._most = beton, most
        self._lock = threading.Lock()
        self.found: dict[int, str] = {}

    def count(self, index: int) -> None:
        """Note a damaged sample.

        Raises:
            DecodeError: the limit is passed.
        """
        reason = _damage(self._beton, index)
        with self._lock:
            if index in self.found:  # met again in the place of another
                return
            self.found[index] = reason
            if len(self.found) <= self._most:
                logger.warning("%s: damaged, another is shown in its place: %s", self._beton, reason)
                return
            allowed = f", and {self._most} may be (loader.max_damaged)" if self._most else ""
            raise DecodeError(
                f"{self._beton}: {_plural(len(self.found), 'sample is', 'samples are')} damaged{allowed}; restore the "
                "file, or prepare the data again with `python -m jobs.prepare --config CONFIG --force`:\n"
                + "\n".join(f"  {reason}" for reason in list(self.found.values())[:SHOWN])
            )


def _decode(engine: Engine, slot: Slot, views: np.ndarray, rows: slice, limit: DamageLimit) -> None:
    """Fill some rows of a slot; in `views`, a damaged sample becomes the next one of the beton that is not."""
    if slot.last_use is not None:
        slot.last_use.synchronize()
    engine.run(views, slot.memory, rows)
    *_, status_N = slot.memory["image"]
    for row in range(rows.start, rows.stop):
        while status_N[row] != DECODED:
            limit.count(int(sample_indices(views[row : row + 1])[0]))
            views[row : row + 1] = next_sample(views[row : row + 1], engine.num_samples)
            engine.run(views, slot.memory, slice(row, row + 1))


def _damage(beton: Path, index: int) -> str:
    """What is wrong with a sample; it is decoded once more, for the library's own words."""
    layout, jpeg = read_layout(beton), read_jpeg(beton, index)
    record, offset = layout.metadata["image"][index], int(layout.allocations["ptr"][index])
    try:
        header = turbojpeg.read_header(jpeg)
        turbojpeg.decode(jpeg, header)
        reason = (
            f"it is {header.width}x{header.height} in {header.colour_space.name}, "
            f"where its beton says {record['width']}x{record['height']} and it has to decode to RGB"
        )
    except turbojpeg.JpegError as error:
        reason = str(error)
    if checksum(jpeg) != layout.metadata["checksum"][index]:
        reason = "its bytes do not have their checksum"
    return f"sample {index}, a JPEG of {len(jpeg):,} bytes at offset {offset:,}: {reason}"


def _plural(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"
