"""What ranks exchange. Without a process group, everything works as for a single rank.

This replaces DistributedDataParallel because a step runs several backward passes (one per resolution, on sub-batches
that may be empty on a rank), and the private batch norms of an unchosen resolution get no gradient. One flat sum per
step is exact in all these cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Value = TypeVar("Value")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """Returns the sum of `value` over all ranks, as a new tensor without gradient."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def sum_gradients(parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
    """Replace every gradient by its sum over the ranks, in one message for each dtype.

    A parameter without gradient counts as zero, also with a single rank, so that the optimizer treats a resolution
    that no image chose in the same way on any number of ranks.

    Args:
        loss: this rank's loss, a scalar that is summed in the same message.

    Returns:
        The sum of `loss` over the ranks, without gradient.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    total = loss.detach().clone()
    _reduce_in_place([*(parameter.grad for parameter in trained if parameter.grad is not None), total])
    return total


def average_running_statistics(model: nn.Module) -> None:
    """Replace the batch norms' running means and variances by their means over the ranks.

    Each rank updates them from its own sub-batches; after this every rank, and the checkpoint, holds the same model.
    A value that is the same on every rank, as in a frozen layer, keeps its bits: the mean of equal values may not.
    """
    statistics = [buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    if world_size() == 1:
        return
    lowest, highest = ([buffer.clone() for buffer in statistics] for _ in range(2))
    _reduce_in_place(statistics)
    _reduce_in_place(lowest, dist.ReduceOp.MIN)
    _reduce_in_place(highest, dist.ReduceOp.MAX)
    for buffer, low, high in zip(statistics, lowest, highest, strict=True):
        buffer.copy_(torch.where(low == high, low, buffer / world_size()))


def gather(value: Value) -> list[Value]:
    """Returns every rank's value in the order of the ranks, for small values that pickle takes."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def from_first_rank(value: Value) -> Value:
    """Returns rank 0's value on all ranks."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def _reduce_in_place(tensors: Sequence[Tensor], operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """Replace tensors by their sums (or minima, maxima) over the ranks, in one message for each dtype."""
    if world_size() == 1:
        return
    # In order of appearance, which is the same on every rank: otherwise messages of different dtypes could be mixed up.
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in alike])
        dist.all_reduce(flat, operation)
        for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(part.view(tensor.shape))
