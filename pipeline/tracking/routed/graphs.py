"""A program on a GPU, recorded as CUDA graphs: one launch for a whole pass instead of one for each of its kernels.

A group of a routed batch is small, so that telling the GPU what to do takes longer than doing it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UPS = 2
"""passes before one is recorded, which choose algorithms and allocate their workspaces"""


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    images: Tensor
    logits: Tensor


class GraphedProgram:
    """`program` for batches of any size, each filled up to one of few sizes, which are recorded when first needed.

    Args:
        program: uint8 (n, S, S, 3) -> (n, K), row by row, on the device, always the same kernels for the same n.

    A recording takes some passes' time and, as all of a program share their memory, little more than a pass's memory.
    """

    def __init__(self, program: Callable[[Tensor], Tensor], device: torch.device):
        self._program, self._device = program, device
        self._recordings: dict[int, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (n, K) on the device, not waited for, of images (n, S, S, 3) in pinned memory."""
        size = filled_size(len(images))
        with torch.cuda.device(self._device):
            if size not in self._recordings:
                self._recordings[size] = self._record(images.new_zeros(size, *images.shape[1:]))
            recording = self._recordings[size]
            recording.images[: len(images)].copy_(images, non_blocking=True)
            recording.graph.replay()
            # A copy: the next recording that runs writes to the same memory.
            return recording.logits[: len(images)].clone()

    def _record(self, example: Tensor) -> _Recording:
        images = example.to(self._device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._program(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            logits = self._program(images)
        return _Recording(graph, images, logits)


def filled_size(count: int) -> int:
    """The next size with at most 4 significant bits: at most an eighth more than `count`."""
    step = 1 << max(0, (count - 1).bit_length() - 4)
    return -(-count // step) * step
