"""The crops, and the decoder that turns sample keys into cropped images and labels."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from datasets.beton import PAGE_SIZE, read_layout
from datasets.loading.kernels import CHANGED, DECODED, crop_boxes, decode_boxes, mark_changed
from datasets.loading.order import sample_indices


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
