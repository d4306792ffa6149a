"""Batch norm whose training statistics are those of the images of all ranks.

torch.nn.SyncBatchNorm does this on accelerators only and raises on a CPU; this runs on any device and backend, in the
same way, so what is tested on CPUs is what trains on GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d that, in training mode, normalises with statistics over all ranks' values.

    Every rank must run it in the same order, also one that has no image. Gradients of scale and shift are those of
    the rank's own images, as of any parameter; the input's gradient includes what other ranks' outputs owe to it.
    Alone, or in inference mode, it is a BatchNorm2d to the last bit.
    """

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> SynchronizedBatchNorm2d:
        """The same layer with the same parameters and buffers, synchronised."""
        layer = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta")
        layer._parameters, layer._buffers = norm._parameters, norm._buffers
        return layer.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, H, W); N may be 0 where another rank has images."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        count, mean_C, variance_C = _global_statistics(input)
        if self.track_running_stats:
            self._track(count, mean_C, variance_C)
        return _Normalize.apply(input, self.weight, self.bias, mean_C, variance_C, count, self.eps)

    @torch.no_grad()
    def _track(self, count: Tensor, mean_C: Tensor, variance_C: Tensor) -> None:
        """Move the running statistics as BatchNorm2d does, with the unbiased variance."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        step = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C, step)
        self.running_var.lerp_(variance_C * (count / (count - 1)), step)


def synchronize_batch_norms(module: nn.Module) -> None:
    """Replace every BatchNorm2d inside `module`, in place, by its synchronised form; the state dict stays the same."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, SynchronizedBatchNorm2d.of(child))


def has_synchronized_norms(module: nn.Module) -> bool:
    return any(isinstance(layer, SynchronizedBatchNorm2d) for layer in module.modules())


@torch.no_grad()
def _global_statistics(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of values of a channel over all ranks, their mean (C,) and biased variance (C,), float32.

    Ranks' means and squared deviations are merged by the formula of Chan, Golub and LeVeque (1979): sums of squares
    would cancel.
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
    """(x - mean) / sqrt(variance + eps) * weight + bias, with mean and variance functions of x on all ranks."""

    @staticmethod
    def forward(ctx: Any, features, weight, bias, mean_C, variance_C, count, eps):
        ctx.save_for_backward(features, weight, mean_C, (variance_C + eps).rsqrt(), count)
        return functional.batch_norm(features, mean_C, variance_C, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        """dx = w / sigma * (dy - E[dy] - xhat * E[dy * xhat]), E over all ranks' values (Ioffe and Szegedy, 2015)."""
        features, weight, mean_C, inverse_std_C, count = ctx.saved_tensors
        gradient = gradients[0].float()
        normalized = (features.float() - _channels(mean_C)) * _channels(inverse_std_C)
        bias_gradient_C = gradient.sum(dim=(0, 2, 3))
        weight_gradient_C = (gradient * normalized).sum(dim=(0, 2, 3))
        sums_2C = torch.stack([bias_gradient_C, weight_gradient_C])
        dist.all_reduce(sums_2C)
        mean_gradient_C, mean_product_C = sums_2C / count
        scale_C = inverse_std_C if weight is None else inverse_std_C * weight
        centred = gradient - _channels(mean_gradient_C) - normalized * _channels(mean_product_C)
        input_gradient = (centred * _channels(scale_C)).to(features.dtype)
        _, with_weight, with_bias, *_ = ctx.needs_input_grad
        affine = (weight_gradient_C if with_weight else None, bias_gradient_C if with_bias else None)
        return input_gradient, *affine, None, None, None, None


def _channels(values_C: Tensor) -> Tensor:
    return values_C.view(1, -1, 1, 1)
