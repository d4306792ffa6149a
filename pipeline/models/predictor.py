"""The resolution predictor: a family of small networks that includes the paper's four (supplement, Table 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.backbone import avoid_unsafe_projections, init_convolutions, residual_block, scaled_channels

_CHANNELS = (64, 128, 256, 512)
MAX_STAGES = len(_CHANNELS)


@dataclass(frozen=True)
class PredictorShape:
    """The shape of a predictor. Width and input size are separate settings.

    Attributes:
        blocks: number of BasicBlocks in each stage; at most MAX_STAGES stages, with 64, 128, 256 and 512 channels. 0
            means one plain convolution with stride 2.
        kernel: side of the kernels of the stem and the plain convolutions, odd.
        stem_stride: stride of the stem's convolution; a max pool of stride 2 follows.

    Raises:
        ValueError: lists all problems.
    """

    blocks: tuple[int, ...]
    kernel: int = 7
    stem_stride: int = 2

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= len(self.blocks) <= MAX_STAGES or min(self.blocks) < 0:
            problems.append(f"blocks {list(self.blocks)}: give 1 to {MAX_STAGES} stages of 0 or more blocks each")
        if self.kernel < 1 or self.kernel % 2 == 0:
            problems.append(f"kernel {self.kernel}: give an odd side")
        if self.stem_stride < 1:
            problems.append(f"stem_stride {self.stem_stride}: give 1 or more")
        if problems:
            raise ValueError(f"the predictor cannot be built: {'; '.join(problems)}")


ARCHITECTURES = {
    1: PredictorShape((1, 1, 1, 1)),
    2: PredictorShape((1, 1)),
    3: PredictorShape((1, 1), stem_stride=4),
    4: PredictorShape((0,)),
}
"""The paper's four predictors [Zhu et al., NeurIPS 2021, supplement, Table 1], with the cost at 128x128 and width 1:

1. 7x7/2 stem, then one BasicBlock each of 64, 128, 256 and 512 channels (290 M multiply-adds).
2. As 1, with the first two blocks only (173 M).
3. As 2, with a stem of stride 4 (43 M).
4. 7x7/2 stem, then one convolution of 64 channels (89.9 M). The source does not give that convolution's size; 7x7 with
   stride 2 is inferred, because it gives the cost in the table.
"""


class Predictor(nn.Module):
    """Stem, body, average pooling, dropout, and a classifier over the R candidate resolutions.

    The network is trained on its `outputs`. Its scores are the outputs, or their sigmoids if `gives_probabilities` is
    true, plus `offset_R`. The resolution with the largest score is chosen. The offset makes the choices meet a budget.

    Args:
        stem, body: convolutional parts, applied in this order.
        num_features: number of channels of the body's output.
        num_resolutions: R.
        dropout: probability of zeroing a pooled feature.
    """

    offset_R: Tensor
    gives_probabilities: Tensor

    def __init__(self, stem: nn.Module, body: nn.Module, num_features: int, num_resolutions: int, dropout: float):
        super().__init__()
        self.stem = stem
        self.body = body
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(num_features, num_resolutions)
        self.register_buffer("offset_R", torch.zeros(num_resolutions))
        self.register_buffer("gives_probabilities", torch.tensor(False))
        self.register_load_state_dict_pre_hook(_complete_state)
        init_convolutions(self)
        # Outputs start near zero, so training first draws every resolution equally often and sees the loss of each.
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores (N, R), float32, for images (N, 3, S, S), S at least 16."""
        outputs_NR = self.outputs(images).float()
        return torch.where(self.gives_probabilities, outputs_NR.sigmoid(), outputs_NR) + self.offset_R

    def outputs(self, images: Tensor) -> Tensor:
        """Return outputs (N, R) for images (N, 3, S, S): logits of the choice, or of each resolution being correct."""
        return self.fc(self.dropout(self.pool(self.body(self.stem(images))).flatten(1)))

    def clear_offset(self, *, gives_probabilities: bool) -> None:
        """Reset the offset to zero, as at the start of training, and set what the outputs mean."""
        self.offset_R.zero_()
        self.gives_probabilities.fill_(gives_probabilities)


def _complete_state(predictor: Predictor, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Accept a state dict from before offsets existed: its scores are its outputs."""
    state.setdefault(f"{prefix}offset_R", torch.zeros_like(predictor.offset_R))
    state.setdefault(f"{prefix}gives_probabilities", torch.zeros_like(predictor.gives_probabilities))


def predictor_shape(
    architecture: int,
    *,
    blocks: Sequence[int] | None = None,
    kernel: int | None = None,
    stem_stride: int | None = None,
) -> PredictorShape:
    """Return the shape of one of the ARCHITECTURES, with the given parts replaced.

    Raises:
        ValueError: the architecture is unknown, or the shape is impossible.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"predictor architecture {architecture} is not one of 1, 2, 3, 4.")
    base = ARCHITECTURES[architecture]
    return PredictorShape(
        blocks=base.blocks if blocks is None else tuple(blocks),
        kernel=base.kernel if kernel is None else kernel,
        stem_stride=base.stem_stride if stem_stride is None else stem_stride,
    )


def build_predictor(
    shape: PredictorShape, num_resolutions: int, *, width: float = 1.0, dropout: float = 0.2
) -> Predictor:
    """Build a predictor, using the global random state.

    Args:
        num_resolutions: R.
        width: multiplier of every channel count; the result is rounded to a multiple of 8, at least 8.
        dropout: probability of dropout before the classifier.
    """
    channels = [scaled_channels(base, width) for base in _CHANNELS[: len(shape.blocks)]]
    stem = nn.Sequential(
        *_convolution(3, channels[0], shape.kernel, shape.stem_stride), nn.MaxPool2d(3, stride=2, padding=1)
    )
    body = nn.Sequential(*_body(shape, channels))
    avoid_unsafe_projections(body)
    return Predictor(stem, body, channels[-1], num_resolutions, dropout)


def start_with_shares(predictor: Predictor, shares_R: Sequence[float]) -> None:
    """Make an untrained predictor draw resolution j with probability shares_R[j] / sum(shares_R) for every image."""
    with torch.no_grad():
        predictor.fc.weight.zero_()
        predictor.fc.bias.copy_(torch.tensor(shares_R).log())


def _body(shape: PredictorShape, channels: Sequence[int]) -> Iterator[nn.Module]:
    inputs = channels[0]
    for stage, (count, outputs) in enumerate(zip(shape.blocks, channels, strict=True)):
        if count == 0:
            yield from _convolution(inputs, outputs, shape.kernel, stride=2)
        for block in range(count):
            # The stem has already reduced the sides, so the first stage keeps them.
            yield residual_block(inputs if block == 0 else outputs, outputs, stride=2 if stage and block == 0 else 1)
        inputs = outputs


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
