"""Communication between ranks. Without a process group, every function behaves as for a single rank.

GradientReducer replaces DistributedDataParallel, because a step runs several backward passes (one per resolution, on
sub-batches that may be empty on a rank), and the private batch norms of an unchosen resolution get no gradient.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from queue import SimpleQueue
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout

Value = TypeVar("Value")


def rank() -> int:
    """Return this process's rank, or 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, or 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of `value` over all ranks, as a new tensor without gradient."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


BUCKET_BYTES = 4 * 2**20
"""The minimum bytes of a message, if enough gradients are left. Smaller messages cost latency; larger ones overlap
less."""


class GradientReducer:
    """Sum gradients over the ranks, and send them while the backward pass that completes them is still running.

    The parameters form buckets in the order in which a backward pass completes their gradients. A bucket is sent once
    all of its gradients are complete and the bucket before it is sent. So every rank sends the same messages in the
    same order, whatever its images are. A thread sends them in a separate process group, so that the step's other
    messages (synchronized batch norms, the mean cost) neither wait for them nor get mixed up with them.

    Within the `with` block, each step runs its backward passes, the last one inside `last_pass()`, and then calls
    `finish`. A single process has no hooks, no thread and no copies.

    Args:
        early: parameters that get a gradient in the last backward pass of every step, in the order of that pass.
        late: the other parameters, sent at the end in one message with the loss, always as float32.
        wire: dtype of the other messages. bfloat16 halves their bytes; the sums over the ranks are still float32.
        bucket_bytes: minimum size of a bucket in float32.
    """

    def __init__(
        self,
        early: Sequence[nn.Parameter],
        late: Sequence[nn.Parameter] = (),
        *,
        wire: torch.dtype = torch.float32,
        bucket_bytes: int = BUCKET_BYTES,
    ):
        self._num_sent = 0  # the step's messages that were sent before `finish`
        self._parameters, self._wire, self._completing = [*early, *late], wire, False
        if world_size() == 1:
            return
        device = self._parameters[0].device if self._parameters else torch.device("cpu")
        self._early = [_Bucket(group, device) for group in _cut(early, bucket_bytes)]
        self._last = _Bucket([*late, torch.zeros((), device=device)], device)
        self._group = _gradient_group(dist.group.WORLD)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._queue: SimpleQueue[_Bucket | None] = SimpleQueue()

    def __enter__(self) -> Self:
        if world_size() > 1:
            self._hooks = [
                parameter.register_post_accumulate_grad_hook(partial(self._changed, bucket))
                for bucket in self._early
                for parameter in bucket.tensors
            ]
            # A daemon thread, so that a rank that fails can exit while the others do not answer.
            threading.Thread(target=self._send_queued, name="gradients", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if world_size() > 1:
            for hook in self._hooks:
                hook.remove()
            self._queue.put(None)

    @contextmanager
    def last_pass(self) -> Iterator[None]:
        """Mark a backward pass after which no other pass of the step changes the gradients that it reaches."""
        self._completing = True
        try:
            yield
        finally:
            self._completing = False

    def finish(self, loss: Tensor) -> Tensor:
        """Replace every gradient by its sum over the ranks.

        A parameter without gradient counts as zero, even with a single rank. So the optimizer treats a resolution that
        no image chose in the same way for any number of ranks. A frozen parameter gets no gradient, so the optimizer
        skips it.

        Args:
            loss: this rank's loss, a scalar, which is summed in the last message.

        Returns:
            The sum of `loss` over the ranks, without gradient.

        Raises:
            RuntimeError: another rank did not answer.
        """
        if world_size() == 1:
            for parameter in self._parameters:
                if parameter.grad is None and parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            return loss.detach().clone()
        for bucket in self._early[self._num_sent :]:
            self._send(bucket)
        *_, total = self._last.tensors
        total.grad = loss.detach()
        self._send(self._last)
        self._num_sent = 0
        for bucket in (*self._early, self._last):
            bucket.wait()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        assert total.grad is not None
        return total.grad.clone()

    def _changed(self, bucket: _Bucket, parameter: Tensor) -> None:
        """Record that a parameter's gradient is complete. Autograd calls this during backward passes."""
        assert parameter in bucket.missing, "a gradient changed after it was complete"
        if not self._completing:
            return
        bucket.missing.remove(parameter)
        while self._num_sent < len(self._early) and not self._early[self._num_sent].missing:
            self._send(self._early[self._num_sent])
            self._num_sent += 1

    def _send(self, bucket: _Bucket) -> None:
        bucket.fill()
        if self._stream is not None:
            bucket.filled = torch.cuda.current_stream(self._stream.device).record_event()
        self._queue.put(bucket)

    def _send_queued(self) -> None:
        """Send queued buckets one after the other. This is the body of the sending thread."""
        while (bucket := self._queue.get()) is not None:
            wire = torch.float32 if bucket is self._last else self._wire
            try:
                with self._on_stream(bucket):
                    _sum_in_place(bucket.flat, wire, self._group)
                bucket.sent.set_result(None)
            except Exception as error:
                bucket.sent.set_exception(error)

    def _on_stream(self, bucket: _Bucket) -> AbstractContextManager:
        """Make GPU messages wait for the bucket's gradients, while the backward pass continues in parallel."""
        if self._stream is None:
            return nullcontext()
        assert bucket.filled is not None
        self._stream.wait_event(bucket.filled)
        return torch.cuda.stream(self._stream)


class _Bucket:
    """Gradients that are sent in one message, and their positions in the message.

    Attributes:
        missing: tensors whose gradients are not complete yet.
        flat: the message, float32; its length is a multiple of the number of ranks.
        filled: GPU event after which `flat` contains the gradients.
        sent: done when `flat` contains the sums or, on a GPU, when the sums are queued.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device):
        self.tensors, self.missing = tensors, set(tensors)
        sizes = [tensor.numel() for tensor in tensors]
        self.flat = torch.zeros(-(-sum(sizes) // world_size()) * world_size(), device=device)
        # Use the parameter's own strides, so that neither copies nor the optimizer permute channels_last weights.
        starts = itertools.accumulate([0, *sizes[:-1]])
        self.parts = [
            self.flat.as_strided(tensor.shape, tensor.stride(), start)
            for tensor, start in zip(tensors, starts, strict=True)
        ]
        self.filled: torch.cuda.Event | None = None
        self.sent: Future[None] = Future()

    def fill(self) -> None:
        """Copy the gradients into the message. A gradient that is None counts as zero."""
        for tensor, part in zip(self.tensors, self.parts, strict=True):
            part.zero_() if tensor.grad is None else part.copy_(tensor.grad)

    def wait(self) -> None:
        """Wait for the sums, make them the gradients, and prepare for the next step."""
        self.sent.result()
        for tensor, part in zip(self.tensors, self.parts, strict=True):
            if tensor.requires_grad or not isinstance(tensor, nn.Parameter):  # not frozen
                tensor.grad = part
        self.missing, self.sent = set(self.tensors), Future()


def _cut(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[Tensor]]:
    """Cut parameters into consecutive groups of at least `bucket_bytes`. The last group may be smaller."""
    groups: list[list[Tensor]] = []
    room = 0
    for parameter in parameters:
        if room <= 0:
            groups.append([])
            room = bucket_bytes
        groups[-1].append(parameter)
        room -= parameter.nbytes
    return groups


def _sum_in_place(flat: Tensor, wire: torch.dtype, group: dist.ProcessGroup) -> None:
    """Replace a float32 message by its sum over the ranks. Its length must be a multiple of their number.

    With another dtype on the wire, each rank receives the others' values for its part of the message, adds them in
    float32, rounds the sum and sends it to all. So a value is rounded twice, whatever the number of ranks.
    """
    if wire == flat.dtype:
        dist.all_reduce(flat, group=group)
        return
    parts = flat.view(world_size(), -1)
    sent = parts.to(wire)
    received = sent.clone()
    _exchange(list(sent), list(received), group)
    share = received.sum(dim=0, dtype=flat.dtype).to(wire)
    received[rank()] = share
    _exchange([share] * world_size(), list(received), group)
    parts.copy_(received)


def _exchange(sent: Sequence[Tensor], received: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Send one tensor to each other rank, and receive one from it. Both sequences are in the order of the ranks.

    All receives are requested before any send. gloo's own all_to_all and all_gather mix both: a request to
    receive then waits behind data that the same rank sends, so a link carries data in only one direction at a time
    (`jobs.bench network`).
    """
    peers = [(rank() + step) % world_size() for step in range(1, world_size())]
    receiving = [dist.P2POp(dist.irecv, received[peer], peer, group) for peer in peers]
    sending = [dist.P2POp(dist.isend, sent[peer], peer, group) for peer in peers]
    for work in dist.batch_isend_irecv([*receiving, *sending]):
        work.wait()


@cache
def _gradient_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return the process group for gradient messages. All ranks of `world` must call this together."""
    group = dist.new_group(timeout=default_pg_timeout)  # NCCL's own default is shorter
    assert isinstance(group, dist.ProcessGroup)
    return group


def average_running_statistics(model: nn.Module) -> None:
    """Replace the batch norms' running means and variances by their averages over the ranks.

    Each rank updates them from its own sub-batches. Afterwards every rank, and the checkpoint, has the same model. A
    value that is already equal on every rank, as in a frozen layer, is kept, because a computed average of equal values
    may differ in the last bits.
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
    """Return every rank's value, in the order of the ranks. Values must be small and picklable."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def from_first_rank(value: Value) -> Value:
    """Return rank 0's value on all ranks."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def _reduce_in_place(tensors: Sequence[Tensor], operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """Replace tensors by their sums (or minima, maxima) over the ranks, with one message per dtype."""
    if world_size() == 1:
        return
    # Order dtypes by appearance, which is the same on every rank; otherwise ranks could mix up their messages.
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same_dtype = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in same_dtype])
        dist.all_reduce(flat, operation)
        for tensor, part in zip(same_dtype, flat.split([tensor.numel() for tensor in same_dtype]), strict=True):
            tensor.copy_(part.view(tensor.shape))
