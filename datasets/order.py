"""Which sample when: pure functions of (seed, epoch), the same for any number of ranks, and FFCV's order made of them.

What FFCV hands to a decoder as a sample index is a *view* here: one sample as one epoch sees it, packed into 64 bits.
The high 32 bits are a hash of (seed, epoch), the low 32 bits the sample's index. Everything random about a sample is
drawn from its view alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from datasets.engine import TraversalOrder

INDEX_BITS = np.uint64(32)
INDEX_MASK = np.uint64(0xFFFFFFFF)
MAX_SAMPLES = 1 << 32


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:
    """Sample indices (num_samples,) in the order of an epoch: each exactly once.

    The shuffle sorts the raw stream of a Philox generator, which numpy guarantees never to change, where the stream
    of `Generator.permutation` may differ between numpy versions.
    """
    if not shuffle:
        return np.arange(num_samples)
    return np.argsort(_generator(seed, epoch).random_raw(num_samples), kind="stable")


def count_batches(num_samples: int, batch_size: int) -> int:
    """Batches of an epoch: as few as hold every sample."""
    return -(-num_samples // batch_size)


def batch_bounds(num_samples: int, batch_size: int, step: int) -> tuple[int, int]:
    """First and one past the last position of batch `step`; the sizes of batches differ by at most one."""
    size, larger = divmod(num_samples, count_batches(num_samples, batch_size))
    first = step * size + min(step, larger)
    return first, first + size + (step < larger)


def pack_views(indices_N: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.uint64]:
    """Views (N,) of the samples at `indices_N`, each in 0 .. 2**32 - 1, as the epoch sees them."""
    # The last of the generator's values for (seed, epoch) serves as their hash, far from those that the order uses.
    high = _generator(seed, epoch).advance(1 << 64).random_raw() & INDEX_MASK.item()
    return indices_N.astype(np.uint64) | np.uint64(high << INDEX_BITS.item())


def sample_indices(views_N: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The sample indices (N,) of views."""
    return (views_N & INDEX_MASK).astype(np.int64)


class ViewOrder(TraversalOrder):
    """FFCV's order of one rank, as views.

    Rank r takes every `world_size`-th sample of each batch, from its r-th on, so the batches over all ranks together
    are the same for any number of ranks. A rank's part of a batch may be empty.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1
    ):
        self.num_samples, self.batch_size, self.shuffle = num_samples, batch_size, shuffle
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def __call__(self, loader: object) -> ViewOrder:
        """FFCV calls an order with its loader to get one."""
        return self

    @property
    def num_batches(self) -> int:
        return count_batches(self.num_samples, self.batch_size)

    @property
    def local_batch_size(self) -> int:
        """The largest number of samples in this rank's part of a batch."""
        return -(-min(self.batch_size, self.num_samples) // self.world_size)

    def batches(self, epoch: int, start_step: int = 0) -> list[NDArray[np.uint64]]:
        """This rank's views of every batch of the epoch from `start_step` on."""
        views = pack_views(epoch_order(self.num_samples, self.seed, epoch, self.shuffle), self.seed, epoch)
        bounds = (batch_bounds(self.num_samples, self.batch_size, step) for step in range(start_step, self.num_batches))
        return [np.ascontiguousarray(views[first + self.rank : last : self.world_size]) for first, last in bounds]

    def sample_order(self, epoch: int) -> NDArray[np.uint64]:
        """This rank's views of the whole epoch."""
        return np.concatenate(self.batches(epoch))


def _generator(seed: int, epoch: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed % (1 << 64), epoch], np.uint64))
