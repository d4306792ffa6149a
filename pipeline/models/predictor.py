"""The resolution predictor: the four architectures of the paper's supplement, Table 1."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from pipeline.models.small_resnet import init_convolutions, residual_block, scaled_channels

ARCHITECTURES = (1, 2, 3, 4)
_CHANNELS = (64, 128, 256, 512)


class Predictor(nn.Module):
    """Stem, body, average pooling, dropout and classifier over the R candidate resolutions.

    Args:
        stem, body: convolutional parts, applied in this order.
        num_features: channels that `body` gives.
        num_resolutions: R.
        dropout: probability of zeroing a pooled feature.
    """

    def __init__(self, stem: nn.Module, body: nn.Module, num_features: int, num_resolutions: int, dropout: float):
        super().__init__()
        self.stem = stem
        self.body = body
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(num_features, num_resolutions)
        init_convolutions(self)
        # Logits near zero: every candidate is drawn equally often at the start, so each one's loss is seen.
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, R) of images (N, 3, S, S), S at least 16."""
        return self.fc(self.dropout(self.pool(self.body(self.stem(images))).flatten(1)))


def build_predictor(architecture: int, num_resolutions: int, *, width: float = 1.0, dropout: float = 0.2) -> Predictor:
    """One of the paper's four predictors [Zhu et al., NeurIPS 2021, supplement, Table 1].

    1. 7x7/2 stem, then one BasicBlock each of 64, 128, 256 and 512 channels (290 M multiply-adds at 128x128).
    2. As 1, with the first two blocks only (173 M).
    3. As 2, with a stem of stride 4 (43 M).
    4. 7x7/2 stem, then one convolution of 64 channels (89.9 M). The source does not give that convolution's size;
       7x7 with stride 2 is inferred, as the size that gives the cost which the table states.

    Args:
        architecture: 1, 2, 3 or 4.
        num_resolutions: R.
        width: multiplies every channel count; the result is rounded to a multiple of 8, at least 8.
        dropout: before the classifier.

    Raises:
        ValueError: unknown architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"predictor architecture {architecture} is not one of 1, 2, 3, 4")
    channels = [scaled_channels(base, width) for base in _CHANNELS]
    stem = _stem(channels[0], stride=4 if architecture == 3 else 2)
    if architecture == 4:
        return Predictor(stem, _convolution(channels[0], channels[0], stride=2), channels[0], num_resolutions, dropout)
    num_blocks = 4 if architecture == 1 else 2
    body = _residual_stages(channels[:num_blocks])
    return Predictor(stem, body, channels[num_blocks - 1], num_resolutions, dropout)


def _stem(channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*_convolution(3, channels, stride), nn.MaxPool2d(3, stride=2, padding=1))


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 7, stride=stride, padding=3, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _residual_stages(channels: list[int]) -> nn.Sequential:
    first = residual_block(channels[0], channels[0], stride=1)
    return nn.Sequential(first, *(residual_block(i, o, stride=2) for i, o in itertools.pairwise(channels)))
