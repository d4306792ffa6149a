"""What ranks exchange. Works without a process group too, as a world of one.

Gradients are reduced here rather than by DistributedDataParallel: a step runs backward several times (once per
resolution, on sub-batches that may be empty on a rank), and the private batch norms of an unchosen resolution get no
gradient at all. One flat sum a step is exact in every one of these cases.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, as a new tensor without gradient."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its sum over the ranks, in one message for each dtype.

    A parameter without gradient counts as zero, on one rank as on many, so that optimisers treat a resolution that
    nobody chose in this step the same way everywhere.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if world_size() == 1:
        return
    for dtype in {parameter.dtype for parameter in trained}:
        gradients = [parameter.grad for parameter in trained if parameter.dtype == dtype and parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view(gradient.shape))


def average_running_statistics(model: nn.Module) -> None:
    """Replace the batch norms' running means and variances by their means over the ranks.

    Each rank updates them from its own sub-batches; after this every rank, and the checkpoint, holds the same model.
    """
    if world_size() == 1:
        return
    statistics = [buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    flat = torch.cat([buffer.flatten() for buffer in statistics])
    dist.all_reduce(flat)
    flat /= world_size()
    for buffer, part in zip(statistics, flat.split([buffer.numel() for buffer in statistics]), strict=True):
        buffer.copy_(part.view(buffer.shape))
