"""The training loader: the same crop of each image at every resolution, reproducible to the bit and resumable.

It has three parts: the crops, the decoder that turns sample keys into cropped images, and the threads that run it.
"""

from __future__ import annotations

import logging
import math
import os
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
from datasets.loading.kernels import CHANGED, DECODED, crop_boxes, decode_boxes, mark_changed
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
"""The smallest number of samples that a thread takes at a time."""
SHOWN = 5
"""The largest number of damaged samples that an error describes."""


@dataclass(frozen=True)
class Batch:
    """This rank's part of a batch, which may be empty.

    Attributes:
        images: maps a side to uint8 (N, side, side, 3) RGB, the same crop of each image at every side. The arrays are
            slices of the loader's memory, pinned if there is a GPU, and valid until the next batch is requested. Work
            that was queued on the current CUDA stream before that still reads these pixels.
        labels: int64 (N,).
        indices: int64 (N,), positions of the samples in the beton.
    """

    images: dict[int, Tensor]
    labels: Tensor
    indices: Tensor


class DecodeError(ValueError):
    """More JPEGs of a beton are damaged than `max_damaged` allows."""


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, stretched to a square, with the distribution of torchvision's RandomResizedCrop.

    Attributes:
        scale: range of the crop's area, as a fraction of the image's area.
        ratio: range of the crop's width / height; its logarithm is uniform.
        flip: mirror half of the crops.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the ranges."""
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            yield f"the crop's scale is {tuple(self.scale)}; give 0 < low <= high <= 1"
        if not 0 < self.ratio[0] <= self.ratio[1]:
            yield f"the crop's ratio is {tuple(self.ratio)}; give 0 < low <= high"

    def parameters(self) -> tuple[float, ...]:
        """Return the argument `crop` of kernels.crop_box."""
        (low, high), (narrow, wide) = self.scale, self.ratio
        return float(low), float(high), math.log(narrow), math.log(wide), 0.5 * self.flip, 0.0


@dataclass(frozen=True)
class CenterCrop:
    """The central square whose side is `fraction` of the shorter side: 224 of 256 in the paper."""

    fraction: float = 0.875

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the fraction."""
        if not 0 < self.fraction <= 1:
            yield f"the crop's fraction is {self.fraction}; give 0 < fraction <= 1"

    def parameters(self) -> tuple[float, ...]:
        """Return the argument `crop` of kernels.crop_box."""
        return 0.0, 0.0, 0.0, 0.0, 0.0, float(self.fraction)


class Memory:
    """The memory of one batch: a block of bytes for the crops of all wanted sides, pinned if there is a GPU.

    Attributes:
        images: maps a wanted side to uint8 (N, side, side, 3), a slice of the block.
        labels_N: int64.
        status_N: uint8, kernels.DECODED or what is wrong with a sample.
        pixels: the block, uint8.
        starts_R: int64, where the images of each side start in the block; -1 for a side that is not wanted.
    """

    def __init__(self, sides: Sequence[int], wanted: Collection[int], batch_size: int):
        sizes = [batch_size * side * side * 3 if side in wanted else 0 for side in sides]
        block = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        starts = np.cumsum([0, *sizes[:-1]])
        self.pixels: NDArray[np.uint8] = block.numpy()
        self.starts_R = np.where(np.array(sizes) > 0, starts, -1)
        self.images = {
            side: self.pixels[start : start + size].reshape(batch_size, side, side, 3)
            for side, start, size in zip(sides, starts, sizes, strict=True)
            if side in wanted
        }
        self.labels_N = np.empty(batch_size, np.int64)
        self.status_N = np.empty(batch_size, np.uint8)


class Decoder:
    """Decode samples of a beton: one decode and one crop of each JPEG, resized to every side.

    The file is memory-mapped, so the processes of a node share the system's page cache. `run` is thread-safe.
    """

    def __init__(self, beton: Path, sides: Sequence[int], crop: RandomResizedCrop | CenterCrop):
        layout = read_layout(beton)
        self.num_samples = len(layout.metadata)
        self._beton, self._sides, self._crop = beton, tuple(sides), crop.parameters()
        self._metadata = layout.metadata
        self._offsets = layout.allocations["ptr"].astype(np.int64)
        self._sizes = layout.allocations["size"].astype(np.int64)
        self._checksums = layout.metadata["checksum"].view(np.uint64)
        self.mapped = np.memmap(beton, np.uint8, "r")
        self._storage = np.asarray(self.mapped)

    def fetch(self, pages: Iterable[int]) -> None:
        """Ask the system to read pages of the beton into its cache, without waiting for them."""
        with self._beton.open("rb") as file:
            for page in pages:
                os.posix_fadvise(file.fileno(), page * PAGE_SIZE, PAGE_SIZE, os.POSIX_FADV_WILLNEED)

    def run(self, keys: NDArray[np.uint64], memory: Memory, rows: slice) -> None:
        """Decode the samples `keys[rows]` into the same rows of `memory`.

        The pixels of a side do not depend on which other sides are wanted.
        """
        keys_N = keys[rows]
        indices_N = sample_indices(keys_N)
        records_N = self._metadata["image"][indices_N]
        offsets_N, sizes_N = self._offsets[indices_N], self._sizes[indices_N]
        shapes_N2 = np.stack([records_N["height"], records_N["width"]], axis=1).astype(np.int64)
        boxes_N5 = crop_boxes(keys_N, shapes_N2, self._crop)
        sides_R, status_N = np.array(self._sides), memory.status_N[rows]
        starts_R = np.where(memory.starts_R < 0, -1, memory.starts_R + rows.start * 3 * sides_R**2)
        memory.labels_N[rows] = self._metadata["label"][indices_N]
        status_N[:] = DECODED
        mark_changed(self._storage, offsets_N, sizes_N, self._checksums[indices_N], status_N, CHANGED)
        decode_boxes(self._storage, offsets_N, sizes_N, shapes_N2, boxes_N5, sides_R, memory.pixels, starts_R, status_N)


class Slot(NamedTuple):
    """The memory of one batch, and the GPU event to wait for before it is written again."""

    memory: Memory
    last_use: torch.cuda.Event | None = None


class Job(NamedTuple):
    """A batch that threads are decoding."""

    slot: Slot
    keys: np.ndarray
    parts: list[Future]


class BatchIterator(Iterator[Batch]):
    """A pass over batches in order. The end of the pass, an error, `close` or garbage collection stop its threads.

    Threads take parts of batches in order and continue with the next batch without waiting for each other. No error is
    lost: requesting a batch waits for its parts, and raises their errors.
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
        self._damage = DamageLimit(beton, max_damaged, decoder.num_samples)
        self._num_threads = num_threads
        self._waiting = deque(zip(batches, pages_ahead, strict=True))
        self._jobs: deque[Job] = deque()
        self._held: Job | None = None
        num_slots = min(batches_ahead + 1, len(batches))  # the consumer has one of them
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

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads, which finish their current images, and free the memory."""
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
        """Take back the memory of the consumer's last batch."""
        if self._held is None:
            return
        last_use = None
        if torch.cuda.is_initialized():
            last_use = torch.cuda.Event(blocking=True)
            last_use.record()
        self._free.append(Slot(self._held.slot.memory, last_use))
        self._held = None

    def _submit(self) -> None:
        """Give the threads as many batches as there is memory for."""
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
    """Count the damaged samples of a pass, from any thread, and raise an error if there are too many.

    If all of `num_samples` are damaged, there are too many, because nothing can replace them.
    """

    def __init__(self, beton: Path, most: int, num_samples: int):
        self._beton, self._most, self._num_samples = beton, most, num_samples
        self._lock = threading.Lock()
        self.found: dict[int, str] = {}

    def count(self, index: int) -> None:
        """Count a damaged sample.

        Raises:
            DecodeError: there are more than allowed.
        """
        reason = _damage(self._beton, index)
        with self._lock:
            is_new = index not in self.found  # otherwise it was also tried as a replacement for another sample
            self.found.setdefault(index, reason)
            if len(self.found) <= min(self._most, self._num_samples - 1):
                if is_new:
                    logger.warning("%s: a damaged sample is replaced by another: %s", self._beton, reason)
                return
            allowed = f", but loader.max_damaged is {self._most}" if 0 < self._most < len(self.found) else ""
            raise DecodeError(
                f"{self._beton}: {_plural(len(self.found), 'sample is', 'samples are')} damaged{allowed}; restore the "
                "file, or prepare the data again with `python -m jobs.prepare --config CONFIG --force`:\n"
                + "\n".join(f"  {reason}" for reason in list(self.found.values())[:SHOWN])
            )


def _decode(decoder: Decoder, slot: Slot, keys: np.ndarray, rows: slice, limit: DamageLimit) -> None:
    """Fill some rows of a slot. In `keys`, each damaged sample is replaced by the next undamaged one of the beton."""
    if slot.last_use is not None:
        slot.last_use.synchronize()
    decoder.run(keys, slot.memory, rows)
    for row in range(rows.start, rows.stop):
        while slot.memory.status_N[row] != DECODED:
            limit.count(int(sample_indices(keys[row : row + 1])[0]))
            keys[row : row + 1] = next_sample(keys[row : row + 1], decoder.num_samples)
            decoder.run(keys, slot.memory, slice(row, row + 1))


def _damage(beton: Path, index: int) -> str:
    """Describe what is wrong with a sample. The sample is decoded again to get the library's message."""
    layout, jpeg = read_layout(beton), read_jpeg(beton, index)
    record, offset = layout.metadata["image"][index], int(layout.allocations["ptr"][index])
    try:
        header = turbojpeg.read_header(jpeg)
        turbojpeg.decode(jpeg, header)
        reason = (
            f"it is {header.width}x{header.height} in {header.color_space.name}, "
            f"but its beton says {record['width']}x{record['height']}, and it must decode to RGB"
        )
    except turbojpeg.JpegError as error:
        reason = str(error)
    if checksum(jpeg) != layout.metadata["checksum"][index]:
        reason = "its bytes do not match their checksum"
    return f"sample {index}, a JPEG of {len(jpeg):,} bytes at offset {offset:,}: {reason}"


def _plural(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


class MultiResolutionLoader:
    """Read batches from a beton. Each image is decoded once and cropped once for all sides.

    The pixels of a sample depend only on (seed, epoch, sample index) and the crop. The batches over all ranks depend
    only on (seed, epoch, batch_size). So both are the same for any number of ranks and threads, and after a resume.

    Args:
        beton: a file that jobs.prepare wrote.
        sides: sizes of the images in pixels; the largest decides the scale of JPEG decoding.
        batch_size: images per batch over all ranks. The batches of an epoch differ by at most one image.
        crop: the part of each image that is shown.
        shuffle: use a new order every epoch; otherwise the order of the beton.
        seed: seed of the order and the crops.
        rank, world_size: which part of each batch this loader reads. A part may be empty. Every rank takes the same
            number of steps, and an epoch has every sample exactly once over all ranks.
        num_threads: decoding threads, separate from the threads of torch and numba.
        batches_ahead: batches that are prepared before they are requested.
        window_pages: shuffle within windows of this many pages of beton.PAGE_SIZE bytes, for a beton that does not fit
            into memory (order.PageWindows); None shuffles over the whole beton.
        max_damaged: how many samples of a pass may be damaged. Each is replaced by the next sample of the beton, and
            `Batch.indices` has the index of the replacement. One more raises DecodeError.

    Raises:
        ValueError: lists everything that is wrong with the arguments.
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
            raise ValueError(f"{self.beton} has {self.num_samples} samples; a loader reads 1 to {MAX_SAMPLES - 1}")
        pages_N = layout.allocations["ptr"].astype(np.int64) // PAGE_SIZE
        windows = PageWindows(pages_N, window_pages) if window_pages else None
        self._order = SampleOrder(
            self.num_samples, batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size, windows=windows
        )
        self._decoder = Decoder(self.beton, self.sides, crop)
        self._settings, self._max_damaged = (num_threads, batches_ahead), max_damaged
        self._started: weakref.WeakSet[BatchIterator] = weakref.WeakSet()

    @property
    def num_batches(self) -> int:
        """The number of steps of an epoch, the same on every rank."""
        return self._order.num_batches

    def global_size(self, step: int) -> int:
        """Return the number of images of batch `step` over all ranks."""
        first, last = batch_bounds(self.num_samples, self._order.batch_size, step)
        return last - first

    def epoch(
        self, epoch: int, start_step: int = 0, *, crop_epoch: int | None = None, sides: Collection[int] | None = None
    ) -> BatchIterator:
        """Start a pass over the data. The result is an iterator of batches and a context manager.

        Args:
            epoch: from 0; decides the order, and the crops if `crop_epoch` is None.
            start_step: the first batch to read; earlier ones are skipped without reading them.
            crop_epoch: show the crops of this epoch instead.
            sides: the wanted sides, all by default. Unwanted sides cost no memory and no resizing, and do not change
                the pixels of the wanted ones.

        Raises:
            ValueError: an argument is out of range, or a side is not one of the loader's.
            DecodeError: raised during iteration, when it reaches a damaged JPEG.
        """
        crop_epoch = epoch if crop_epoch is None else crop_epoch
        if min(epoch, crop_epoch) < 0 or not 0 <= start_step <= self.num_batches:
            raise ValueError(
                f"epoch {epoch}, crop_epoch {crop_epoch} or start_step {start_step} is out of range: "
                f"give epochs of 0 or more, and a step of 0 to {self.num_batches}"
            )
        batches, pages = self._order.batches(epoch, start_step, crop_epoch), self._order.pages_ahead(epoch, start_step)
        return self._start(batches, pages, sides, self._max_damaged)

    def read(
        self, crop_epoch: int, batches: Iterable[NDArray[np.int64]], *, sides: Collection[int] | None = None
    ) -> BatchIterator:
        """Start a pass over the given batches of samples, which are not divided among the ranks.

        A damaged sample always raises an error, whatever `max_damaged` is, because callers store the result under the
        sample's index.

        Args:
            crop_epoch: the epoch whose crops are shown.
            batches: sample indices, int64 (N,) each.
            sides: as in `epoch`.

        Raises:
            ValueError: `crop_epoch` or an index is out of range, or a side is not one of the loader's.
            DecodeError: as in `epoch`.
        """
        given = [np.asarray(indices_N, np.int64) for indices_N in batches]
        outside = [int(indices_N[n]) for indices_N in given for n in np.flatnonzero(indices_N // self.num_samples)]
        if crop_epoch < 0 or outside:
            raise ValueError(
                f"crop_epoch {crop_epoch} or samples {outside[:5]} are out of range: give a crop_epoch of 0 or more, "
                f"and samples of {self.beton} from 0 to {self.num_samples - 1}"
            )
        keys = [pack_keys(indices_N, self._order.seed, crop_epoch) for indices_N in given]
        return self._start(keys, [np.empty(0, np.int64)] * len(keys), sides, max_damaged=0)

    def _start(
        self,
        batches: Sequence[NDArray[np.uint64]],
        pages_ahead: Sequence[NDArray[np.int64]],
        sides: Collection[int] | None,
        max_damaged: int,
    ) -> BatchIterator:
        wanted = self.sides if sides is None else tuple(sides)
        if not wanted or not {*wanted} <= {*self.sides}:
            raise ValueError(f"the loader has no sides {list(wanted)}; give one or more of {list(self.sides)}")
        started = BatchIterator(
            self._decoder, self.beton, self.sides, wanted, batches, pages_ahead, *self._settings, max_damaged
        )
        self._started.add(started)
        return started

    def close(self) -> None:
        """Stop every pass that is still running."""
        for epoch in list(self._started):
            epoch.close()


def _problems(sides: tuple[int, ...], counts: dict[str, tuple[int, int]], rank: int, world_size: int) -> Iterator[str]:
    if not sides or min(sides) < 1 or len(set(sides)) < len(sides):
        yield f"sides is {list(sides)}; give different positive sizes, at least one"
    for name, (count, lowest) in counts.items():
        if count < lowest:
            yield f"{name} is {count}; give {lowest} or more"
    if not 0 <= rank < world_size:
        yield f"rank is {rank} of world_size {world_size}; give 0 <= rank < world_size"
