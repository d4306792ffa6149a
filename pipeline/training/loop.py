"""The training loop: stages in order, epochs, steps. Knows torch, and nothing of Ray, MLflow or FFCV."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.config import Config, Stage
from pipeline.evaluation.evaluate import evaluate
from pipeline.models.cost import Costs
from pipeline.models.drnet import DRNet
from pipeline.training import distributed
from pipeline.training.checkpoint import TrainingState, load_model
from pipeline.training.metrics import Meter
from pipeline.training.noise import gumbel_noise, step_seed
from pipeline.training.schedule import learning_rate
from pipeline.training.stages import StepBatch, build_objective, build_optimizer, trained_parameters


class Epoch(Protocol):
    """One pass over a loader's batches; closing it in the middle is allowed."""

    def __iter__(self) -> Iterator: ...

    def __next__(self) -> Any: ...

    def close(self) -> None: ...


class Batches(Protocol):
    """What the loop asks of a loader; datasets.loader.MultiResolutionLoader is one."""

    @property
    def num_samples(self) -> int: ...

    @property
    def num_batches(self) -> int: ...

    def global_size(self, step: int) -> int: ...

    def epoch(self, epoch: int, start_step: int = 0) -> Epoch: ...


class Reporter(Protocol):
    """Where the loop tells what happens; every rank calls it, most of it matters on rank 0 only."""

    def step(self, progress: Progress, loss: Tensor) -> None: ...

    def epoch(self, progress: Progress, values: Mapping[str, float]) -> None: ...

    def checkpoint(self, state: TrainingState, values: Mapping[str, float]) -> None: ...


@dataclass(frozen=True)
class Progress:
    """How far a run is. `epoch` counts within the stage; `data_epoch` over all stages, and keys every random draw."""

    stage: str
    epoch: int
    epochs: int
    data_epoch: int
    step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Run:
    """Everything that a training run works with."""

    config: Config
    model: DRNet
    costs: Costs
    train: Batches
    validation: Batches
    device: torch.device
    reporter: Reporter


def train(run: Run, state: TrainingState | None = None) -> None:
    """Run all stages of the configuration, or what is left of them after `state`."""
    data_epoch = 0
    for name, stage in run.config.stages.present():
        end = data_epoch + stage.epochs
        if state is None or state.data_epoch < end:
            train_stage(run, name, stage, data_epoch, state)
            state = None
        data_epoch = end
    if state is not None:
        run.model.load_state_dict(state.model)


def train_stage(run: Run, name: str, stage: Stage, data_epoch: int, state: TrainingState | None) -> None:
    """Train one stage; `data_epoch` is the number of epochs of the stages before it."""
    if state is not None:
        run.model.load_state_dict(state.model)
    resumed = state is not None and state.stage == name
    if stage.init_from is not None and not resumed:
        run.model.load_state_dict(load_model(stage.init_from).model.state_dict())
    costs_R = torch.tensor(run.costs.backbone_gflops, device=run.device)
    objective = build_objective(run.model, stage, costs_R, run.config.training.precision)
    optimizer = build_optimizer(run.model, stage)
    done = 0
    if state is not None and resumed:
        optimizer.load_state_dict(dict(state.optimizer))
        done = state.data_epoch - data_epoch

    for epoch in range(done, stage.epochs):
        progress = Progress(name, epoch, stage.epochs, data_epoch + epoch, 0, run.train.num_batches)
        values = train_epoch(run, stage, objective, optimizer, progress)
        distributed.average_running_statistics(run.model)
        last = epoch + 1 == stage.epochs
        if last or (epoch + 1) % run.config.training.evaluate_epochs == 0:
            values |= evaluate(run.model, run.validation.epoch(0), run.costs)
        run.reporter.epoch(progress, values)
        if last or (epoch + 1) % run.config.training.checkpoint_epochs == 0:
            run.reporter.checkpoint(TrainingState.capture(run.model, optimizer, name, progress.data_epoch + 1), values)


def train_epoch(run: Run, stage: Stage, objective, optimizer, progress: Progress) -> dict[str, float]:
    """One pass over the training images; returns the epoch's means, images/s and share of time spent waiting."""
    meter, waited, started = Meter(), 0.0, time.perf_counter()
    parameters = list(trained_parameters(optimizer))
    with closing(run.train.epoch(progress.data_epoch)) as batches:
        for step in range(progress.steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            step_batch = place(batch, run, progress.data_epoch, run.train.global_size(step))
            set_learning_rate(optimizer, learning_rate(stage, progress.epoch + step / progress.steps))
            torch.manual_seed(step_seed(run.config.seed, progress.data_epoch, step, distributed.rank()))

            sums = objective(step_batch)
            distributed.sum_gradients(parameters)
            if stage.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, stage.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            meter.update(sums, step_batch.global_size)
            run.reporter.step(replace(progress, step=step + 1), sums["loss"] / max(1, len(step_batch)))
    values = meter.means()
    seconds = time.perf_counter() - started
    return {f"train_{key}": value for key, value in values.items()} | {
        "train_images_per_second": run.train.num_samples / seconds,
        "train_data_wait_share": waited / seconds,
        "train_epoch_seconds": seconds,
    }


def place(batch, run: Run, data_epoch: int, global_size: int) -> StepBatch:
    """Move a loader's batch to the device and draw its Gumbel noise."""
    gumbel_NR = gumbel_noise(run.config.seed, data_epoch, batch.indices, len(run.model.resolutions))
    return StepBatch(
        images={side: images.to(run.device, non_blocking=True) for side, images in batch.images.items()},
        labels_N=batch.labels.to(run.device, non_blocking=True),
        gumbel_NR=gumbel_NR.to(run.device, non_blocking=True),
        global_size=global_size,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's rate; a group's `lr_scale` multiplies the schedule."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
