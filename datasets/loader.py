"""The loader: the same crop of each image at every resolution, reproducible to the bit, sharded and resumable."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets.beton_file import read_layout
from datasets.crops import CenterCrop, LabelDecoder, MultiResolutionDecoder, RandomResizedCrop
from datasets.engine import Engine
from datasets.epochs import Batch, DecodeError, Epoch
from datasets.order import MAX_SAMPLES, ViewOrder, batch_bounds

__all__ = ["Batch", "CenterCrop", "DecodeError", "MultiResolutionLoader", "RandomResizedCrop"]


class MultiResolutionLoader:
    """Batches of a beton, with each image decoded once and cropped once for all sides.

    The pixels of a sample are a function of (seed, epoch, sample index) and the crop alone, and the batches over all
    ranks of (seed, epoch, batch_size), so neither depends on ranks, threads or where a run was resumed.

    Args:
        beton: a file that jobs.prepare wrote.
        sides: the sizes in pixels at which every image is wanted.
        batch_size: of all ranks together. Batches of an epoch differ by at most one image.
        crop: what is seen of each image.
        shuffle: a new order every epoch; otherwise the order of the beton.
        seed: of the order and the crops.
        rank, world_size: which part of each batch this loader reads. A part may be empty; every rank takes the same
            number of steps, and over all ranks an epoch has every sample exactly once.
        num_threads: that decode. They are the loader's own: the thread counts of torch and numba stay as they are.
        batches_ahead: batches that are prepared before they are asked for.

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
    ):
        self.beton = Path(beton)
        self.sides = tuple(sides)
        counts = {"batch_size": batch_size, "num_threads": num_threads, "batches_ahead": batches_ahead}
        problems = [*_problems(self.sides, counts, rank, world_size), *crop.problems()]
        if problems:
            raise ValueError("\n".join(["the loader cannot be built:", *(f"  - {problem}" for problem in problems)]))
        self.num_samples = len(read_layout(self.beton).metadata)
        if not 0 < self.num_samples < MAX_SAMPLES:
            raise ValueError(f"{self.beton} has {self.num_samples} samples; a loader takes 1 to {MAX_SAMPLES - 1}")
        self._order = ViewOrder(
            self.num_samples, batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size
        )
        decoders = {"image": MultiResolutionDecoder(self.sides, crop), "label": LabelDecoder()}
        self._engine = Engine(self.beton, self._order, decoders)
        self._num_threads, self._batches_ahead = num_threads, batches_ahead
        self._epochs: weakref.WeakSet[Epoch] = weakref.WeakSet()

    @property
    def num_batches(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return self._order.num_batches

    def global_size(self, step: int) -> int:
        """Images of batch `step` over all ranks."""
        first, last = batch_bounds(self.num_samples, self._order.batch_size, step)
        return last - first

    def epoch(self, epoch: int, start_step: int = 0) -> Epoch:
        """Begin a pass over the data, to iterate over (an iterator that is also a context manager).

        Args:
            epoch: from 0; keys order and crops.
            start_step: the first batch to give; those before it are not read.

        Raises:
            ValueError: `epoch` or `start_step` is out of range.
            DecodeError: from the iteration, when it comes to a damaged JPEG.
        """
        if epoch < 0 or not 0 <= start_step <= self.num_batches:
            raise ValueError(
                f"epoch {epoch}, start_step {start_step}: an epoch is 0 or more, a step 0 to {self.num_batches}"
            )
        batches = self._order.batches(epoch, start_step)
        started = Epoch(self._engine, self.beton, self.sides, batches, self._num_threads, self._batches_ahead)
        self._epochs.add(started)
        return started

    def close(self) -> None:
        """End every pass that is still going on."""
        for epoch in list(self._epochs):
            epoch.close()


def _problems(sides: tuple[int, ...], counts: dict[str, int], rank: int, world_size: int) -> Iterator[str]:
    if not sides or min(sides) < 1 or len(set(sides)) < len(sides):
        yield f"sides is {list(sides)}; give different positive sizes, at least one"
    for name, count in counts.items():
        if count < 1:
            yield f"{name} is {count}; give 1 or more"
    if not 0 <= rank < world_size:
        yield f"rank is {rank} of world_size {world_size}; give 0 <= rank < world_size"
