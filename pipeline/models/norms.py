"""Norm layers that are private to a resolution, synchronized over ranks in training, or folded for inference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.func import functional_call
from torch.fx import Node
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

PrivateNorms = Literal["auto", "batch_norm", "all", "none"]


MIN_MOMENTUM = 0.1
"""The smallest momentum of a private batch norm: the weight of a new batch in its running statistics."""


class ResolutionNorm(nn.Module):
    """Private copies of one norm layer. The copy of resolution `active` normalizes.

    The statistics of an activation change with the input resolution. So mean, variance, scale and shift of a batch norm
    are private to a resolution, while convolutions and classifier are shared (Zhu et al., NeurIPS 2021, section 3.3).
    Other norms have private scale and shift.

    Args:
        norm: the layer to copy. With one copy, the result is exactly the layer's.
        num_copies: number of resolutions R, or 1 for a layer that all resolutions share.
    """

    active: int
    keeps_statistics: bool
    """In training mode, normalize with the batch's statistics but do not update the running statistics."""
    frozen: bool
    """Normalize with the running statistics in training mode too. Set this before calling `train()`."""

    def __init__(self, norm: nn.Module, num_copies: int):
        super().__init__()
        self.norms = nn.ModuleList([norm, *(copy.deepcopy(norm) for _ in range(num_copies - 1))])
        if num_copies > 1:
            self._adapt_quickly()
        self.active = 0
        self.keeps_statistics = self.frozen = False

    def _adapt_quickly(self) -> None:
        """Give the copies at least torch's default momentum.

        Some of torchvision's networks have 0.01 or 0.0003. After a short training from published weights, the running
        statistics of a small resolution would still be those of 224 px.
        """
        for norm in self.norms:
            momentum = getattr(norm, "momentum", None)
            if momentum is not None:
                setattr(norm, "momentum", max(momentum, MIN_MOMENTUM))  # noqa: B010  Module's attributes are layers

    def train(self, mode: bool = True) -> Self:
        """Set training mode. The statistics of a frozen layer stay in inference mode."""
        super().train(mode)
        for norm in self.norms:
            norm.training = mode and not self.frozen  # but not the mode of its activation and dropout
        return self

    def at(self, index: int) -> nn.Module:
        """Return the layer that resolution `index` uses."""
        return self.norms[index if len(self.norms) > 1 else 0]

    def forward(self, features: Tensor) -> Tensor:
        """Normalize (N, C, H, W), or any other shape that the layer accepts, with the active copy."""
        norm = self.at(self.active)
        if self.keeps_statistics:
            return functional_call(norm, {name: value.clone() for name, value in norm.named_buffers()}, features)
        return norm(features)

    def extra_repr(self) -> str:
        return f"active={self.active}"


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_TIMM_NORMS = {f"timm.layers.{file}" for file in ("norm", "norm_act", "grn", "evo_norm", "filter_response_norm")}
"""Modules of timm whose norm layers are not subclasses of torch's."""


def _is_norm(layer: nn.Module) -> bool:
    known = isinstance(layer, _BATCH_NORMS + _OTHER_NORMS)
    return known or any(kind.__module__ in _TIMM_NORMS for kind in type(layer).__mro__)


def make_resolution_aware(
    module: nn.Module, num_resolutions: int, private: PrivateNorms = "auto"
) -> list[ResolutionNorm]:
    """Replace norm layers inside `module`, in place, by ResolutionNorms that start from their values.

    Args:
        private: the layers with a copy for each resolution: `batch_norm`, `all` norms, `none`, or `auto`, which means
            `batch_norm` if the network has any and `all` otherwise. A batch norm that all resolutions share is replaced
            as well, because its statistics may have to be frozen or kept.

    Returns:
        The new layers, in the order of `module.modules()`.

    Raises:
        ValueError: `num_resolutions` is not positive, or `module` has no such layers or already is resolution-aware.
    """
    kind = type(module).__name__
    if num_resolutions < 1:
        raise ValueError(f"num_resolutions is {num_resolutions}. Give at least 1.")
    parents = list(module.modules())
    if any(isinstance(parent, ResolutionNorm) for parent in parents):
        raise ValueError(f"{kind} already is resolution-aware.")
    if private == "auto":
        private = "batch_norm" if any(isinstance(layer, _BATCH_NORMS) for layer in parents) else "all"
    replaced: dict[nn.Module, ResolutionNorm] = {}
    for parent in parents:
        for name, child in list(parent._modules.items()):
            is_batch_norm = isinstance(child, _BATCH_NORMS)
            if child is None or not (is_batch_norm or (private == "all" and _is_norm(child))):
                continue
            if child not in replaced:
                replaced[child] = ResolutionNorm(child, 1 if private == "none" else num_resolutions)
            setattr(parent, name, replaced[child])
    if not replaced and private != "none":
        lacks = "batch norm" if private == "batch_norm" else "norm layer"
        raise ValueError(
            f"{kind} has no {lacks} that could be private to a resolution. Set model.private_norms=none to share all "
            "weights, or choose another backbone."
        )
    return list(replaced.values())


def resolution_norms(module: nn.Module) -> list[ResolutionNorm]:
    """Return all ResolutionNorms inside `module`, in the order of `module.modules()`."""
    return [layer for layer in module.modules() if isinstance(layer, ResolutionNorm)]


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics inside `module` unchanged during the `with` block, in training mode too.

    This is for a forward pass that is repeated, so that a batch counts once.
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
    """Replace every ResolutionNorm inside `module`, in place, by the plain layer of resolution `index`."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, ResolutionNorm):
                setattr(parent, name, child.at(index))


class SynchronizedBatchNorm(_BatchNorm):
    """A BatchNorm1d or BatchNorm2d that, in training mode, normalizes with statistics over the values of all ranks.

    All ranks must run it in the same order, including ranks without images. Gradients of scale and shift come from the
    rank's own images, as for any parameter. The input's gradient includes the input's effect on other ranks' outputs.
    In a single process, or in inference mode, the results equal those of torch's layer bit for bit. Like timm's
    BatchNormAct2d, it then applies its dropout and activation, if it has any.
    """

    @classmethod
    def of(cls, norm: _BatchNorm) -> SynchronizedBatchNorm:
        """Return the synchronized version of a layer, with the same parameters, buffers, dropout and activation.

        Raises:
            ValueError: the layer is another kind of batch norm.
        """
        if type(norm).forward is not _BatchNorm.forward and list(norm._modules) != ["drop", "act"]:
            raise ValueError(
                f"a batch norm of type {type(norm).__name__} cannot be synchronized. Set "
                "training.sync_batch_norm=false."
            )
        layer = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta")
        layer._parameters, layer._buffers, layer._modules = norm._parameters, norm._buffers, norm._modules
        layer.training = norm.training
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, H, W) or (N, C). N may be 0 if another rank has images."""
        features = self._normalized(input)
        for layer in self.children():
            features = layer(features)
        return features

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept every shape (N, C, ...)."""

    def _normalized(self, input: Tensor) -> Tensor:
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
    """Replace every batch norm inside `module`, in place, by its synchronized version, with the same state dict."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, _BATCH_NORMS):
                setattr(parent, name, SynchronizedBatchNorm.of(child))


def has_synchronized_norms(module: nn.Module) -> bool:
    """Return whether `module` contains a synchronized batch norm."""
    return any(isinstance(layer, SynchronizedBatchNorm) for layer in module.modules())


@torch.no_grad()
def _global_statistics(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of values per channel over all ranks, their mean (C,) and biased variance (C,), float32.

    The ranks' means and squared deviations are merged by the formula of Chan, Golub and LeVeque (1979), because a
    difference of sums of squares would lose precision.
    """
    channels = features.shape[1]
    mine = torch.zeros(2 * channels + 1, device=features.device)
    if features.numel():
        variance_C, mean_C = torch.var_mean(features.float(), dim=_all_but_channels(features), correction=0)
        mine = torch.cat([mean_C, variance_C, mine.new_tensor([features.numel() // channels])])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    mean_WC, variance_WC, count_W1 = torch.stack(gathered).split([channels, channels, 1], dim=1)
    count = count_W1.sum()
    mean_C = (count_W1 * mean_WC).sum(dim=0) / count
    variance_C = (count_W1 * (variance_WC + (mean_WC - mean_C).square())).sum(dim=0) / count
    return count, mean_C, variance_C


class _Normalize(torch.autograd.Function):
    """Compute (x - mean) / sqrt(variance + eps) * weight + bias, where mean and variance depend on all ranks' x."""

    @staticmethod
    def forward(ctx: Any, features, weight, bias, mean_C, variance_C, count, eps):
        ctx.save_for_backward(features, weight, mean_C, (variance_C + eps).rsqrt(), count)
        return functional.batch_norm(features, mean_C, variance_C, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        """Compute dx = w / sigma * (dy - E[dy] - xhat * E[dy * xhat]), E over all ranks (Ioffe and Szegedy, 2015)."""
        features, weight, mean_C, inverse_std_C, count = ctx.saved_tensors
        gradient = gradients[0].float()
        shape, others = (1, -1) + (1,) * (features.ndim - 2), _all_but_channels(features)
        normalized = (features.float() - mean_C.view(shape)) * inverse_std_C.view(shape)
        bias_gradient_C = gradient.sum(dim=others)
        weight_gradient_C = (gradient * normalized).sum(dim=others)
        sums_2C = torch.stack([bias_gradient_C, weight_gradient_C])
        dist.all_reduce(sums_2C)
        mean_gradient_C, mean_product_C = sums_2C / count
        scale_C = inverse_std_C if weight is None else inverse_std_C * weight
        centered = gradient - mean_gradient_C.view(shape) - normalized * mean_product_C.view(shape)
        input_gradient = (centered * scale_C.view(shape)).to(features.dtype)
        _, with_weight, with_bias, *_ = ctx.needs_input_grad
        affine = (weight_gradient_C if with_weight else None, bias_gradient_C if with_bias else None)
        return input_gradient, *affine, None, None, None, None


def _all_but_channels(features: Tensor) -> list[int]:
    return [0, *range(2, features.ndim)]


_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)


@torch.no_grad()
def fold_batch_norms(program: ExportedProgram) -> int:
    """Fold the batch norms of an inference program, in place, into the convolutions before them.

    With weight w and bias b of the convolution, mean m, variance v, scale g and shift s of the norm, and k = g / sqrt(v
    + eps), a convolution with weight k * w and bias k * (b - m) + s replaces both. A batch norm stays unless its input
    is the output of one convolution that nothing else uses. A program's graph consists of operations, not layers, so
    the type of the layer does not matter, and an activation inside a layer stays.

    Returns:
        The number of batch norms that were folded.
    """
    signature, state = program.graph_signature, program.state_dict
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def stored(node: Any) -> Any:
        return None if node is None else state[names[node.name]]

    folded = 0
    for norm in list(program.graph.nodes):
        convolution = norm.args[0] if norm.target is torch.ops.aten.batch_norm.default else None
        if not isinstance(convolution, Node) or convolution.target not in _CONVOLUTIONS or len(convolution.users) > 1:
            continue
        arguments: list[Any] = [*convolution.args]
        weight, bias = arguments[1], arguments[2] if len(arguments) > 2 else None
        _, scale, shift, mean, variance, _, _, eps, _ = norm.args
        if not _is_own_tensor(weight, names) or not _is_own_tensor(shift, names) or (bias and bias.name not in names):
            continue
        state[names[weight.name]], state[names[shift.name]] = fuse_conv_bn_weights(
            stored(weight), stored(bias), stored(mean), stored(variance), eps, stored(scale), stored(shift)
        )
        convolution.args = (*arguments[:2], shift, *arguments[3:])
        norm.replace_all_uses_with(convolution)
        program.graph.erase_node(norm)
        folded += 1
    program.graph_module.recompile()
    return folded


def _is_own_tensor(node: Any, names: dict[str, str]) -> bool:
    """Return whether an argument is a stored tensor that only one operation uses."""
    return isinstance(node, Node) and node.name in names and len(node.users) == 1
