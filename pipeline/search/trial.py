"""One trial: the predictor stage of a candidate, by the training loop, on tables of what the backbone answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from datasets.beton import Manifest
from pipeline.config.schema import Config, PredictorStage, StagesConfig
from pipeline.evaluation.predictions import collect_predictions
from pipeline.models.backbone import ResolutionBackbone
from pipeline.models.cost import Costs, measure_costs
from pipeline.models.drnet import DRNet, build_configured, place_model
from pipeline.search.records import Record, choice_letters
from pipeline.search.space import Candidate
from pipeline.training.checkpoint import TrainingState
from pipeline.training.logit_table import LogitTable
from pipeline.training.loop import StageData, train_stage
from pipeline.training.monitoring import DivergedError, DivergenceMonitor
from pipeline.training.run import Batches, Progress, Run

STAGE = "predictor"


@dataclass(frozen=True)
class TrialData:
    """What all trials of a process share.

    Attributes:
        config: of the search; its stages.predictor is how candidates are trained.
        context: see Record.context.
        backbone: trained, on `device`; it is not run.
        mean, std: of the images that the backbone was trained on.
        train: training images in the order of a seed, at least with the candidates' input sizes.
        validation: validation images.
    """

    config: Config
    context: str
    backbone: ResolutionBackbone
    mean: Sequence[float]
    std: Sequence[float]
    manifest: Manifest
    train_table: LogitTable
    validation_table: LogitTable
    train: Callable[[int], Batches]
    validation: Batches
    device: torch.device

    @property
    def num_crops(self) -> int:
        return num_crops(self.config)


def trial_stage(config: Config) -> PredictorStage:
    """How long trials train: stages.predictor, for search.epochs."""
    stage = config.stages.predictor
    assert stage is not None
    epochs = config.search.epochs or stage.epochs
    return stage.model_copy(
        update={"epochs": epochs, "num_crops": min(stage.num_crops or epochs, epochs), "init_from": None}
    )


def num_crops(config: Config) -> int:
    """Different crops of each training image that the trials see."""
    num_crops = trial_stage(config).num_crops
    assert num_crops is not None
    return num_crops


def trial_config(config: Config, candidate: Candidate, seed: int) -> Config:
    """The run that a trial is: the predictor stage alone, of a candidate."""
    changed = trial_stage(config).model_copy(update=candidate.recipe())
    return config.model_copy(
        update={
            "seed": seed,
            "model": candidate.model(config.model),
            "stages": StagesConfig(predictor=changed),
            "training": config.training.model_copy(update={"checkpoint_steps": None, "compile": False}),
        }
    )


def run_trial(
    data: TrialData,
    candidate: Candidate,
    seed: int,
    on_epoch: Callable[[int, Mapping[str, float]], None] | None = None,
) -> tuple[Record, dict[str, Tensor] | None]:
    """Train and evaluate a candidate.

    Args:
        seed: of weights, order and noise. With the seed of the configuration, and no other stage before it, it is what
            the predictor stage of a run with one worker computes.
        on_epoch: called after every epoch, which is then evaluated, with the epochs done and what was measured.

    Returns:
        The record, and the predictor's weights on the CPU; None where the trial diverged, and its record says how.
    """
    started, reporter = time.perf_counter(), _Reporter(on_epoch)
    run, stage_data = _run_of(data, candidate, seed, reporter, evaluate_all=on_epoch is not None)
    stage = run.config.stages.predictor
    assert stage is not None
    record = Record(data.context, candidate, seed, "diverged", predictor_gflops=run.costs.predictor_gflops)
    try:
        train_stage(run, STAGE, stage, 0, DivergenceMonitor(run.config.training.max_loss), data=stage_data)
    except DivergedError as error:
        return replace(record, reason=str(error), seconds=time.perf_counter() - started), None
    found = collect_predictions(run.model, stage_data.validation_epoch(), stage_data.validation_logits)
    values = reporter.values
    finished = replace(
        record,
        outcome="collapsed" if reporter.warnings else "finished",
        reason=reporter.warnings[-1] if reporter.warnings else None,
        accuracy=values["accuracy_routed"],
        gflops=values["gflops_routed"],
        shares=tuple(values[f"share_{side}"] for side in run.model.resolutions),
        choices=choice_letters(found.chosen_N),
        seconds=time.perf_counter() - started,
        images_per_second=values["train_images_per_second"],
        epochs=stage.epochs,
    )
    return finished, {key: value.detach().cpu() for key, value in run.model.predictor.state_dict().items()}


def _run_of(
    data: TrialData, candidate: Candidate, seed: int, reporter: _Reporter, *, evaluate_all: bool
) -> tuple[Run, StageData]:
    """What the training loop works with; evaluated after every epoch, or after the last alone."""
    config = trial_config(data.config, candidate, seed)
    stage = config.stages.predictor
    assert stage is not None
    evaluated = {"evaluate_epochs": 1 if evaluate_all else stage.epochs, "checkpoint_epochs": stage.epochs}
    config = config.model_copy(update={"training": config.training.model_copy(update=evaluated)})
    model, costs = build_model(data, config, seed)
    stage_data = StageData(
        train=data.train(seed),
        validation=data.validation,
        first_epoch=0,
        num_crops=data.num_crops,
        sides=(candidate.input_size,),
        train_table=data.train_table,
        validation_table=data.validation_table,
    )
    run = Run(
        config=config,
        model=model,
        costs=costs,
        train=stage_data.train,
        validation=stage_data.validation,
        device=data.device,
        reporter=reporter,
        manifest=data.manifest,
        tables=data.train_table.folder.parent,
    )
    return run, stage_data


def build_model(data: TrialData, config: Config, seed: int) -> tuple[DRNet, Costs]:
    """A trial's network, around the backbone that all trials share, and its costs."""
    torch.manual_seed(seed)
    predictor = build_configured(config.model.predictor, len(config.model.resolutions))
    model = DRNet(
        data.backbone,
        predictor,
        config.model.resolutions,
        config.model.predictor.input_size,
        data.mean,
        data.std,
    )
    model = place_model(model, data.device, channels_last=config.training.channels_last)
    return model, measure_costs(model)


class _Reporter:
    """The loop's Reporter: what the last epoch measured, and warnings of the last evaluation."""

    def __init__(self, on_epoch: Callable[[int, Mapping[str, float]], None] | None):
        self._on_epoch = on_epoch
        self.values: Mapping[str, float] = {}
        self.warnings: list[str] = []

    def step(self, progress: Progress, loss: Tensor) -> None:
        pass

    def epoch(self, progress: Progress, values: Mapping[str, float]) -> None:
        self.values, self.warnings = values, []  # a warning of this epoch comes next
        if self._on_epoch is not None:
            self._on_epoch(progress.epoch + 1, values)

    def message(self, text: str) -> None:
        self.warnings.append(text)

    def keep(self, name: str, model: DRNet) -> None:
        pass

    def checkpoint(self, state: TrainingState, values: Mapping[str, float]) -> None:
        pass
