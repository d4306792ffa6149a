"""A configuration, a network and a batch that are small enough for exact comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.config.schema import ModelConfig
from pipeline.models.drnet import DRNet, build_drnet
from pipeline.training.objectives import StepBatch, gumbel_noise

COSTS_R = torch.tensor([4.0, 2.0, 1.0])


def tree_of(folder: Path, **changed: Any) -> dict[str, Any]:
    """Return a small configuration on letters as a tree; `changed` as in `with_fields`."""
    tree = {
        "name": "run",
        "data": {"dataset": "glyphs", "folder": str(folder / "data")},
        "model": {
            "backbone": "small_resnet",
            "backbone_width": 0.5,
            "resolutions": [48, 32],
            "predictor": {"input_size": 24, "width": 0.25},
        },
    }
    return with_fields(tree, changed)


def with_fields(tree: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's tree with changed fields. A section keeps its other fields."""
    sections = {key: {**tree.get(key, {}), **value} for key, value in changed.items() if isinstance(value, dict)}
    return {**tree, **changed, **sections}


def small_model() -> DRNet:
    torch.manual_seed(1)
    config = ModelConfig.model_validate(
        {
            "backbone": "small_resnet",
            "backbone_width": 0.5,
            "resolutions": [48, 32, 24],
            "predictor": {"input_size": 32, "width": 0.25, "dropout": 0.0},
        }
    )
    model = build_drnet(config, 5, (0.5,) * 3, (0.25,) * 3)
    for module in model.modules():  # statistics and scales that differ between resolutions, as after training
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def batch_of(count: int, start: int = 0) -> StepBatch:
    generator = torch.Generator().manual_seed(2)
    images = {
        side: torch.randint(0, 256, (16, side, side, 3), generator=generator, dtype=torch.uint8)[start : start + count]
        for side in (48, 32, 24)
    }
    labels_N = torch.randint(0, 5, (16,), generator=generator)[start : start + count]
    return StepBatch(images, labels_N, gumbel_noise(0, 0, torch.arange(start, start + count), 3), 16)
