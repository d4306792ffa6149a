"""Strided 1x1 convolutions of few channels, without the CPU kernel that corrupts memory."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn
from torch.nn import functional

MIN_CHANNELS = 16
"""The number of input channels from which oneDNN's strided kernel is safe."""


class NarrowProjection(nn.Conv2d):
    """A strided 1x1 convolution that drops the pixels which the stride skips, then runs with stride 1.

    In torch 2.13, oneDNN's backward pass of such a convolution writes outside its memory on a CPU with several threads
    (float32, channels_last, fewer than MIN_CHANNELS input channels), and the process dies with SIGSEGV or SIGBUS.
    Result, parameters and multiply-adds equal those of nn.Conv2d.
    """

    @classmethod
    def of(cls, convolution: nn.Conv2d) -> Self:
        """Return a NarrowProjection with the parameters of `convolution`."""
        layer = cls(convolution.in_channels, convolution.out_channels, 1, groups=convolution.groups, device="meta")
        layer.stride, layer._parameters = convolution.stride, convolution._parameters
        return layer.train(convolution.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return features (N, C', ceil(H / stride), ceil(W / stride)) for features (N, C, H, W)."""
        rows, columns = (int(step) for step in self.stride)
        return functional.conv2d(input[:, :, ::rows, ::columns], self.weight, self.bias, groups=self.groups)


def avoid_unsafe_projections(module: nn.Module) -> None:
    """Replace every strided 1x1 convolution of few channels inside `module`, in place, by a NarrowProjection.

    Raises:
        ValueError: such a convolution is of another class, for example one with standardized weights.
    """
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.Conv2d) and _is_unsafe(child):
                if type(child).forward is not nn.Conv2d.forward:
                    raise ValueError(
                        f"{type(module).__name__} has a strided 1x1 {type(child).__name__} of {child.in_channels} "
                        "input channels, which can corrupt memory on a CPU; choose another backbone"
                    )
                setattr(parent, name, NarrowProjection.of(child))


def _is_unsafe(convolution: nn.Conv2d) -> bool:
    return (
        convolution.kernel_size == (1, 1)
        and convolution.stride != (1, 1)
        and convolution.padding in ((0, 0), "valid")
        and convolution.in_channels < MIN_CHANNELS
    )
