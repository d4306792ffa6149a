"""Mixup and cutmix for all resolutions at once: every resolution of an image shows the same mixture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from pipeline.config.schema import BackboneStage


@dataclass(frozen=True)
class Mixed:
    """A batch in which each image is a mixture of two."""

    images: Mapping[int, Tensor]
    """Maps a side to images, uint8 (N, side, side, 3)."""
    labels_N: Tensor
    """The classes of the images themselves, int64."""
    partners_N: Tensor
    """The classes of the images that were mixed in, int64."""
    share: float
    """The share of the image's own class, 0 to 1. The partner's share is 1 - share."""

    @property
    def dominant_N(self) -> Tensor:
        """The class with the larger share in each image, int64."""
        return self.labels_N if self.share >= 0.5 else self.partners_N

    def targets(self, num_classes: int) -> Tensor:
        """Return the probability of each class, float32 (N, K)."""
        own_NK, partner_NK = (
            functional.one_hot(labels_N, num_classes) for labels_N in (self.labels_N, self.partners_N)
        )
        return self.share * own_NK + (1 - self.share) * partner_NK

    def part(self, rows: slice) -> Mixed:
        """Return the images at the given rows."""
        images = {side: pixels[rows] for side, pixels in self.images.items()}
        return replace(self, images=images, labels_N=self.labels_N[rows], partners_N=self.partners_N[rows])


class Mixing:
    """Mix each image of a batch with the image before it, and the first with the last.

    Each call draws share and box once, from torch's global generator, for all resolutions. If both mixup and cutmix are
    on, each call draws one of them. Zhang et al., "mixup", ICLR 2018; Yun et al., "CutMix", ICCV 2019.

    Raises:
        ValueError: mixup and cutmix are both off.
    """

    def __init__(self, stage: BackboneStage):
        kinds = ((v2.MixUp, stage.mixup_alpha), (v2.CutMix, stage.cutmix_alpha))
        self.transforms = [kind(alpha=alpha) for kind, alpha in kinds if alpha > 0]
        if not self.transforms:
            raise ValueError("mixup_alpha and cutmix_alpha are both 0; set one of them above 0")

    def __call__(self, images: Mapping[int, Tensor], labels_N: Tensor) -> Mixed:
        """Return mixtures of images {side: uint8 (N, side, side, 3)} with classes (N,). The inputs do not change."""
        transform = self.transforms[int(torch.randint(len(self.transforms), ()))]
        largest = max(images)
        drawn = transform.make_params([images[largest].permute(0, 3, 1, 2)])
        mixed = {
            side: _mixed(pixels, transform, _at_scale(drawn, side / largest), labels_N)
            for side, pixels in images.items()
        }
        share = drawn["lam"] if "lam" in drawn else drawn["lam_adjusted"]
        return Mixed(mixed, labels_N, labels_N.roll(1), share)


def _at_scale(drawn: dict[str, Any], scale: float) -> dict[str, Any]:
    """Scale the parameters that were drawn for the largest side to another side. A box keeps its relative position."""
    return drawn | {"box": tuple(round(edge * scale) for edge in drawn["box"])} if "box" in drawn else drawn


def _mixed(pixels: Tensor, transform: v2.MixUp | v2.CutMix, drawn: dict[str, Any], labels_N: Tensor) -> Tensor:
    # Blend in float32 and round to uint8: the rounding error is far below a JPEG's noise, uint8 needs a quarter of the
    # memory, and the model can normalize as usual.
    inputs = pixels.permute(0, 3, 1, 2)
    blended = transform.transform(inputs.float(), drawn | {"labels": labels_N, "batch_size": len(labels_N)})
    return blended.round().to(torch.uint8).permute(0, 2, 3, 1)
