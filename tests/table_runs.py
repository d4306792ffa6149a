"""A small training run of the predictor alone, on real betons, for the tests of the logit table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from datasets.beton import TRAIN, VALIDATION, beton_path
from datasets.loading.loader import CenterCrop, MultiResolutionLoader, RandomResizedCrop
from pipeline.config.load import parse_config
from pipeline.config.schema import Config
from pipeline.models.cost import measure_costs
from pipeline.models.drnet import DRNet, build_drnet, validation_crop
from pipeline.training import distributed
from pipeline.training.run import Run
from tests.betons import photograph, write_images
from tests.small import tree_of
from tests.synthetic import Recorder, manifest_of

NUM_TRAIN, NUM_VALIDATION, NUM_CLASSES = 29, 11, 7
MANIFEST = manifest_of(NUM_TRAIN, NUM_VALIDATION, NUM_CLASSES)


def write_data(folder: Path) -> Path:
    """Write two betons of photographs in 7 classes."""
    for split, count in ((TRAIN, NUM_TRAIN), (VALIDATION, NUM_VALIDATION)):
        pictures = [photograph(60 + 4 * index, 130 - 2 * index, seed=index + count) for index in range(count)]
        write_images(beton_path(folder, split), pictures)
    return folder


def config_of(data: Path, **predictor: Any) -> Config:
    """Return a configuration of the predictor stage alone, three epochs; `predictor` changes the stage."""
    stage = {"epochs": 3, "alpha_gflops": 0.003, "eta": 1.0, "lr": 0.05, **predictor}
    return parse_config(
        tree_of(
            data.parent,
            data={"dataset": "imagefolder", "folder": str(data), "source": str(data.parent / "images")},
            model={"predictor": {"input_size": 24, "width": 0.25, "dropout": 0.0}},
            training={"batch_size": 8},
            stages={"predictor": stage},
        )
    )


def model_of(config: Config, seed: int = 1) -> DRNet:
    torch.manual_seed(seed)
    return build_drnet(config.model, NUM_CLASSES, (0.5,) * 3, (0.25,) * 3)


def loader_of(config: Config, split: str) -> MultiResolutionLoader:
    settings = config.loader
    random = RandomResizedCrop(settings.crop_scale, settings.crop_ratio, settings.flip)
    return MultiResolutionLoader(
        beton_path(config.data.folder, split),
        {*config.model.resolutions, config.model.predictor.input_size},
        config.training.batch_size,
        crop=random if split == TRAIN else CenterCrop(validation_crop(config)),
        shuffle=split == TRAIN,
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def run_of(config: Config, tables: Path) -> tuple[Run, Recorder]:
    """Return a run of a new model with fixed weights, and its reporter."""
    model, recorder = model_of(config), Recorder()
    loaders = loader_of(config, TRAIN), loader_of(config, VALIDATION)
    device, costs = torch.device("cpu"), measure_costs(model)
    return Run(config, model, costs, *loaders, device, recorder, MANIFEST, tables), recorder
