"""Forward passes on the meta device: shapes only. Nothing is computed, allocated or changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def meta_forward(module: nn.Module, *inputs: Any) -> Any:
    """`module(*inputs)` in eval mode with stand-ins for parameters and buffers; tensors in `inputs` matter by shape."""
    state = {
        name: torch.empty_like(value, device="meta")
        for name, value in (*module.named_parameters(), *module.named_buffers())
    }
    on_meta = tuple(value.to("meta") if isinstance(value, Tensor) else value for value in inputs)
    # Eager: a first call that is counted would have torch.compile give the module up for good, without a word.
    with training_mode(module, False), torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        return functional_call(module, state, on_meta)


def meta_images(side: int) -> Tensor:
    """One image, (1, 3, side, side), without content."""
    return torch.empty(1, 3, side, side, device="meta")


@contextmanager
def training_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Training or eval mode inside; afterwards every layer's own flag is as it was."""
    flags = [(layer, layer.training) for layer in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for layer, flag in flags:
            layer.training = flag
