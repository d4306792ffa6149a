"""The order of samples: pure functions of (seed, epoch), the same for any number of ranks.

A sample key is one sample in one epoch, packed into 64 bits: the high 32 bits are a hash of (seed, epoch), the low 32
bits the sample's index. Everything random about a sample is drawn from its key alone.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

INDEX_BITS = np.uint64(32)
INDEX_MASK = np.uint64(0xFFFFFFFF)
MAX_SAMPLES = 1 << 32
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
"""The step between the states of SplitMix64."""


def splitmix64(bits):
    """Apply the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) to uint64 scalars or arrays."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def epoch_order(
    num_samples: int, seed: int, epoch: int, shuffle: bool, windows_N: NDArray[np.int64] | int = 0
) -> NDArray[np.int64]:
    """Return sample indices (num_samples,) in the order of an epoch, each exactly once.

    The shuffle sorts the raw stream of a Philox generator, which numpy guarantees never to change. The stream of
    `Generator.permutation` may differ between numpy versions.

    Args:
        windows_N: the window of each sample, numbered in the order of the epoch; samples are shuffled within windows.
    """
    if not shuffle:
        return np.arange(num_samples)
    keys_N = _generator(seed, epoch).random_raw(num_samples)
    return np.lexsort((keys_N, np.broadcast_to(windows_N, num_samples)))


def count_batches(num_samples: int, batch_size: int) -> int:
    """Return the number of batches of an epoch: the smallest number with room for every sample."""
    return -(-num_samples // batch_size)


def batch_bounds(num_samples: int, batch_size: int, step: int) -> tuple[int, int]:
    """Return the first and one past the last position of batch `step`. Batch sizes differ by at most one."""
    size, larger = divmod(num_samples, count_batches(num_samples, batch_size))
    first = step * size + min(step, larger)
    return first, first + size + (step < larger)


def pack_keys(indices_N: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.uint64]:
    """Return the keys (N,) of the samples at `indices_N`, each in 0 .. 2**32 - 1, in an epoch."""
    # The hash of (seed, epoch) is a value far along the generator's stream. The order uses the start of the stream.
    high = _generator(seed, epoch).advance(1 << 64).random_raw() & INDEX_MASK.item()
    return indices_N.astype(np.uint64) | np.uint64(high << INDEX_BITS.item())


def sample_indices(keys_N: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the sample indices (N,) of keys."""
    return (keys_N & INDEX_MASK).astype(np.int64)


def rank_part(owners_N: NDArray[np.int64], rank: int, world_size: int) -> NDArray[np.int64]:
    """Return the positions in a batch that a rank takes.

    These are first the samples that it owns, then some of those that their owners have no room for. The sizes of the
    ranks' parts differ by at most one.

    Args:
        owners_N: preferred rank of each sample, from 0 to world_size - 1.
    """
    sizes = np.array([len(part) for part in np.array_split(owners_N, world_size)])
    by_owner = np.argsort(owners_N, kind="stable")
    owners_N = owners_N[by_owner]
    nth_of_owner = np.arange(len(owners_N)) - np.searchsorted(owners_N, owners_N)
    ranks_N = np.where(nth_of_owner < sizes[owners_N], owners_N, world_size)
    room = sizes - np.bincount(ranks_N, minlength=world_size + 1)[:world_size]
    ranks_N[ranks_N == world_size] = np.repeat(np.arange(world_size), room)
    return by_owner[ranks_N == rank]


@dataclass(frozen=True)
class PageWindows:
    """A quasi-random order for a beton that does not fit into memory: samples of a page are read close together.

    Pages come in a new order every epoch, and samples are shuffled within windows of consecutive pages of that order.

    Attributes:
        pages_N: the page of the beton that each sample is in.
        num_pages: number of pages in a window.
    """

    pages_N: NDArray[np.int64]
    num_pages: int

    def page_order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the page numbers in the order of the epoch."""
        pages = np.unique(self.pages_N)
        return pages[np.argsort(_generator(seed, epoch).advance(1 << 65).random_raw(len(pages)), kind="stable")]

    def places(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the position (N,) in the epoch's page order of each sample's page."""
        order = self.page_order(seed, epoch)
        by_number = np.argsort(order)
        return by_number[np.searchsorted(order, self.pages_N, sorter=by_number)]


def next_sample(keys_N: NDArray[np.uint64], num_samples: int) -> NDArray[np.uint64]:
    """Return the keys of the next samples in the beton, in the same epoch."""
    return (keys_N & ~INDEX_MASK) | ((keys_N & INDEX_MASK) + np.uint64(1)) % np.uint64(num_samples)


class SampleOrder:
    """The order of one rank's samples, as keys.

    The batches over all ranks together are the same for any number of ranks. Rank r takes the r-th of `world_size`
    parts of each batch, which may be empty. With `windows`, a batch is divided by pages, so that ranks share few pages.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        windows: PageWindows | None = None,
    ):
        self.num_samples, self.batch_size, self.shuffle = num_samples, batch_size, shuffle
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.windows = windows if shuffle else None

    @property
    def num_batches(self) -> int:
        """The number of batches of an epoch."""
        return count_batches(self.num_samples, self.batch_size)

    def batches(self, epoch: int, start_step: int = 0, crop_epoch: int | None = None) -> list[NDArray[np.uint64]]:
        """Return this rank's keys of every batch from `start_step` on, in the order of `epoch`.

        The keys are those of `crop_epoch` if it is given, otherwise those of `epoch`.
        """
        places_N = self.windows.places(self.seed, epoch) if self.windows else np.zeros(self.num_samples, np.int64)
        windows_N = places_N // self.windows.num_pages if self.windows else places_N
        order = epoch_order(self.num_samples, self.seed, epoch, self.shuffle, windows_N)
        keys, parts = pack_keys(order, self.seed, epoch if crop_epoch is None else crop_epoch), []
        for step in range(start_step, self.num_batches):
            first, last = batch_bounds(self.num_samples, self.batch_size, step)
            owners = self._owners(places_N[order[first:last]])
            parts.append(keys[first + rank_part(owners, self.rank, self.world_size)])
        return parts

    def pages_ahead(self, epoch: int, start_step: int = 0) -> list[NDArray[np.int64]]:
        """Return this rank's pages to fetch with every batch from `start_step` on, one window before they are used.

        The lists are empty for an order without windows, in which any page may be next.
        """
        steps = range(start_step, self.num_batches)
        if self.windows is None:
            return [np.empty(0, np.int64) for _ in steps]
        pages, window = self.windows.page_order(self.seed, epoch), self.windows.num_pages
        ours = np.flatnonzero(self._owners(np.arange(len(pages))) == self.rank)
        # Samples are spread evenly over the pages.
        used = [
            batch_bounds(self.num_samples, self.batch_size, step)[0] * len(pages) // self.num_samples for step in steps
        ]
        fetched = [*used[:1], *(place + window for place in used)]
        return [pages[ours[(low <= ours) & (ours < high)]] for low, high in itertools.pairwise(fetched)]

    def _owners(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rank that owns the page at each place of the epoch. Every window is divided evenly."""
        return places % self.windows.num_pages * self.world_size // self.windows.num_pages if self.windows else places


def _generator(seed: int, epoch: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed % (1 << 64), epoch], np.uint64))
