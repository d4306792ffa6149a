"""The loader: the same crop of each image at every resolution, reproducible to the bit, sharded and resumable."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets import turbojpeg
from datasets.beton import PAGE_SIZE, checksum, read_jpeg, read_layout
from datasets.loading.decode import CenterCrop, Decoder, Memory, RandomResizedCrop
from datasets.loading.kernels import DECODED
from datasets.loading.order import (
    MAX_SAMPLES,
    PageWindows,
    SampleOrder,
    batch_bounds,
    next_sample,
    pack_keys,
    sample_indices,
)

logger = logging.getLogger(__name__)

MIN_ROWS = 4
"""fewest samples that are worth a thread's turn"""
SHOWN = 5
"""damaged samples that an error describes"""


@dataclass(frozen=True)
class Batch:
    """This rank's part of a batch; it may be empty.

    Attributes:
        images: side -> uint8 (N, side, side, 3) RGB: of each image the same crop at every side. Slices of the loader's
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
    keys: np.ndarray
    parts: list[Future]


class Epoch(Iterator[Batch]):
    """Batches in order. Leaving the loop, an error, `close` or garbage collection end its threads and free its memory.

    Threads take parts of batches in order and go on to the next batch without waiting for each other. Nothing runs
    between a thread and the consumer that could fail unseen: asking for a batch waits for its parts, and raises what
    they raised.
    """

    def __init__(
        self,
        decoder: Decoder,
        beton: Path,
        sides: Sequence[int],
        wanted: Collection[int],
        batches: Sequence[np.ndarray],
        pages_ahead: Sequence[np.ndarray],
        num_threads: int,
        batches_ahead: int,
        max_damaged: int,
    ):
        self._decoder = decoder
        self._damage = DamageLimit(beton, max_damaged)
        self._num_threads = num_threads
        self._waiting = deque(zip(batches, pages_ahead, strict=True))
        self._jobs: deque[Job] = deque()
        self._held: Job | None = None
        num_slots = min(batches_ahead + 1, len(batches))  # one is with the consumer
        capacity = max((len(keys) for keys in batches), default=0)
        self._free = deque(Slot(Memory(sides, wanted, capacity)) for _ in range(num_slots))
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
            slot, (keys, pages) = self._free.popleft(), self._waiting.popleft()
            if len(pages):
                self._threads.submit(self._decoder.fetch, pages)
            rows = max(MIN_ROWS, -(-len(keys) // self._num_threads))
            parts = [slice(first, min(first + rows, len(keys))) for first in range(0, len(keys), rows)]
            self._jobs.append(Job(slot, keys, [self._decoded(slot, keys, part) for part in parts]))

    def _decoded(self, slot: Slot, keys: np.ndarray, rows: slice) -> Future[None]:
        return self._threads.submit(_decode, self._decoder, slot, keys, rows, self._damage)

    def _batch(self, job: Job) -> Batch:
        count = len(job.keys)
        memory = job.slot.memory
        return Batch(
            images={side: torch.from_numpy(images[:count]) for side, images in memory.images.items()},
            labels=torch.from_numpy(memory.labels_N[:count].copy()),
            indices=torch.from_numpy(sample_indices(job.keys)),
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


def _decode(decoder: Decoder, slot: Slot, keys: np.ndarray, rows: slice, limit: DamageLimit) -> None:
    """Fill some rows of a slot; in `keys`, a damaged sample becomes the next one of the beton that is not."""
    if slot.last_use is not None:
        slot.last_use.synchronize()
    decoder.run(keys, slot.memory, rows)
    for row in range(rows.start, rows.stop):
        while slot.memory.status_N[row] != DECODED:
            limit.count(int(sample_indices(keys[row : row + 1])[0]))
            keys[row : row + 1] = next_sample(keys[row : row + 1], decoder.num_samples)
            decoder.run(keys, slot.memory, slice(row, row + 1))


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


__all__ = ["Batch", "CenterCrop", "DecodeError", "MultiResolutionLoader", "RandomResizedCrop"]


class MultiResolutionLoader:
    """Batches of a beton, with each image decoded once and cropped once for all sides.

    The pixels of a sample are a function of (seed, epoch, sample index) and the crop alone, and the batches over all
    ranks of (seed, epoch, batch_size), so neither depends on ranks, threads or where a run was resumed.

    Args:
        beton: a file that jobs.prepare wrote.
        sides: the sizes in pixels at which images can be asked for; the largest says how finely JPEGs are decoded.
        batch_size: of all ranks together. Batches of an epoch differ by at most one image.
        crop: what is seen of each image.
        shuffle: a new order every epoch; otherwise the order of the beton.
        seed: of the order and the crops.
        rank, world_size: which part of each batch this loader reads. A part may be empty; every rank takes the same
            number of steps, and over all ranks an epoch has every sample exactly once.
        num_threads: that decode. They are the loader's own: the thread counts of torch and numba stay as they are.
        batches_ahead: batches that are prepared before they are asked for.
        window_pages: shuffle within windows of so many pages of the beton, beton_file.PAGE_SIZE each, for one that does
            not fit into memory (order.PageWindows); None shuffles over all of it.
        max_damaged: samples that a pass may find damaged; the next ones of the beton are shown in their place, and are
            what `Batch.indices` says. One more is a DecodeError.

    Raises:
        ValueError: with everything that is wrong with the arguments.
        BetonError: the beton is missing, damaged or of another layout.
    """

    def __init__(
        self,
        beton: Path,
        sides: Iterable[int],
        batch_size: int,
        *,
        crop: RandomResizedCrop | CenterCrop,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_threads: int = 1,
        batches_ahead: int = 3,
        window_pages: int | None = None,
        max_damaged: int = 0,
    ):
        self.beton = Path(beton)
        self.sides = tuple(sides)
        counts = {
            "batch_size": (batch_size, 1),
            "num_threads": (num_threads, 1),
            "batches_ahead": (batches_ahead, 1),
            "window_pages": (1 if window_pages is None else window_pages, 1),
            "max_damaged": (max_damaged, 0),
        }
        problems = [*_problems(self.sides, counts, rank, world_size), *crop.problems()]
        if problems:
            raise ValueError("\n".join(["the loader cannot be built:", *(f"  - {problem}" for problem in problems)]))
        layout = read_layout(self.beton)
        self.num_samples = len(layout.metadata)
        if not 0 < self.num_samples < MAX_SAMPLES:
            raise ValueError(f"{self.beton} has {self.num_samples} samples; a loader takes 1 to {MAX_SAMPLES - 1}")
        pages_N = layout.allocations["ptr"].astype(np.int64) // PAGE_SIZE
        windows = PageWindows(pages_N, window_pages) if window_pages else None
        self._order = SampleOrder(
            self.num_samples, batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size, windows=windows
        )
        self._decoder = Decoder(self.beton, self.sides, crop)
        self._settings, self._max_damaged = (num_threads, batches_ahead), max_damaged
        self._epochs: weakref.WeakSet[Epoch] = weakref.WeakSet()

    @property
    def num_batches(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return self._order.num_batches

    def global_size(self, step: int) -> int:
        """Images of batch `step` over all ranks."""
        first, last = batch_bounds(self.num_samples, self._order.batch_size, step)
        return last - first

    def epoch(
        self, epoch: int, start_step: int = 0, *, crop_epoch: int | None = None, sides: Collection[int] | None = None
    ) -> Epoch:
        """Begin a pass over the data, to iterate over (an iterator that is also a context manager).

        Args:
            epoch: from 0; keys the order, and the crops where `crop_epoch` is None.
            start_step: the first batch to give; those before it are not read.
            crop_epoch: show the crops of this epoch instead.
            sides: those that are wanted, all by default. The others cost no memory and no resizing, and those that
                are wanted show the same pixels.

        Raises:
            ValueError: an argument is out of range, or a side is not one of the loader's.
            DecodeError: from the iteration, when it comes to a damaged JPEG.
        """
        crop_epoch = epoch if crop_epoch is None else crop_epoch
        if min(epoch, crop_epoch) < 0 or not 0 <= start_step <= self.num_batches:
            raise ValueError(
                f"epoch {epoch}, crop_epoch {crop_epoch}, start_step {start_step}: "
                f"epochs and keys are 0 or more, a step 0 to {self.num_batches}"
            )
        batches, pages = self._order.batches(epoch, start_step, crop_epoch), self._order.pages_ahead(epoch, start_step)
        return self._start(batches, pages, sides, self._max_damaged)

    def read(
        self, crop_epoch: int, batches: Iterable[NDArray[np.int64]], *, sides: Collection[int] | None = None
    ) -> Epoch:
        """Begin a pass over given samples, in the given batches; what is given is not shared out over the ranks.

        What is read so is kept under the sample's number, so nothing is shown in place of a damaged one, whatever
        `max_damaged` says.

        Args:
            crop_epoch: the epoch whose crops are shown.
            batches: sample indices, (N,) each.
            sides: as in `epoch`.

        Raises:
            ValueError: `crop_epoch` or an index is out of range, or a side is not one of the loader's.
            DecodeError: as in `epoch`.
        """
        given = [np.asarray(indices_N, np.int64) for indices_N in batches]
        outside = [int(indices_N[n]) for indices_N in given for n in np.flatnonzero(indices_N // self.num_samples)]
        if crop_epoch < 0 or outside:
            raise ValueError(
                f"crop_epoch {crop_epoch}, samples {outside[:5]}: a crop_epoch is 0 or more, a sample of {self.beton} "
                f"0 to {self.num_samples - 1}"
            )
        keys = [pack_keys(indices_N, self._order.seed, crop_epoch) for indices_N in given]
        return self._start(keys, [np.empty(0, np.int64)] * len(keys), sides, max_damaged=0)

    def _start(
        self,
        batches: Sequence[NDArray[np.uint64]],
        pages_ahead: Sequence[NDArray[np.int64]],
        sides: Collection[int] | None,
        max_damaged: int,
    ) -> Epoch:
        wanted = self.sides if sides is None else tuple(sides)
        if not wanted or not {*wanted} <= {*self.sides}:
            raise ValueError(f"sides {list(wanted)} are wanted; give one or more of the loader's, {list(self.sides)}")
        started = Epoch(
            self._decoder, self.beton, self.sides, wanted, batches, pages_ahead, *self._settings, max_damaged
        )
        self._epochs.add(started)
        return started

    def close(self) -> None:
        """End every pass that is still going on."""
        for epoch in list(self._epochs):
            epoch.close()


def _problems(sides: tuple[int, ...], counts: dict[str, tuple[int, int]], rank: int, world_size: int) -> Iterator[str]:
    if not sides or min(sides) < 1 or len(set(sides)) < len(sides):
        yield f"sides is {list(sides)}; give different positive sizes, at least one"
    for name, (count, lowest) in counts.items():
        if count < lowest:
            yield f"{name} is {count}; give {lowest} or more"
    if not 0 <= rank < world_size:
        yield f"rank is {rank} of world_size {world_size}; give 0 <= rank < world_size"
