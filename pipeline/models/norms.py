"""Batch norm: private to each resolution, synchronized over ranks in training, folded for inference."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule, Node, Tracer
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval


class ResolutionBatchNorm2d(nn.Module):
    """R private copies of one BatchNorm2d, of which `active` normalizes (Zhu et al., NeurIPS 2021, section 3.3).

    An activation's statistics change with the input resolution. So everything in a batch norm (mean, variance, scale,
    shift) is private to a resolution, while convolutions and classifier are shared.

    Args:
        norm: the layer to copy. With one candidate, it computes exactly what it did.
        num_resolutions: R, the number of candidates.
    """

    active: int
    keeps_statistics: bool
    """In training mode, normalize with the batch's statistics and leave the running ones as they are."""
    frozen: bool
    """Normalize with the running statistics in training mode too; set it before `train()`."""

    def __init__(self, norm: nn.BatchNorm2d, num_resolutions: int):
        super().__init__()
        self.norms = nn.ModuleList([norm, *(copy.deepcopy(norm) for _ in range(num_resolutions - 1))])
        self.active = 0
        self.keeps_statistics = self.frozen = False

    def train(self, mode: bool = True) -> Self:
        """Set training mode, which leaves a frozen layer in inference mode."""
        return super().train(mode and not self.frozen)

    def forward(self, features: Tensor) -> Tensor:
        """Normalize (N, C, H, W) with the active copy."""
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
        ValueError: `num_resolutions` is not positive, or `module` has no BatchNorm2d or is resolution-aware already.
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


def resolution_norms(module: nn.Module) -> list[ResolutionBatchNorm2d]:
    return [layer for layer in module.modules() if isinstance(layer, ResolutionBatchNorm2d)]


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics inside `module` as they are during the body, in training mode too.

    For a forward pass that is repeated: a batch counts once.
    """
    layers = resolution_norms(module)
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


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d that, in training mode, normalizes with statistics over all ranks' values.

    All ranks must run it in the same order, even a rank without images. Gradients of scale and shift come from the
    rank's own images, as for any parameter; the input's gradient includes its effect on other ranks' outputs. In a
    single process, or in inference mode, it equals BatchNorm2d to the last bit.
    """

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> SynchronizedBatchNorm2d:
        """Returns the synchronized form of a layer, with the same parameters and buffers."""
        layer = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta")
        layer._parameters, layer._buffers = norm._parameters, norm._buffers
        return layer.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, H, W); N may be 0 where another rank has images."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        count, mean_C, variance_C = _global_statistics(input)
        if self.track_running_stats:
            self._track(count, mean_C, variance_C)
        return _Normalize.apply(input, self.weight, self.bias, mean_C, variance_C, count, self.eps)

    @torch.no_grad()
    def _track(self, count: Tensor, mean_C: Tensor, variance_C: Tensor) -> None:
        """Update the running statistics as BatchNorm2d does, with the unbiased variance."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        step = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C, step)
        self.running_var.lerp_(variance_C * (count / (count - 1)), step)


def synchronize_batch_norms(module: nn.Module) -> None:
    """Replace every BatchNorm2d inside `module`, in place, by its synchronized form; the state dict stays the same."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, SynchronizedBatchNorm2d.of(child))


def has_synchronized_norms(module: nn.Module) -> bool:
    return any(isinstance(layer, SynchronizedBatchNorm2d) for layer in module.modules())


@torch.no_grad()
def _global_statistics(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the values per channel over all ranks, their mean (C,) and biased variance (C,), float32.

    Ranks' means and squared deviations are merged by the formula of Chan, Golub and LeVeque (1979): a difference
    of sums of squares would lose precision.
    """
    channels = features.shape[1]
    mine = torch.zeros(2 * channels + 1, device=features.device)
    if features.numel():
        variance_C, mean_C = torch.var_mean(features.float(), dim=(0, 2, 3), correction=0)
        mine = torch.cat([mean_C, variance_C, mine.new_tensor([features.numel() // channels])])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    mean_WC, variance_WC, count_W1 = torch.stack(gathered).split([channels, channels, 1], dim=1)
    count = count_W1.sum()
    mean_C = (count_W1 * mean_WC).sum(dim=0) / count
    variance_C = (count_W1 * (variance_WC + (mean_WC - mean_C).square())).sum(dim=0) / count
    return count, mean_C, variance_C


class _Normalize(torch.autograd.Function):
    """Computes (x - mean) / sqrt(variance + eps) * weight + bias, where mean and variance depend on all ranks' x."""

    @staticmethod
    def forward(ctx: Any, features, weight, bias, mean_C, variance_C, count, eps):
        ctx.save_for_backward(features, weight, mean_C, (variance_C + eps).rsqrt(), count)
        return functional.batch_norm(features, mean_C, variance_C, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        """Computes dx = w / sigma * (dy - E[dy] - xhat * E[dy * xhat]), E over all ranks (Ioffe and Szegedy, 2015)."""
        features, weight, mean_C, inverse_std_C, count = ctx.saved_tensors
        gradient = gradients[0].float()
        normalized = (features.float() - _channels(mean_C)) * _channels(inverse_std_C)
        bias_gradient_C = gradient.sum(dim=(0, 2, 3))
        weight_gradient_C = (gradient * normalized).sum(dim=(0, 2, 3))
        sums_2C = torch.stack([bias_gradient_C, weight_gradient_C])
        dist.all_reduce(sums_2C)
        mean_gradient_C, mean_product_C = sums_2C / count
        scale_C = inverse_std_C if weight is None else inverse_std_C * weight
        centered = gradient - _channels(mean_gradient_C) - normalized * _channels(mean_product_C)
        input_gradient = (centered * _channels(scale_C)).to(features.dtype)
        _, with_weight, with_bias, *_ = ctx.needs_input_grad
        affine = (weight_gradient_C if with_weight else None, bias_gradient_C if with_bias else None)
        return input_gradient, *affine, None, None, None, None


def _channels(values_C: Tensor) -> Tensor:
    return values_C.view(1, -1, 1, 1)


def fold_batch_norms(network: nn.Module) -> GraphModule:
    """Returns a copy of `network` in inference mode with batch norms folded into the convolutions before them.

    With w, b of the convolution, mean m, variance v, scale g, shift s of the norm and k = g / sqrt(v + eps), a
    convolution with weight k * w and bias k * (b - m) + s replaces both. A batch norm stays where its input is anything
    but the output of one convolution that nothing else uses.
    """
    network = copy.deepcopy(network).eval()
    traced = GraphModule(network, _LayerTracer().trace(network))
    uses = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        norm = _layer(traced, node)
        before = node.args[0] if node.args else None
        if not isinstance(norm, nn.BatchNorm2d) or not isinstance(before, Node):
            continue
        convolution = _layer(traced, before)
        if isinstance(convolution, nn.Conv2d) and len(before.users) == 1 and uses[before.target] == 1:
            traced.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


class _LayerTracer(Tracer):
    """Keeps every layer whole that is a kind of torch's convolution."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def _layer(traced: GraphModule, node: Node) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None
