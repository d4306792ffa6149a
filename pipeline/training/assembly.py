"""Build a worker's model and loaders from the configuration and the worker's rank, without Ray."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from datasets.beton import SPLITS, TRAIN, VALIDATION, Manifest, beton_path, crop_extents
from datasets.loading.loader import CenterCrop, MultiResolutionLoader, RandomResizedCrop
from pipeline.config.schema import Config
from pipeline.models.backbone import compile_backbone
from pipeline.models.drnet import DRNet, build_drnet, normalization, place_model, validation_crop
from pipeline.models.norms import synchronize_batch_norms


def build_model(config: Config, manifest: Manifest, device: torch.device) -> DRNet:
    """Build the untrained model. It is the same on every rank."""
    torch.manual_seed(config.seed)
    mean, std = normalization(config.model) or (manifest.mean, manifest.std)
    model = build_drnet(config.model, len(manifest.classes), mean, std)
    return place_model(model, device, channels_last=config.training.channels_last)


def equip_for_training(model: DRNet, config: Config) -> None:
    """Add what the network needs for training only: synchronized batch norms and compiled passes."""
    if config.training.sync_batch_norm:
        synchronize_batch_norms(model)
    if config.training.compile:
        compile_backbone(model.backbone)


def open_loader(
    config: Config, split: str, sides: Collection[int] = (), *, rank: int = 0, world_size: int = 1, num_threads: int = 1
) -> MultiResolutionLoader:
    """Open a rank's loader of a split, with the crops and the order that the configuration gives.

    Args:
        split: datasets.beton.TRAIN (random crops, in a new order every epoch) or VALIDATION.
        sides: image sides in pixels to read besides the candidate resolutions and the predictor's input.
        num_threads: number of decoding threads.
    """
    settings, training = config.loader, split == TRAIN
    augmented = RandomResizedCrop(settings.crop_scale, settings.crop_ratio, settings.flip)
    return MultiResolutionLoader(
        beton_path(config.data.folder, split),
        sides={*config.model.resolutions, config.model.predictor.input_size, *sides},
        batch_size=config.training.batch_size,
        crop=augmented if training else CenterCrop(validation_crop(config)),
        shuffle=training,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        num_threads=num_threads,
        batches_ahead=settings.batches_ahead,
        window_pages=settings.window_pages,
        max_damaged=settings.max_damaged if training else 0,
    )


def validation_extents(config: Config) -> np.ndarray:
    """Return the side of each validation image's crop before it is resized, in pixels, (N,), in beton order."""
    return crop_extents(beton_path(config.data.folder, VALIDATION), validation_crop(config))


@contextmanager
def open_loaders(
    config: Config, rank: int, world_size: int, num_threads: int
) -> Iterator[tuple[MultiResolutionLoader, MultiResolutionLoader]]:
    """Open a rank's training and validation loaders, and close them at the end of the `with` block."""
    with ExitStack() as stack:
        train, validation = (
            open_loader(config, split, rank=rank, world_size=world_size, num_threads=num_threads) for split in SPLITS
        )
        for loader in (train, validation):
            stack.callback(loader.close)
        yield train, validation
