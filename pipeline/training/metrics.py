"""Means over an epoch's images, kept on the device until asked for, exact over all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.training import distributed


class Meter:
    """Adds up per-image sums of steps; a mean is the sum over all ranks, divided by the images over all ranks.

    `fold` adds the ranks' sums up, after which every rank holds the same totals and none of its own: what a checkpoint
    within an epoch saves. Means depend on where was folded by rounding alone.

    Args:
        state: of another meter, to go on from.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._sums: dict[str, Tensor] = {}
        self._totals: dict[str, float] = dict(state["totals"]) if state else {}
        self._images: int = state["images"] if state else 0

    def update(self, sums: Mapping[str, Tensor], global_size: int) -> None:
        """Add one step: this rank's sums, and the images of the step over all ranks."""
        for key, value in sums.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value.clone()
        self._images += global_size

    def fold(self) -> None:
        """Add this rank's sums since the last time to the totals over all ranks. Every rank must call it."""
        if not self._sums:
            return
        added = distributed.sum_over_ranks(torch.stack([value.double() for value in self._sums.values()])).tolist()
        for key, value in zip(self._sums, added, strict=True):
            self._totals[key] = self._totals.get(key, 0.0) + value
        self._sums = {}

    def state_dict(self) -> dict[str, Any]:
        """What has been folded."""
        assert not self._sums, "fold first"
        return {"totals": dict(self._totals), "images": self._images}

    def means(self) -> dict[str, float]:
        """Means over all images of all ranks. Every rank must call it."""
        self.fold()
        return {key: value / self._images for key, value in self._totals.items()}
