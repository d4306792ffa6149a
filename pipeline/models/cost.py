"""What a forward pass costs: multiply-adds (MACs, as in the paper) by torch's own counter, or measured time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.drnet import DRNet
from pipeline.models.latency import Latency
from pipeline.models.meta import meta_forward, meta_images


@dataclass(frozen=True)
class Costs:
    """Cost of one image, in GFLOPs (1e9 multiply-adds) and, where it was measured, in milliseconds.

    `backbone_gflops[j]` is the backbone's cost at `resolutions[j]`; the predictor's is paid once for every image.
    Names without a unit are in milliseconds where there is a `latency`, else in GFLOPs: what is decided is decided by
    those.
    """

    resolutions: tuple[int, ...]
    backbone_gflops: tuple[float, ...]
    predictor_gflops: float
    latency: Latency | None = None

    @property
    def unit(self) -> str:
        """gflops or milliseconds."""
        return "gflops" if self.latency is None else "milliseconds"

    @property
    def backbone(self) -> tuple[float, ...]:
        """(R,): the backbone's cost at each resolution, in `unit`."""
        return self.backbone_gflops if self.latency is None else self.latency.backbone_milliseconds

    @property
    def predictor(self) -> float:
        """The predictor's cost, in `unit`."""
        return self.predictor_gflops if self.latency is None else self.latency.predictor_milliseconds

    def mean(self, shares_R: Sequence[float], with_predictor: bool = True) -> float:
        """As `mean_gflops`, in `unit`."""
        return _mean(shares_R, self.backbone, self.predictor if with_predictor else 0.0)

    def mean_gflops(self, shares_R: Sequence[float], with_predictor: bool = True) -> float:
        """Mean cost where the share `shares_R[j]` of the images runs at resolution j (shares sum to 1)."""
        return _mean(shares_R, self.backbone_gflops, self.predictor_gflops if with_predictor else 0.0)

    @property
    def relative(self) -> tuple[float, ...]:
        """(R,): the candidates' GFLOPs on a scale from 0, the cheapest, to 1, the dearest; all 0 where none differs.

        Always of GFLOPs: `budget_bias` means the same for a model wherever it runs.
        """
        cheapest, dearest = min(self.backbone_gflops), max(self.backbone_gflops)
        return tuple((cost - cheapest) / ((dearest - cheapest) or 1.0) for cost in self.backbone_gflops)

    @property
    def min_backbone_gflops(self) -> float:
        """Every image at the cheapest candidate, without the predictor."""
        return min(self.backbone_gflops)

    @property
    def max_backbone_gflops(self) -> float:
        """Every image at the dearest candidate, without the predictor."""
        return max(self.backbone_gflops)


def _mean(shares_R: Sequence[float], costs_R: Sequence[float], more: float) -> float:
    return float(sum(share * cost for share, cost in zip(shares_R, costs_R, strict=True))) + more


def count_macs(module: nn.Module, *inputs: Any) -> int:
    """Multiply-adds of `module(*inputs)` in eval mode; nothing is computed and nothing of the module changes.

    Convolutions and matrix products are counted; normalisation, activations and pooling are not, as in the paper.
    Tensors in `inputs` matter by shape only.
    """
    with FlopCounterMode(display=False) as counter:
        meta_forward(module, *inputs)
    return counter.get_total_flops() // 2  # torch counts a multiply-add as two operations


def measure_costs(model: DRNet) -> Costs:
    """Count backbone and predictor for one image at every candidate resolution.

    Raises:
        ValueError: an input size is too small for its network.
    """
    return Costs(
        resolutions=model.resolutions,
        backbone_gflops=tuple(
            _gflops(model.backbone, "backbone", side, index) for index, side in enumerate(model.resolutions)
        ),
        predictor_gflops=_gflops(model.predictor, "predictor", model.predictor_size),
    )


def _gflops(module: nn.Module, role: str, side: int, *arguments: int) -> float:
    try:
        return count_macs(module, meta_images(side), *arguments) / 1e9
    except RuntimeError as error:
        raise ValueError(f"the {role} cannot run on images of {side} px ({error}); give a larger size") from error
