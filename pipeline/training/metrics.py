"""Means over an epoch's images, kept on the device until asked for, exact over all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.training import distributed


class Meter:
    """Adds up per-image sums of steps; a mean is the sum over all ranks, divided by the images over all ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._images = 0

    def update(self, sums: Mapping[str, Tensor], global_size: int) -> None:
        """Add one step: this rank's sums, and the images of the step over all ranks."""
        for key, value in sums.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value.clone()
        self._images += global_size

    def means(self) -> dict[str, float]:
        """Means over all images of all ranks. Every rank must call it."""
        if not self._sums:
            return {}
        total = distributed.sum_over_ranks(torch.stack([value.double() for value in self._sums.values()]))
        return {key: value / self._images for key, value in zip(self._sums, total.tolist(), strict=True)}
