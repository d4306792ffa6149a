"""What a worker trains with, from its configuration and its place among the workers; knows nothing of Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from datasets.beton import TRAIN, VALIDATION, Manifest, beton_path
from datasets.loading.loader import CenterCrop, MultiResolutionLoader, RandomResizedCrop
from pipeline.config.schema import Config
from pipeline.models.backbone import compile_backbone
from pipeline.models.drnet import DRNet, build_drnet
from pipeline.models.norms import synchronize_batch_norms


def build_model(config: Config, manifest: Manifest, device: torch.device) -> DRNet:
    """The untrained model, the same on every rank."""
    torch.manual_seed(config.seed)
    return placed(build_drnet(config.model, len(manifest.classes), manifest.mean, manifest.std), config, device)


def placed(model: DRNet, config: Config, device: torch.device) -> DRNet:
    """The model where it is trained, laid out as there."""
    model = model.to(device)
    if not config.training.channels_last:
        model.memory_format = torch.contiguous_format
    return model.to(memory_format=model.memory_format)  # ty: ignore[no-matching-overload]


def equip_for_training(model: DRNet, config: Config) -> None:
    """Put around the network what only training has: norms over all workers, compiled passes."""
    if config.training.sync_batch_norm:
        synchronize_batch_norms(model)
    if config.training.compile:
        compile_backbone(model.backbone)


@contextmanager
def open_loaders(
    config: Config, rank: int, world_size: int, num_threads: int
) -> Iterator[tuple[MultiResolutionLoader, MultiResolutionLoader]]:
    """A rank's training and validation loaders; `num_threads` is how many decode."""
    shared: dict[str, Any] = {
        "sides": {*config.model.resolutions, config.model.predictor.input_size},
        "batch_size": config.training.batch_size,
        "seed": config.seed,
        "rank": rank,
        "world_size": world_size,
        "num_threads": num_threads,
        "batches_ahead": config.loader.batches_ahead,
        "window_pages": config.loader.window_pages,
    }
    settings = config.loader
    augmented = RandomResizedCrop(settings.crop_scale, settings.crop_ratio, settings.flip)
    folder = config.data.folder
    train_loader = MultiResolutionLoader(
        beton_path(folder, TRAIN), crop=augmented, shuffle=True, max_damaged=settings.max_damaged, **shared
    )
    validation_loader = MultiResolutionLoader(
        beton_path(folder, VALIDATION), crop=CenterCrop(settings.validation_crop), shuffle=False, **shared
    )
    try:
        yield train_loader, validation_loader
    finally:
        train_loader.close()
        validation_loader.close()
