"""What a search will take, from a few steps that are timed on the machine that would do them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from datasets.beton import TRAIN, VALIDATION, Manifest
from pipeline.config import Config
from pipeline.models.cost import measure_costs
from pipeline.models.drnet import build_drnet
from pipeline.search.space import Candidate
from pipeline.search.trial import num_views, trial_config, trial_stage
from pipeline.training.noise import gumbel_noise
from pipeline.training.stages import Forward, StepBatch, build_objective, build_optimizer

WARM_UP, TIMED = 2, 5
BACKBONE_IMAGES = 16


@dataclass(frozen=True)
class Work:
    """Images that a search runs through networks."""

    table_images: int
    """through the backbone at every resolution, once for all trials"""
    trial_images: int
    """through the predictor, forward and backward, in every trial"""
    evaluated_images: int
    """through the predictor, forward, in every trial"""
    joint_images: int
    """through predictor and backbone, forward and backward, in every finetuning"""


@dataclass(frozen=True)
class Speed:
    """Seconds an image on one trial's share of a machine; the backbone's at all resolutions, without gradient."""

    predictor: float
    backbone: float


def search_work(config: Config, manifest: Manifest) -> Work:
    """How many images a search has to do with."""
    stage, joint = trial_stage(config), config.stages.joint
    train, validation = manifest.splits[TRAIN].count, manifest.splits[VALIDATION].count
    return Work(
        table_images=num_views(config) * train + validation,
        trial_images=stage.epochs * train,
        evaluated_images=2 * validation,
        joint_images=joint.epochs * train if joint else 0,
    )


def measure_speed(config: Config, candidate: Candidate, num_classes: int, num_threads: int) -> Speed:
    """Time a candidate's training step and the backbone on images without content."""
    torch.set_num_threads(num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = trial_config(config, candidate, config.seed)
    plain = config.model.model_copy(update={"weights": None})
    model = build_drnet(plain, num_classes, (0.5,) * 3, (0.5,) * 3).to(device)
    if config.training.channels_last:
        model = model.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]
    stage, size, R = config.stages.predictor, config.training.batch_size, len(model.resolutions)
    assert stage is not None
    costs_R = torch.tensor(measure_costs(model).backbone_gflops, device=device)
    objective = build_objective(model, stage, costs_R, config.training.precision)
    optimizer = build_optimizer(model, stage)
    side = candidate.input_size
    batch = StepBatch(
        images={side: torch.zeros(size, side, side, 3, dtype=torch.uint8, device=device)},
        labels_N=torch.zeros(size, dtype=torch.int64, device=device),
        gumbel_NR=gumbel_noise(0, 0, torch.arange(size), R).to(device),
        global_size=size,
        logits_NRK=torch.zeros(size, R, num_classes, device=device),
    )

    def step() -> None:
        objective(batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    shapes = ((side, torch.zeros(BACKBONE_IMAGES, side, side, 3, dtype=torch.uint8)) for side in model.resolutions)
    images = {side: pixels.to(device) for side, pixels in shapes}
    forward = Forward(model, config.training.precision)
    return Speed(
        predictor=_seconds(step) / size,
        backbone=_seconds(lambda: forward.frozen_backbone(images)) / BACKBONE_IMAGES,
    )


def _seconds(work: Callable[[], object]) -> float:
    """Of one run, the mean after a warm-up."""
    for _ in range(WARM_UP):
        work()
    _wait()
    started = time.perf_counter()
    for _ in range(TIMED):
        work()
    _wait()
    return (time.perf_counter() - started) / TIMED


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
