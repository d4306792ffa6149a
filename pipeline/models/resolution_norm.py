"""Resolution-aware batch norm: private statistics, scale and shift for each candidate resolution."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.func import functional_call


class ResolutionBatchNorm2d(nn.Module):
    """R private copies of one BatchNorm2d, of which `active` normalises (Zhu et al., NeurIPS 2021, section 3.3).

    An activation's statistics move with the input resolution; everything that a batch norm holds (mean, variance,
    scale, shift) is therefore private, while convolutions and classifier stay shared.

    Args:
        norm: the layer to copy. With one candidate, it keeps computing exactly what it did.
        num_resolutions: R, the number of candidates.
    """

    active: int
    keeps_statistics: bool
    """in training mode, normalise with the batch's statistics and leave the running ones as they are"""

    def __init__(self, norm: nn.BatchNorm2d, num_resolutions: int):
        super().__init__()
        self.norms = nn.ModuleList([norm, *(copy.deepcopy(norm) for _ in range(num_resolutions - 1))])
        self.active = 0
        self.keeps_statistics = False

    def forward(self, features: Tensor) -> Tensor:
        """Normalise (N, C, H, W) with the active copy."""
        norm = self.norms[self.active]
        if self.keeps_statistics:
            return functional_call(norm, {name: value.clone() for name, value in norm.named_buffers()}, features)
        return norm(features)

    def extra_repr(self) -> str:
        return f"active={self.active}"


def make_resolution_aware(module: nn.Module, num_resolutions: int) -> list[ResolutionBatchNorm2d]:
    """Replace every BatchNorm2d inside `module`, in place, by a ResolutionBatchNorm2d that starts from its values.

    Returns:
        The new layers, in the order of `module.modules()`.

    Raises:
        ValueError: `num_resolutions` is not positive; `module` has no BatchNorm2d inside, or has been through this.
    """
    if num_resolutions < 1:
        raise ValueError(f"num_resolutions is {num_resolutions}; give at least 1")
    parents = list(module.modules())
    if any(isinstance(parent, ResolutionBatchNorm2d) for parent in parents):
        raise ValueError(f"{type(module).__name__} is resolution-aware already")
    replaced: dict[nn.BatchNorm2d, ResolutionBatchNorm2d] = {}
    for parent in parents:
        for name, child in list(parent._modules.items()):
            if not isinstance(child, nn.BatchNorm2d):
                continue
            if child not in replaced:
                replaced[child] = ResolutionBatchNorm2d(child, num_resolutions)
            setattr(parent, name, replaced[child])
    if not replaced:
        raise ValueError(f"{type(module).__name__} has no BatchNorm2d, so it cannot be made resolution-aware")
    return list(replaced.values())


def select_resolution(module: nn.Module, index: int) -> None:
    """Make candidate `index` active in every ResolutionBatchNorm2d of `module`.

    Raises:
        ValueError: `index` is not in [0, R).
    """
    for layer in module.modules():
        if isinstance(layer, ResolutionBatchNorm2d):
            if not 0 <= index < len(layer.norms):
                raise ValueError(f"resolution index {index} is not in 0..{len(layer.norms) - 1}")
            layer.active = index


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """Forward passes of the body, in training mode too, leave every running statistic inside `module` as it is.

    For a pass that is run a second time: a batch counts once.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, ResolutionBatchNorm2d)]
    for layer in layers:
        layer.keeps_statistics = True
    try:
        yield
    finally:
        for layer in layers:
            layer.keeps_statistics = False


def keep_resolution(module: nn.Module, index: int) -> None:
    """Replace every ResolutionBatchNorm2d of `module`, in place, by its plain BatchNorm2d of candidate `index`."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, ResolutionBatchNorm2d):
                setattr(parent, name, child.norms[index])
