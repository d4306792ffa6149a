"""The loader: the same crop of each image at every resolution, reproducible to the bit, sharded and resumable."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datasets.beton_file import PAGE_SIZE, read_layout
from datasets.crops import CenterCrop, LabelDecoder, MultiResolutionDecoder, RandomResizedCrop
from datasets.engine import Engine
from datasets.epochs import Batch, DecodeError, Epoch
from datasets.order import MAX_SAMPLES, PageWindows, ViewOrder, batch_bounds, pack_views

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
        self._order = ViewOrder(
            self.num_samples, batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size, windows=windows
        )
        checksums = layout.metadata["checksum"].view(np.uint64)
        decoders = {"image": MultiResolutionDecoder(self.sides, crop, checksums), "label": LabelDecoder()}
        self._engine = Engine(self.beton, self._order, layout.metadata.dtype.names or (), decoders)
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
        self, epoch: int, start_step: int = 0, *, view: int | None = None, sides: Collection[int] | None = None
    ) -> Epoch:
        """Begin a pass over the data, to iterate over (an iterator that is also a context manager).

        Args:
            epoch: from 0; keys the order, and the crops where `view` is None.
            start_step: the first batch to give; those before it are not read.
            view: show the crops of this epoch instead.
            sides: those that are wanted, all by default. The others cost no memory and no resizing, and those that
                are wanted show the same pixels.

        Raises:
            ValueError: an argument is out of range, or a side is not one of the loader's.
            DecodeError: from the iteration, when it comes to a damaged JPEG.
        """
        view = epoch if view is None else view
        if min(epoch, view) < 0 or not 0 <= start_step <= self.num_batches:
            raise ValueError(
                f"epoch {epoch}, view {view}, start_step {start_step}: "
                f"epochs and views are 0 or more, a step 0 to {self.num_batches}"
            )
        batches, pages = self._order.batches(epoch, start_step, view), self._order.pages_ahead(epoch, start_step)
        return self._start(batches, pages, sides, self._max_damaged)

    def read(self, view: int, batches: Iterable[NDArray[np.int64]], *, sides: Collection[int] | None = None) -> Epoch:
        """Begin a pass over given samples, in the given batches; what is given is not shared out over the ranks.

        What is read so is kept under the sample's number, so nothing is shown in place of a damaged one, whatever
        `max_damaged` says.

        Args:
            view: the epoch whose crops are shown.
            batches: sample indices, (N,) each.
            sides: as in `epoch`.

        Raises:
            ValueError: `view` or an index is out of range, or a side is not one of the loader's.
            DecodeError: as in `epoch`.
        """
        given = [np.asarray(indices_N, np.int64) for indices_N in batches]
        outside = [int(indices_N[n]) for indices_N in given for n in np.flatnonzero(indices_N // self.num_samples)]
        if view < 0 or outside:
            raise ValueError(
                f"view {view}, samples {outside[:5]}: a view is 0 or more, a sample of {self.beton} "
                f"0 to {self.num_samples - 1}"
            )
        views = [pack_views(indices_N, self._order.seed, view) for indices_N in given]
        return self._start(views, [np.empty(0, np.int64)] * len(views), sides, max_damaged=0)

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
            self._engine, self.beton, self.sides, wanted, batches, pages_ahead, *self._settings, max_damaged
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
