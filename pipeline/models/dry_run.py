"""Forward passes without computation: shapes on the meta device, and the memory that a training step needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call


def meta_forward(module: nn.Module, *inputs: Any, training: bool = False) -> Any:
    """Run `module(*inputs)` on the meta device, where tensors have shapes but no values."""
    state = {
        name: torch.empty_like(value, device="meta")
        for name, value in (*module.named_parameters(), *module.named_buffers())
    }
    on_meta = tuple(value.to("meta") if isinstance(value, Tensor) else value for value in inputs)
    # Run eagerly: after a first call on the meta device, torch.compile would silently never compile the module.
    with training_mode(module, training), torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        return functional_call(module, state, on_meta)


def meta_images(side: int, count: int = 1) -> Tensor:
    """Return images (count, 3, side, side) without values."""
    return torch.empty(count, 3, side, side, device="meta")


@contextmanager
def training_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Set training or eval mode inside the `with` block, then restore every layer's previous mode."""
    flags = [(layer, layer.training) for layer in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for layer, flag in flags:
            layer.training = flag


_BATCHES = (2, 4)


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps from forward to backward: per image, and once per step (weights cast to bfloat16)."""

    bytes_per_image: int
    fixed_bytes: int

    def of_batch(self, num_images: int) -> int:
        """Return the bytes for a batch."""
        return self.bytes_per_image * num_images + self.fixed_bytes


def measure_activations(module: nn.Module, side: int, *arguments: Any, precision: str = "float32") -> Activations:
    """Measure the bytes that autograd keeps for `module(images, *arguments)` in training mode. The module does not
    change.

    Args:
        side: side of the square images, in pixels.
        precision: float32, or `bfloat16` to run the forward pass under autocast.
    """
    small, large = (_kept_bytes(module, size, side, arguments, precision) for size in _BATCHES)
    per_image = (large - small) // (_BATCHES[1] - _BATCHES[0])
    return Activations(per_image, small - per_image * _BATCHES[0])


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of parameters or buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _kept_bytes(module: nn.Module, batch: int, side: int, arguments: tuple[Any, ...], precision: str) -> int:
    kept: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode() as fake:
        state: dict[str, Tensor] = {
            name: fake.from_tensor(value) for name, value in (*module.named_parameters(), *module.named_buffers())
        }
        own = {value.untyped_storage()._cdata for value in state.values()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage  # keep it alive, so that no other storage gets its address
            return tensor

        images = torch.empty(batch, 3, side, side).to(memory_format=torch.channels_last)
        with (
            training_mode(module, True),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
            saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            functional_call(module, state, (images, *arguments))
    return sum(storage.nbytes() for storage in kept.values())
