"""Crops of a beton, decoded once and kept on a node's disk for many training runs that see the same small crops.

    FOLDER/DIGEST/crops-00003-32px.npy     uint8 (N, 32, 32, 3), the samples in the order of the beton

The folder's name is a digest of what the pixels depend on. A file gets its name when it is complete, and is read by
memory map, so the processes of a node share it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from datasets.beton import read_layout
from datasets.files import exclusive, shown_bytes, shown_name, sync_folder
from datasets.loading.loader import Batch
from datasets.loading.order import SampleOrder, batch_bounds, sample_indices

SAMPLES_AT_ONCE = 256


class Reader(Protocol):
    """Anything that gives the crops of an epoch: MultiResolutionLoader or DecodedCrops."""

    @property
    def num_samples(self) -> int:
        """The number of samples in the beton."""
        ...

    def read(
        self, crop_epoch: int, batches: Sequence[NDArray[np.int64]], *, sides: Collection[int] | None = None
    ) -> Any:
        """Return an iterator over given batches of samples, with the crops of `crop_epoch`."""
        ...


def decoded_bytes(num_samples: int, num_crops: int, sides: Collection[int]) -> int:
    """Return the disk space of `num_crops` decoded crops of every sample, in bytes."""
    return num_samples * num_crops * sum(3 * side * side for side in sides)


class DecodedCrops:
    """Read crops that `fill` has decoded and stored.

    Args:
        folder: where decoded crops of all data are stored.
        beton: the file that the crops come from.
        about: everything that the pixels depend on: data, crop, seed, and the scale of JPEG decoding.
        crop_epochs, sides: the epochs whose crops can be read, and the sides in pixels.
    """

    def __init__(
        self, folder: Path, beton: Path, about: Mapping[str, Any], crop_epochs: Sequence[int], sides: Collection[int]
    ):
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
        self.folder, self.crop_epochs, self.sides = folder / digest, tuple(crop_epochs), tuple(sides)
        metadata = read_layout(beton).metadata
        self.num_samples = len(metadata)
        self._labels = torch.from_numpy(metadata["label"].astype(np.int64))
        self._mapped: dict[tuple[int, int], NDArray[np.uint8]] = {}

    def fill(self, reader: Reader) -> None:
        """Decode the missing crops, each epoch once for all sides. One process per node decodes; the others wait.

        Raises:
            OSError: there is not enough space for the crops of an epoch.
        """
        with exclusive(self.folder, waiting=lambda: None):
            for leftover in self.folder.glob("*.partial"):  # of a process that was killed
                leftover.unlink()
            for crop_epoch in self.crop_epochs:
                missing = [side for side in self.sides if not self._path(crop_epoch, side).exists()]
                if missing:
                    self._decode(reader, crop_epoch, missing)
            sync_folder(self.folder)

    def read(
        self, crop_epoch: int, batches: Sequence[NDArray[np.int64]], *, sides: Collection[int] | None = None
    ) -> Iterator[Batch]:
        """Yield given samples in given batches, like MultiResolutionLoader.read. The batches stay valid."""
        mapped = {side: self._map(crop_epoch, side) for side in (self.sides if sides is None else sides)}
        for indices_N in batches:
            images = {side: torch.from_numpy(pixels[indices_N]) for side, pixels in mapped.items()}
            indices = torch.from_numpy(indices_N)
            yield Batch(images, self._labels[indices], indices)

    def _decode(self, reader: Reader, crop_epoch: int, sides: Sequence[int]) -> None:
        self._require_space(decoded_bytes(self.num_samples, 1, sides))
        partial = {side: self._path(crop_epoch, side).with_suffix(".partial") for side in sides}
        starts = range(0, self.num_samples, SAMPLES_AT_ONCE)
        batches = [np.arange(first, min(first + SAMPLES_AT_ONCE, self.num_samples)) for first in starts]
        try:
            files = {
                side: np.lib.format.open_memmap(path, "w+", np.uint8, (self.num_samples, side, side, 3))
                for side, path in partial.items()
            }
            with closing(reader.read(crop_epoch, batches, sides=sides)) as epoch:
                for first, batch in zip(starts, epoch, strict=True):
                    for side, file in files.items():
                        file[first : first + len(batch.indices)] = batch.images[side].numpy()
            for side, file in files.items():
                file.flush()
                partial[side].replace(self._path(crop_epoch, side))
        finally:
            for path in partial.values():
                path.unlink(missing_ok=True)

    def _require_space(self, needed: int) -> None:
        """Raise OSError if the disk is too full. Writing to a mapped file on a full disk would kill the process."""
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"{shown_name(self.folder)} has {shown_bytes(free)} free, but an epoch of decoded crops needs "
                f"{shown_bytes(needed)}; free some space, set search.node_folder to a larger disk, or lower "
                "search.cache_gb"
            )

    def _map(self, crop_epoch: int, side: int) -> NDArray[np.uint8]:
        if (crop_epoch, side) not in self._mapped:
            self._mapped[crop_epoch, side] = np.load(self._path(crop_epoch, side), mmap_mode="r")
        return self._mapped[crop_epoch, side]

    def _path(self, crop_epoch: int, side: int) -> Path:
        return self.folder / f"crops-{crop_epoch:05}-{side}px.npy"


class Ordered:
    """A training loader over a Reader's crops, in an order with its own seed.

    The crops are still the reader's, so training runs with different seeds share one set of decoded crops. With the
    seed of a MultiResolutionLoader of one rank, the order equals the loader's.
    """

    def __init__(self, reader: Reader, batch_size: int, *, shuffle: bool, seed: int):
        self._reader = reader
        self._order = SampleOrder(reader.num_samples, batch_size, shuffle=shuffle, seed=seed)

    @property
    def num_samples(self) -> int:
        """The number of samples in the beton."""
        return self._reader.num_samples

    @property
    def num_batches(self) -> int:
        """The number of batches of an epoch."""
        return self._order.num_batches

    def read(
        self, crop_epoch: int, batches: Sequence[NDArray[np.int64]], *, sides: Collection[int] | None = None
    ) -> Any:
        """Read given samples from the reader."""
        return self._reader.read(crop_epoch, batches, sides=sides)

    def global_size(self, step: int) -> int:
        """Return the number of images of batch `step`."""
        first, last = batch_bounds(self.num_samples, self._order.batch_size, step)
        return last - first

    def epoch(
        self, epoch: int, start_step: int = 0, *, crop_epoch: int | None = None, sides: Collection[int] | None = None
    ) -> Any:
        """Start a pass over all samples: the order of `epoch` with the crops of `crop_epoch`."""
        batches = [sample_indices(keys_N) for keys_N in self._order.batches(epoch, start_step)]
        return self._reader.read(epoch if crop_epoch is None else crop_epoch, batches, sides=sides)
