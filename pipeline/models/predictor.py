"""The resolution predictor: a family of small networks, of which the paper's four (supplement, Table 1) are points."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.backbone import init_convolutions, residual_block, scaled_channels
from pipeline.models.projection import avoid_unsafe_projections

_CHANNELS = (64, 128, 256, 512)
MAX_STAGES = len(_CHANNELS)


@dataclass(frozen=True)
class PredictorShape:
    """The shape of a predictor of the family; width and input size are separate.

    Attributes:
        blocks: BasicBlocks of each stage, at most MAX_STAGES stages of 64, 128, 256 and 512 channels. 0 stands for one
            plain convolution with stride 2.
        kernel: side of the stem's and the plain convolutions' kernel, odd.
        stem_stride: stride of the stem's convolution; a max pool of stride 2 follows.

    Raises:
        ValueError: lists everything that is wrong.
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
    """Stem, body, average pooling, dropout and classifier over the R candidate resolutions.

    A network is trained on its `outputs`. Its scores, of which the largest is the choice, are the outputs, or their
    sigmoids where `gives_probabilities` is true, plus `offset_R`: what makes the choices meet a budget.

    Args:
        stem, body: convolutional parts, applied in this order.
        num_features: channels of the body's output.
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
        # Outputs near zero: training draws every candidate equally often at first, and sees the loss of each.
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, R), float32, of images (N, 3, S, S), S at least 16."""
        outputs_NR = self.outputs(images).float()
        return torch.where(self.gives_probabilities, outputs_NR.sigmoid(), outputs_NR) + self.offset_R

    def outputs(self, images: Tensor) -> Tensor:
        """Outputs (N, R) of images (N, 3, S, S): logits of the choice, or of each resolution being right."""
        return self.fc(self.dropout(self.pool(self.body(self.stem(images))).flatten(1)))

    def clear_offset(self, *, gives_probabilities: bool) -> None:
        """Start from scores without an offset, as training does."""
        self.offset_R.zero_()
        self.gives_probabilities.fill_(gives_probabilities)


def _complete_state(predictor: Predictor, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a state dict from before offsets existed load: its scores are its outputs."""
    state.setdefault(f"{prefix}offset_R", torch.zeros_like(predictor.offset_R))
    state.setdefault(f"{prefix}gives_probabilities", torch.zeros_like(predictor.gives_probabilities))


def predictor_shape(
    architecture: int,
    *,
    blocks: Sequence[int] | None = None,
    kernel: int | None = None,
    stem_stride: int | None = None,
) -> PredictorShape:
    """Returns one of the ARCHITECTURES with the given parts changed.

    Raises:
        ValueError: the architecture is unknown, or the shape is impossible.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"predictor architecture {architecture} is not one of 1, 2, 3, 4")
    base = ARCHITECTURES[architecture]
    return PredictorShape(
        blocks=base.blocks if blocks is None else tuple(blocks),
        kernel=base.kernel if kernel is None else kernel,
        stem_stride=base.stem_stride if stem_stride is None else stem_stride,
    )


def build_predictor(
    shape: PredictorShape, num_resolutions: int, *, width: float = 1.0, dropout: float = 0.2
) -> Predictor:
    """Build a predictor of the family, from the global random state.

    Args:
        num_resolutions: R.
        width: multiplies every channel count; the result is rounded to a multiple of 8, at least 8.
        dropout: before the classifier.
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
            # The stem has reduced the sides already, so the first stage keeps them.
            yield residual_block(inputs if block == 0 else outputs, outputs, stride=2 if stage and block == 0 else 1)
        inputs = outputs


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
