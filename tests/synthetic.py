"""A whole training run in a second: generated images in memory, a small network, all three stages; no Ray, no FFCV."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from datasets.beton import FORMAT, TRAIN, VALIDATION, Manifest, Split
from pipeline.config.load import parse_config
from pipeline.config.schema import Config
from pipeline.models.cost import measure_costs
from pipeline.models.drnet import DRNet, build_drnet
from pipeline.training import distributed
from pipeline.training.checkpoint import TrainingState
from pipeline.training.run import Progress, Run

SIDES = (32, 24)
NUM_CLASSES, NUM_TRAIN, NUM_VALIDATION = 3, 22, 9
NO_TABLES = Path(os.devnull, "tables")
"""A folder that cannot be created, for runs without a logit table."""
TIMINGS = ("train_images_per_second", "train_data_wait_share", "train_epoch_seconds")


@dataclass(frozen=True)
class Batch:
    images: dict[int, Tensor]
    labels: Tensor
    indices: Tensor


class SyntheticBatches:
    """The loop's Batches from memory: noise on stripes whose direction is the class; this rank's part of each batch.

    Every crop of an image is the image itself.
    """

    def __init__(self, num_samples: int, batch_size: int, *, shuffle: bool, seed: int):
        self.num_samples, self.batch_size, self.shuffle, self.seed = num_samples, batch_size, shuffle, seed
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, NUM_CLASSES, (num_samples,), generator=generator)
        rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        stripes = torch.stack([torch.sin(rows), torch.sin(columns), torch.sin((rows + columns) / 2)])
        noise = torch.randn(num_samples, 3, 32, 32, generator=generator)
        pixels = (128 + 30 * stripes[self.labels][:, None] + 25 * noise).clamp(0, 255)
        self.images = {
            side: functional.interpolate(pixels, size=side, mode="area").permute(0, 2, 3, 1).to(torch.uint8)
            for side in SIDES
        }

    @property
    def num_batches(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def global_size(self, step: int) -> int:
        return min(self.batch_size, self.num_samples - step * self.batch_size)

    def epoch(
        self, epoch: int, start_step: int = 0, *, crop_epoch: int | None = None, sides: Collection[int] | None = None
    ) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        order = (
            torch.randperm(self.num_samples, generator=generator) if self.shuffle else torch.arange(self.num_samples)
        )
        batches = order.split(self.batch_size)[start_step:]
        mine = slice(distributed.rank(), None, distributed.world_size())
        return self.read(epoch, [batch[mine].numpy() for batch in batches], sides=sides)

    def read(
        self, crop_epoch: int, batches: Iterable[NDArray[np.int64]], *, sides: Collection[int] | None = None
    ) -> Iterator[Batch]:
        for indices_N in map(torch.from_numpy, batches):
            images = {side: self.images[side][indices_N] for side in sides or SIDES}
            yield Batch(images, self.labels[indices_N], indices_N)


@dataclass
class Recorder:
    """A Reporter that keeps everything in memory."""

    steps: list[tuple[Progress, float]] = field(default_factory=list)
    epochs: list[tuple[Progress, dict[str, float]]] = field(default_factory=list)
    states: list[TrainingState] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    kept: list[tuple[str, dict[str, Tensor]]] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """Mean loss of every step."""
        return [loss for _, loss in self.steps]

    @property
    def values(self) -> list[dict[str, float]]:
        """The values of every epoch."""
        return [values for _, values in self.epochs]

    def step(self, progress: Progress, loss: Tensor) -> None:
        self.steps.append((progress, loss.item()))

    def epoch(self, progress: Progress, values: Mapping[str, float]) -> None:
        self.epochs.append((progress, dict(values)))

    def message(self, text: str) -> None:
        self.messages.append(text)

    def keep(self, name: str, model: DRNet) -> None:
        self.kept.append((name, {key: value.clone() for key, value in model.state_dict().items()}))

    def checkpoint(self, state: TrainingState, values: Mapping[str, float]) -> None:
        self.states.append(state.copy())


def manifest_of(num_train: int, num_validation: int, num_classes: int, source_digest: str = "") -> Manifest:
    """Return a manifest as jobs.prepare would write it."""
    splits = {
        split: Split(f"{split}.beton", count, [], 0, f"{source_digest}{split}", {})
        for split, count in ((TRAIN, num_train), (VALIDATION, num_validation))
    }
    classes, mean, std = [str(label) for label in range(num_classes)], (0.5,) * 3, (0.25,) * 3
    return Manifest(FORMAT, "imagefolder", classes, {}, mean, std, source_digest, [], {}, splits)


def config_of(**changed: Any) -> Config:
    """Return all stages, three steps per epoch, no logit table; `changed` sections are merged one level deep."""
    routed = {"epochs": 1, "lr": 0.05, "alpha_gflops": 0.0006, "eta": 0.5, "ema_decay": 0.5}
    tree: dict[str, Any] = {
        "name": "synthetic",
        "data": {"dataset": "glyphs", "folder": "data"},
        "model": {
            "backbone": "small_resnet",
            "backbone_width": 0.5,
            "resolutions": list(SIDES),
            "predictor": {"input_size": 24, "width": 0.125, "dropout": 0.2},
        },
        "training": {"batch_size": 8, "checkpoint_steps": 2},
        "stages": {
            "backbone": {"epochs": 2, "lr": 0.05, "warmup_epochs": 0.5, "schedule": "cosine"},
            "predictor": routed | {"optimizer": "adamw", "lr": 0.01, "logits": "live"},
            "joint": routed | {"clip_grad_norm": 1.0},
        },
    }
    return parse_config(
        {key: {**value, **changed.get(key, {})} if isinstance(value, dict) else value for key, value in tree.items()}
    )


def run_of(config: Config, reporter: Any, tables: Path = NO_TABLES) -> Run:
    """Return a run with new weights on 22 training and 9 validation images."""
    torch.manual_seed(config.seed)
    model = build_drnet(config.model, NUM_CLASSES, (0.5,) * 3, (0.25,) * 3).to(memory_format=torch.channels_last)
    size = config.training.batch_size
    return Run(
        config=config,
        model=model,
        costs=measure_costs(model),
        train=SyntheticBatches(NUM_TRAIN, size, shuffle=True, seed=1),
        validation=SyntheticBatches(NUM_VALIDATION, size, shuffle=False, seed=2),
        device=torch.device("cpu"),
        reporter=reporter,
        manifest=manifest_of(NUM_TRAIN, NUM_VALIDATION, NUM_CLASSES),
        tables=tables,
    )


def without_timings(values: Mapping[str, float]) -> dict[str, float]:
    """Return the values of an epoch that are the same in every run."""
    return {key: value for key, value in values.items() if key not in TIMINGS}
