"""The training loop: stages in order, epochs, steps. It uses torch, but not Ray, MLflow or FFCV."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from datasets.beton import TRAIN, VALIDATION
from pipeline.config.schema import BackboneStage, JointStage, PredictorStage, RoutedStage, Stage
from pipeline.evaluation.budget import fit_bias
from pipeline.evaluation.predictions import collect_predictions
from pipeline.evaluation.statistics import oracle_choice
from pipeline.models.cost import Costs
from pipeline.models.drnet import DRNet
from pipeline.models.dry_run import training_mode
from pipeline.training import distributed
from pipeline.training.checkpoint import TrainingState, load_model
from pipeline.training.distributed import GradientReducer
from pipeline.training.logit_table import LogitTable, TableKey, fill_table
from pipeline.training.monitoring import DivergenceMonitor, Meter, collapse_warning
from pipeline.training.objectives import Forward, Objective, StepBatch, build_objective, gumbel_noise, step_seed
from pipeline.training.optim import (
    MovingAverage,
    build_optimizer,
    completion_order,
    learning_rate,
    trained_parameters,
)
from pipeline.training.run import (
    AFTER_BACKBONE,
    BEFORE_JOINT,
    CHECKPOINT,
    COMPILE,
    DATA_WAIT,
    EVALUATE,
    SET_UP,
    STEP,
    TABLE,
    Batches,
    Epoch,
    Progress,
    Run,
)


def evaluate(
    model: DRNet, batches: Iterable, costs: Costs, backbone_logits: Callable[[Tensor], Tensor] | None = None
) -> dict[str, float]:
    """Measure top-1 at each resolution and with routing, the mean cost including the predictor, and shares.

    Every rank must call this. `share_SIDE` is the share of images that the predictor sends to a resolution.
    `oracle_share_SIDE` is the share of images for which the resolution is the cheapest correct one.

    Args:
        batches: this rank's part of the validation images.
        backbone_logits: as in `collect_predictions`.
    """
    found = collect_predictions(model, batches, backbone_logits)
    correct_NR = found.logits_NRK.argmax(axis=2) == found.labels_N[:, None]
    chosen_N = found.predictor_logits_NR.argmax(axis=1)
    oracle_N = oracle_choice(correct_NR, costs.backbone)
    resolutions_R = np.arange(len(model.resolutions))
    is_chosen_NR, is_oracle_NR = (index_N[:, None] == resolutions_R for index_N in (chosen_N, oracle_N))
    counts_4R = np.stack([correct_NR, correct_NR & is_chosen_NR, is_chosen_NR, is_oracle_NR]).sum(axis=1)
    sums = torch.as_tensor(np.append(counts_4R, len(correct_NR)), dtype=torch.float64)
    *total, count = distributed.sum_over_ranks(sums.to(next(model.parameters()).device)).tolist()
    correct_R, routed_correct_R, chosen_R, oracle_R = np.reshape(total, counts_4R.shape)
    values = {
        f"{key}_{side}": number / count
        for key, numbers in (("accuracy", correct_R), ("share", chosen_R), ("oracle_share", oracle_R))
        for side, number in zip(model.resolutions, numbers.tolist(), strict=True)
    }
    shares = (chosen_R / count).tolist()
    values |= {"accuracy_routed": float(routed_correct_R.sum() / count), "gflops_routed": costs.mean_gflops(shares)}
    return values if costs.latency is None else values | {"milliseconds_routed": costs.mean(shares)}


@dataclass(frozen=True)
class StageData:
    """The data of one stage: loaders, crops and logit tables.

    Attributes:
        first_epoch: data_epoch of the stage's first epoch.
        num_crops: number of different crops of each training image, used in turn: the stage's epoch e uses the crops of
            data_epoch first_epoch + e mod num_crops.
        sides: image sides to decode, in pixels; None decodes all.
        train_table, validation_table: stored logits of the frozen backbone; None if the backbone runs instead.
    """

    train: Batches
    validation: Batches
    first_epoch: int
    num_crops: int
    sides: tuple[int, ...] | None = None
    train_table: LogitTable | None = None
    validation_table: LogitTable | None = None

    def crop_epoch(self, data_epoch: int) -> int:
        """Return the epoch whose crops `data_epoch` uses."""
        return self.first_epoch + (data_epoch - self.first_epoch) % self.num_crops

    def epoch(self, data_epoch: int, start_step: int = 0) -> Epoch:
        """Start a pass over the training images, at step `start_step`."""
        return self.train.epoch(data_epoch, start_step, crop_epoch=self.crop_epoch(data_epoch), sides=self.sides)

    def logits(self, data_epoch: int, indices_N: Tensor) -> Tensor | None:
        """Return stored logits (N, R, K) of samples, float32 on the CPU, or None if the backbone runs instead."""
        return self.train_table.logits(self.crop_epoch(data_epoch), indices_N) if self.train_table else None

    def validation_epoch(self) -> Epoch:
        """Start a pass over the validation images."""
        return self.validation.epoch(0, sides=self.sides)

    @property
    def validation_logits(self) -> Callable[[Tensor], Tensor] | None:
        """The function from indices (N,) to stored validation logits (N, R, K); None if the backbone runs instead."""
        return partial(self.validation_table.logits, 0) if self.validation_table else None


def open_stage_data(run: Run, stage: Stage, first_epoch: int) -> StageData:
    """Open the data of a stage. `run.model` must already be the stage's model. Every rank must call this.

    For a predictor stage with `logits: table`, this computes the missing parts of the logit tables.

    Raises:
        TableError: a table cannot be computed.
    """
    live = StageData(run.train, run.validation, first_epoch, stage.epochs)
    if not isinstance(stage, PredictorStage):
        return live
    num_crops = stage.num_crops or stage.epochs
    if stage.logits == "live":
        return replace(live, num_crops=num_crops)
    return replace(
        live,
        num_crops=num_crops,
        sides=(run.model.predictor_size,),
        train_table=_table(run, TRAIN, run.train, range(first_epoch, first_epoch + num_crops)),
        validation_table=_table(run, VALIDATION, run.validation, range(1)),
    )


def _table(run: Run, split: str, loader: Batches, crop_epochs: range) -> LogitTable:
    """Compute the missing parts of a split's logit table, and return the table."""
    key = TableKey.of(run.model, run.config, run.manifest, split)
    backbone_logits = Forward(run.model, key.precision).frozen_backbone
    with run.goodput.inside(TABLE):
        fill_table(run.tables, key, crop_epochs, loader, backbone_logits, device=run.device, show=run.reporter.message)
    return LogitTable(run.tables, key, crop_epochs)


@dataclass
class StageState:
    """Everything besides the model that one stage trains with."""

    stage: Stage
    data: StageData
    objective: Objective
    optimizer: torch.optim.Optimizer
    averaged: MovingAverage | None
    monitor: DivergenceMonitor
    meter: Meter
    phase: str = COMPILE
    """The goodput phase of a training step: COMPILE until the process has run its first step of the stage."""


def train(run: Run, state: TrainingState | None = None) -> None:
    """Run all stages of the configuration, or those that remain after `state`.

    Raises:
        OtherRunError: the state belongs to another configuration or other data.
        DivergedError: on all ranks, if a loss, gradient or weight is not finite, or a loss exceeds training.max_loss.
        TableError: a logit table cannot be computed or read.
    """
    if state is not None:
        state.refuse_other(run.config, run.manifest.digest)
        run.model.load_state_dict(state.model)
    monitor = DivergenceMonitor(run.config.training.max_loss, state.name if state else None)
    data_epoch = 0
    for name, stage in run.config.stages.present():
        end = data_epoch + stage.epochs
        if state is None or state.data_epoch < end:
            train_stage(run, name, stage, data_epoch, monitor, state)
            state = None
        # Do this also when resuming from the stage's last checkpoint: the process may have died before this line.
        if isinstance(stage, BackboneStage) and (state is None or (state.data_epoch, state.step) == (end, 0)):
            run.reporter.keep(AFTER_BACKBONE, run.model)
        data_epoch = end


def train_stage(
    run: Run,
    name: str,
    stage: Stage,
    data_epoch: int,
    monitor: DivergenceMonitor,
    state: TrainingState | None = None,
    data: StageData | None = None,
) -> None:
    """Train one stage.

    Args:
        data_epoch: number of epochs in the stages before this one.
        state: where to resume; a state of another stage is ignored.
        data: what the stage reads; None opens it here.
    """
    run.goodput.enter(SET_UP)
    if state is not None and state.stage != name:
        state = None
    if stage.init_from is not None and state is None:
        run.model.load_state_dict(load_model(stage.init_from).model.state_dict())
    if isinstance(stage, JointStage) and state is None:
        run.reporter.keep(BEFORE_JOINT, run.model)
    stage_state = prepare_stage(run, stage, data_epoch, monitor, state, data)
    first, step = (state.data_epoch - data_epoch, state.step) if state else (0, 0)
    had_collapsed = False
    for epoch in range(first, stage.epochs):
        progress = Progress(name, epoch, stage.epochs, data_epoch + epoch, step, run.train.num_batches)
        values, warning = train_epoch(run, stage_state, progress), None
        stage_state.meter, step = Meter(), 0
        average_over_ranks(run, stage_state)
        done, last = replace(progress, step=progress.steps), epoch + 1 == stage.epochs
        if last and stage_state.averaged is not None:
            run.model.load_state_dict(stage_state.averaged.module.state_dict())
        if last or (epoch + 1) % run.config.training.evaluate_epochs == 0:
            monitor.check_weights(done, run.model)
            if last:
                values |= fit_offset(run, stage_state, progress.data_epoch)
            evaluated, found = validate(run, stage_state, name)
            values |= evaluated
            warning = found if last or not had_collapsed else None
            had_collapsed = found is not None
        run.reporter.epoch(done, values)
        if warning is not None:
            run.reporter.message(warning)
        if last or (epoch + 1) % run.config.training.checkpoint_epochs == 0:
            checkpoint(run, stage_state, done, values)


def prepare_stage(
    run: Run,
    stage: Stage,
    data_epoch: int,
    monitor: DivergenceMonitor,
    state: TrainingState | None = None,
    data: StageData | None = None,
) -> StageState:
    """Build what a stage trains with, or restore it from a `state` of this stage. Every rank must call this."""
    costs_R = torch.tensor(run.costs.backbone, device=run.device)
    settings = run.config.training
    objective = build_objective(run.model, stage, costs_R, settings.precision, settings.backward)
    optimizer = build_optimizer(run.model, stage, objective.own)
    averaged = MovingAverage(run.model, stage.ema_decay) if stage.ema_decay is not None else None
    data = data or open_stage_data(run, stage, data_epoch)
    if state is None:
        return StageState(stage, data, objective, optimizer, averaged, monitor, Meter())
    optimizer.load_state_dict(dict(state.optimizer))
    objective.own.load_state_dict(state.objective)
    if averaged is not None and state.averaged is not None:
        averaged.load_state_dict(state.averaged)
    return StageState(stage, data, objective, optimizer, averaged, monitor, Meter(state.meter))


def train_epoch(run: Run, stage_state: StageState, progress: Progress) -> dict[str, float]:
    """Train the remaining steps of one epoch, from `progress.step` on.

    Returns:
        Mean values over the whole epoch, and the speed, seconds and share of waiting of the steps that ran here.
    """
    stage, optimizer, before = stage_state.stage, stage_state.optimizer, run.goodput.seconds
    parameters, checkpoint_steps = list(trained_parameters(optimizer)), run.config.training.checkpoint_steps
    with (
        closing(stage_state.data.epoch(progress.data_epoch, progress.step)) as batches,
        gradient_reducer(run, stage_state.objective) as reducer,
    ):
        for step in range(progress.step, progress.steps):
            now, done = replace(progress, step=step), replace(progress, step=step + 1)
            run.goodput.enter(DATA_WAIT)
            batch = next(batches)
            run.goodput.enter(stage_state.phase)
            step_batch = place(batch, run, stage_state.data, now)
            set_learning_rate(optimizer, learning_rate(stage, now.epochs_done))
            torch.manual_seed(step_seed(run.config.seed, progress.data_epoch, step, distributed.rank()))

            sums = stage_state.objective(step_batch, reducer.last_pass)
            loss = reducer.finish(sums["loss"]) / step_batch.global_size
            gradient_norm = clip(parameters, stage.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if stage_state.averaged is not None:
                stage_state.averaged.update_parameters(run.model)

            stage_state.phase = STEP
            stage_state.meter.update(sums, step_batch.global_size)
            stage_state.monitor.step(done, loss, gradient_norm, batch.indices)
            run.reporter.step(done, loss)
            if checkpoint_steps and done.step % checkpoint_steps == 0 and done.step < done.steps:
                average_over_ranks(run, stage_state)
                checkpoint(run, stage_state, done, {})
    stage_state.monitor.check()
    means = {f"train_{key}": value for key, value in stage_state.meter.means().items()}
    images = sum(map(run.train.global_size, range(progress.step, progress.steps)))
    return means | speed(images, before, run.goodput.seconds)


def place(batch, run: Run, data: StageData, progress: Progress) -> StepBatch:
    """Move a loader's batch to the device, look up its stored logits and draw its Gumbel noise.

    Args:
        progress: the position before the step.
    """
    gumbel_NR = gumbel_noise(run.config.seed, progress.data_epoch, batch.indices, len(run.model.resolutions))
    logits_NRK = data.logits(progress.data_epoch, batch.indices)
    return StepBatch(
        images={side: images.to(run.device, non_blocking=True) for side, images in batch.images.items()},
        labels_N=batch.labels.to(run.device, non_blocking=True),
        gumbel_NR=gumbel_NR.to(run.device, non_blocking=True),
        global_size=run.train.global_size(progress.step),
        logits_NRK=None if logits_NRK is None else logits_NRK.to(run.device, non_blocking=True),
        epoch=progress.epochs_done,
        step=progress.epoch * progress.steps + progress.step,
        num_slices=run.config.training.accumulate,
    )


def gradient_reducer(run: Run, objective: Objective) -> GradientReducer:
    """Build the reducer that sums the gradients of a stage over the ranks. Every rank must call this."""
    objective.unfreeze()  # every parameter of the stage needs a hook, even if the next step freezes it
    wire = getattr(torch, run.config.training.gradient_dtype)
    return GradientReducer(*completion_order(run.model, objective.own), wire=wire)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, multiplied by the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def clip(parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradient to a norm of at most `max_norm`, if given. Return the norm before scaling."""
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def validate(run: Run, stage_state: StageState, name: str) -> tuple[dict[str, float], str | None]:
    """Evaluate the model that the stage would return now. Return the values and, after a collapse, a warning."""
    with run.goodput.inside(EVALUATE):
        model = run.model if stage_state.averaged is None else stage_state.averaged.module
        values = evaluate(model, stage_state.data.validation_epoch(), run.costs, stage_state.data.validation_logits)
    if not isinstance(stage_state.stage, RoutedStage):
        return values, None
    warning = collapse_warning(name, stage_state.stage, run.costs, values)
    return values | {"collapsed": float(warning is not None)}, warning


def fit_offset(run: Run, stage_state: StageState, data_epoch: int) -> dict[str, float]:
    """Set the predictor's offset so that its choices meet the stage's alpha on the training images.

    Training keeps the mean cost of noisy choices at alpha, but the finished model chooses without noise. Every rank
    must call this.

    Args:
        data_epoch: the epoch whose crops are used.

    Returns:
        `predictor_bias`: the offset is this number times the relative costs. Empty if no alpha asks for savings.
    """
    stage, data, model = stage_state.stage, stage_state.data, run.model
    if not isinstance(stage, RoutedStage) or stage.target is None or stage.target >= max(run.costs.backbone):
        return {}
    size, scores = model.predictor_size, [np.zeros((0, len(model.resolutions)), np.float32)]
    with (
        run.goodput.inside(EVALUATE),
        training_mode(model, False),
        torch.inference_mode(),
        closing(data.train.epoch(data_epoch, crop_epoch=data.crop_epoch(data_epoch), sides=(size,))) as batches,
    ):
        for batch in batches:
            if len(batch.labels):
                images = {size: batch.images[size].to(run.device, non_blocking=True)}
                scores.append(model.predictor_logits(images).cpu().numpy())
    bias = fit_bias(np.concatenate(distributed.gather(np.concatenate(scores))), run.costs, stage.target)
    if model.predictor.gives_probabilities:
        bias = min(bias, 0.0)  # spending more on resolutions that are correct less often gains nothing
    offset_R = bias * torch.tensor(run.costs.relative)
    for each in (model, *([stage_state.averaged.module] if stage_state.averaged else [])):
        each.predictor.offset_R.copy_(offset_R)
    return {"predictor_bias": bias}


def average_over_ranks(run: Run, stage_state: StageState) -> None:
    """Make values that differ between ranks equal on all ranks: running statistics, and sums over the epoch so far."""
    distributed.average_running_statistics(run.model)
    if stage_state.averaged is not None:
        distributed.average_running_statistics(stage_state.averaged.module)
    stage_state.meter.fold()


def checkpoint(run: Run, stage_state: StageState, progress: Progress, values: Mapping[str, float]) -> None:
    """Report the state as a checkpoint. Raise DivergedError if a value in it is not finite."""
    stage_state.monitor.check()
    epochs, step = divmod(progress.data_epoch * progress.steps + progress.step, progress.steps)
    with run.goodput.inside(CHECKPOINT):
        stage_state.monitor.check_weights(progress, run.model, stage_state.objective.own)
        state = TrainingState(
            stage=progress.stage,
            data_epoch=epochs,
            step=step,
            model=run.model.state_dict(),
            optimizer=stage_state.optimizer.state_dict(),
            objective=stage_state.objective.own.state_dict(),
            averaged=stage_state.averaged.state_dict() if stage_state.averaged is not None else None,
            meter=stage_state.meter.state_dict(),
            config=run.config.model_dump(mode="json"),
            data_digest=run.manifest.digest,
        )
        run.reporter.checkpoint(state, values)
        stage_state.monitor.last_checkpoint = state.name


def speed(images: int, before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Compute the training speed from the goodput's seconds before and after, without evaluation and checkpoints."""
    spent = {phase: after[phase] - before[phase] for phase in (COMPILE, DATA_WAIT, STEP)}
    seconds = sum(spent.values())
    return {
        "train_images_per_second": images / seconds,
        "train_data_wait_share": spent[DATA_WAIT] / seconds,
        "train_epoch_seconds": seconds,
    }
