"""What a sample is cropped to, and the FFCV decoders that turn views into crops and labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.boxes import crop_boxes
from datasets.checksum import mark_changed
from datasets.engine import AllocationQuery, Operation, State
from datasets.kernels import CHANGED, DECODED, decode_boxes
from datasets.order import sample_indices


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, stretched to a square, as torchvision's RandomResizedCrop draws it.

    Attributes:
        scale: range of the crop's area, as a fraction of the image's.
        ratio: range of the crop's width / height; its logarithm is uniform.
        flip: mirror half of the crops.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def problems(self) -> Iterator[str]:
        """What is wrong with the ranges."""
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            yield f"the crop's scale is {tuple(self.scale)}; give 0 < low <= high <= 1"
        if not 0 < self.ratio[0] <= self.ratio[1]:
            yield f"the crop's ratio is {tuple(self.ratio)}; give 0 < low <= high"

    def parameters(self) -> tuple[float, ...]:
        """The `crop` of boxes.crop_box."""
        (low, high), (narrow, wide) = self.scale, self.ratio
        return float(low), float(high), math.log(narrow), math.log(wide), 0.5 * self.flip, 0.0


@dataclass(frozen=True)
class CenterCrop:
    """The central square whose side is `fraction` of the shorter side: 224 of 256 in the paper."""

    fraction: float = 0.875

    def problems(self) -> Iterator[str]:
        """What is wrong with the fraction."""
        if not 0 < self.fraction <= 1:
            yield f"the crop's fraction is {self.fraction}; give 0 < fraction <= 1"

    def parameters(self) -> tuple[float, ...]:
        """The `crop` of boxes.crop_box."""
        return 0.0, 0.0, 0.0, 0.0, 0.0, float(self.fraction)


class MultiResolutionDecoder(Operation):
    """FFCV decoder of RGBImageField: one decode and one crop of each JPEG, resized to every side.

    Its memory is, for each side, uint8 (N, side, side, 3), and last a status, uint8 (N,): see kernels.DECODED. A side
    whose memory has no rows is not wanted; what the others show does not depend on it.
    """

    def __init__(self, sides: Sequence[int], crop: RandomResizedCrop | CenterCrop, checksums: NDArray[np.uint64]):
        """`checksums` are those of all samples of the beton."""
        super().__init__()
        self.checksums = checksums
        self.sides = tuple(sides)
        self.crop_parameters = crop.parameters()

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, ...]]:
        shapes = [(side, side, 3) for side in self.sides]
        byte = np.dtype(np.uint8)
        state = replace(previous_state, jit_mode=True, shape=shapes[0], dtype=byte)
        return state, tuple(AllocationQuery(shape, byte) for shape in [*shapes, ()])

    def generate_code(self) -> Callable[..., tuple]:
        parameters, sides_R, checksums = self.crop_parameters, np.array(self.sides), self.checksums

        def decode(views_N: np.ndarray, memory: tuple, fields: np.ndarray, storage_state: tuple[Any, ...]) -> tuple:
            *images, status_N = memory
            storage, pointers, sizes = storage_state
            indices_N = sample_indices(views_N)
            fields_N = fields[indices_N]
            offsets_N = fields_N["data_ptr"].astype(np.int64)
            sizes_N = sizes[np.searchsorted(pointers, fields_N["data_ptr"])].astype(np.int64)
            shapes_N2 = np.stack([fields_N["height"], fields_N["width"]], axis=1).astype(np.int64)
            boxes_N5 = crop_boxes(views_N, shapes_N2, parameters)
            addresses_R = np.array([image.ctypes.data if len(image) else 0 for image in images], np.uintp)
            storage = np.asarray(storage)
            status_N[:] = DECODED
            mark_changed(storage, offsets_N, sizes_N, checksums[indices_N], status_N, CHANGED)
            decode_boxes(storage, offsets_N, sizes_N, shapes_N2, boxes_N5, sides_R, addresses_R, status_N)
            return memory

        return decode


class LabelDecoder(Operation):
    """FFCV decoder of IntField for views."""

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        dtype = np.dtype(np.int64)
        return replace(previous_state, jit_mode=True, shape=(), dtype=dtype), AllocationQuery((), dtype)

    def generate_code(self) -> Callable[..., np.ndarray]:
        def decode(views_N: np.ndarray, labels_N: np.ndarray, field: np.ndarray, storage_state: tuple) -> np.ndarray:
            labels_N[:] = field[sample_indices(views_N)]
            return labels_N

        return decode
