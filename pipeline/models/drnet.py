"""The dynamic resolution network (DRNet): backbone, resolution predictor, and the normalization of their input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.config.schema import Config, ModelConfig, PredictorConfig
from pipeline.models.backbone import ResolutionBackbone, build_backbone
from pipeline.models.predictor import Predictor, build_predictor, predictor_shape, start_with_shares
from pipeline.models.weights import weights_input


class DRNet(nn.Module):
    """Backbone and predictor for R candidate resolutions (Zhu et al., NeurIPS 2021).

    The network contains no policy: the caller decides at which resolution an image runs.

    Args:
        backbone, predictor: built for `len(resolutions)` candidates.
        resolutions: candidate sides in pixels; resolution index j means `resolutions[j]`.
        predictor_size: side of the predictor's input, in pixels.
        mean, std: normalization of the RGB channels on the scale 0..1.

    Raises:
        ValueError: mean or std does not have 3 values, or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: ResolutionBackbone,
        predictor: Predictor,
        resolutions: Sequence[int],
        predictor_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean {list(mean)} and std {list(std)} must have 3 values each, std above 0.")
        self.backbone = backbone
        self.predictor = predictor
        self.resolutions = tuple(resolutions)
        self.predictor_size = predictor_size
        self.memory_format = torch.channels_last
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    @property
    def sides(self) -> tuple[int, ...]:
        """The image sides that a batch must contain: the resolutions and the predictor's input, largest first."""
        return tuple(sorted({*self.resolutions, self.predictor_size}, reverse=True))

    def normalize(self, images: Tensor) -> Tensor:
        """Return (x / 255 - mean) / std: uint8 (N, H, W, 3) -> float32 (N, 3, H, W), on the model's device.

        The result has the memory format `memory_format`, because a convolution's format depends on its input as well as
        on its weights.
        """
        scale = (255 * self.std).reciprocal().view(1, 3, 1, 1)
        bias = (-self.mean / self.std).view(1, 3, 1, 1)
        # NHWC viewed as NCHW already is channels_last. The float copy keeps this layout and is changed in place.
        pixels = images.to(self.mean.device, non_blocking=True).permute(0, 3, 1, 2).float()
        return pixels.mul_(scale).add_(bias).contiguous(memory_format=self.memory_format)

    def predictor_logits(self, images: Mapping[int, Tensor]) -> Tensor:
        """Return the predictor's scores (N, R) for `images[predictor_size]`, uint8 (N, S, S, 3)."""
        return self.predictor(self.normalize(images[self.predictor_size]))

    def static_logits(self, images: Mapping[int, Tensor], resolution_index: int) -> Tensor:
        """Return class logits (N, K) of the batch at one resolution, for `images[resolutions[resolution_index]]`."""
        return self.backbone(self.normalize(images[self.resolutions[resolution_index]]), resolution_index)


def build_drnet(config: ModelConfig, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> DRNet:
    """Build the network that `config` describes, on the CPU, using the global random state.

    Raises:
        ValueError: the backbone, the weights or the predictor are not possible.
    """
    num_resolutions = len(config.resolutions)
    backbone = build_backbone(
        config.backbone,
        num_classes,
        num_resolutions,
        width=config.backbone_width,
        weights=config.weights,
        dropout=config.dropout,
        drop_path=config.drop_path,
        private_norms=config.private_norms,
    )
    predictor = build_configured(config.predictor, num_resolutions)
    return DRNet(backbone, predictor, config.resolutions, config.predictor.input_size, mean, std)


VALIDATION_CROP = 224 / 256
"""The side of the center crop if neither the configuration nor the weights give one (the paper's value)."""


def normalization(config: ModelConfig) -> tuple[Sequence[float], Sequence[float]] | None:
    """Return the mean and std of an untrained network's input, or None to use those of the training images.

    Raises:
        ValueError: the weights do not exist, or `config` asks for the weights' values and they have none.
    """
    if isinstance(config.normalization, tuple):
        return config.normalization
    found = weights_input(config.backbone, config.weights)
    if config.normalization == "weights" and found is None:
        raise ValueError(
            f"model.normalization is weights, but model.weights is {'a file' if config.weights else 'null'}, which has "
            "no mean and standard deviation. Give data, or both values as [mean, std]."
        )
    return None if found is None or config.normalization == "data" else (found.mean, found.std)


def validation_crop(config: Config) -> float:
    """Return the side of the center crop in validation, as a fraction of the image's shorter side."""
    if config.loader.validation_crop is not None:
        return config.loader.validation_crop
    found = weights_input(config.model.backbone, config.model.weights)
    return VALIDATION_CROP if found is None else found.crop


def crop_problems(origin: str, crop: float, config: Config, user: str) -> Iterator[str]:
    """Yield a problem if `origin` was evaluated with another center crop than `user`, which has this configuration."""
    ours = validation_crop(config)
    if not math.isclose(crop, ours, rel_tol=1e-3):
        yield (
            f"{origin} was evaluated with a center crop of {crop:.4g}, and {user} uses {ours:.4g}. "
            f"Set loader.validation_crop={crop:.4g}."
        )


def place_model(model: DRNet, device: torch.device, *, channels_last: bool) -> DRNet:
    """Move a model to a device, and give its weights and input the same memory format."""
    model.memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(device).to(memory_format=model.memory_format)  # ty: ignore[no-matching-overload]


def build_configured(config: PredictorConfig, num_resolutions: int) -> Predictor:
    """Build the predictor that `config` describes. Raise ValueError if it is not possible."""
    shape = predictor_shape(
        config.architecture, blocks=config.blocks, kernel=config.kernel, stem_stride=config.stem_stride
    )
    predictor = build_predictor(shape, num_resolutions, width=config.width, dropout=config.dropout)
    if config.initial_shares is not None:
        start_with_shares(predictor, config.initial_shares)
    return predictor
