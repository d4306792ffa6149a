"""One trial: train the predictor of one candidate on the stored logits of the backbone, evaluate it, and record it.

Ray Tune calls `tune_trial`. Importing this module does not load Ray.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.beton import TRAIN, VALIDATION, Manifest, beton_path
from datasets.loading.decoded import DecodedCrops, Ordered, Reader, decoded_bytes
from pipeline.config.schema import Config, PredictorStage, StagesConfig
from pipeline.evaluation.predictions import collect_predictions
from pipeline.models.backbone import ResolutionBackbone
from pipeline.models.cost import Costs, measure_costs
from pipeline.models.drnet import DRNet, build_configured, place_model
from pipeline.search.front import budget_score
from pipeline.search.records import Record, Records, SearchFolder, choice_letters
from pipeline.search.space import Candidate, input_sizes
from pipeline.training.assembly import open_loader
from pipeline.training.checkpoint import TrainingState, load_model
from pipeline.training.logit_table import LogitTable, TableKey, copy_table
from pipeline.training.loop import StageData, train_stage
from pipeline.training.monitoring import DivergedError, DivergenceMonitor
from pipeline.training.run import Batches, Progress, Run

STAGE = "predictor"
ACCURACY, GFLOPS, SCORE, EPOCH = "accuracy", "gflops", "score", "epoch"
"""The keys of a trial's reports to Ray Tune."""


@dataclass(frozen=True)
class SearchSettings:
    """The driver's instructions to every trial."""

    config: Config
    folder: SearchFolder
    """The search's folder, the same path on every node."""
    data_digest: str
    """Digest of the data that the driver saw."""
    context: str
    """Digest of everything that the trials share (`Record.context`)."""
    cpus: int
    """CPUs of one trial."""

    @property
    def seeds(self) -> range:
        """The seeds of a candidate's trials. Every candidate is tried with the first one."""
        return range(self.config.seed, self.config.seed + self.config.search.seeds)

    @property
    def tables(self) -> Path:
        """The folder of the logit tables."""
        return self.config.search.tables or self.folder.tables

    @property
    def records(self) -> Records:
        """The records of the trials."""
        return Records(self.folder.trials)


def tune_trial(config: Mapping[str, Any], settings: SearchSettings, report: Callable[[dict[str, Any]], object]) -> None:
    """Run one trial for Ray Tune. Its record is written before Tune gets the result.

    Args:
        config: the `candidate` and the `seed`, as `TrialSearcher.suggest` returns them.
        report: Ray Tune's `report`.

    Raises:
        Exception: the error that made the trial fail, which the record also contains. A diverged trial does not raise.
    """
    candidate, seed = Candidate.parse(config["candidate"]), config["seed"]
    budget = settings.config.search.budget_gflops if settings.config.search.objective == "budget" else None

    def report_epoch(epoch: int, values: Mapping[str, float]) -> None:
        assert budget is not None
        measured = {ACCURACY: values["accuracy_routed"], GFLOPS: values["gflops_routed"], EPOCH: epoch}
        report(measured | {SCORE: budget_score(values, budget)})

    try:
        data = trial_data(settings)
        record, predictor = run_trial(data, candidate, seed, report_epoch if budget is not None else None)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        settings.records.write(Record(settings.context, candidate, seed, outcome="failed", reason=reason))
        raise
    settings.records.write(record, predictor)
    if budget is None or not record.has_result:
        report({ACCURACY: record.accuracy, GFLOPS: record.gflops, SCORE: None, EPOCH: record.epochs})


@dataclass(frozen=True)
class TrialData:
    """The data and models that all trials of a process share.

    Attributes:
        config: configuration of the search; its stages.predictor says how candidates are trained.
        context: as in `Record`.
        backbone: the trained backbone, on `device`; trials do not run it.
        mean, std: pixel statistics of the images that the backbone was trained on.
        train: training images in the order of a seed, at least at the candidates' input sizes.
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


@lru_cache(maxsize=1)
def trial_data(settings: SearchSettings) -> TrialData:
    """Open what this process's trials share, once. The first process on a node copies and decodes the data."""
    from pipeline.cluster.worker import data_of_node  # loads Ray

    config = settings.config
    torch.set_num_threads(settings.cpus)
    manifest = data_of_node(config.data, settings.data_digest, print)
    loaded = load_model(settings.folder.backbone)
    node = config.search.node_folder
    tables = {}
    for split, crop_epochs in table_crops(config).items():
        key, root = TableKey.of(loaded.model, config, manifest, split), settings.tables
        if node is not None:
            copy_table(root, node / "tables", key, crop_epochs)
            root = node / "tables"
        tables[split] = LogitTable(root, key, crop_epochs)
    cached = decodes_once(config, manifest)
    readers = {split: _reader(settings, table.key, cached) for split, table in tables.items()}
    size, device = config.training.batch_size, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return TrialData(
        config=config,
        context=settings.context,
        backbone=loaded.model.backbone.to(device),
        mean=loaded.mean,
        std=loaded.std,
        manifest=manifest,
        train_table=tables[TRAIN],
        validation_table=tables[VALIDATION],
        train=lambda seed: Ordered(readers[TRAIN], size, shuffle=True, seed=seed),
        validation=Ordered(readers[VALIDATION], size, shuffle=False, seed=0),
        device=device,
    )


def _reader(settings: SearchSettings, key: TableKey, cached: bool) -> Reader:
    """Open a reader of a split's predictor inputs. A node decodes them once if they fit into the cache."""
    config, sides = settings.config, input_sizes(settings.config)
    loader = open_loader(config, key.split, sides, num_threads=os.cpu_count() or 1 if cached else settings.cpus)
    if not cached:
        return loader
    about = {"data": key.data, "split": key.split, "crop": dict(key.crop)}
    folder = (config.search.node_folder or settings.folder.path) / "decoded"
    beton, crop_epochs = beton_path(config.data.folder, key.split), table_crops(config)[key.split]
    decoded = DecodedCrops(folder, beton, about, crop_epochs, sides)
    decoded.fill(loader)
    return decoded


def decodes_once(config: Config, manifest: Manifest) -> bool:
    """Return whether the trials' decoded images fit into search.cache_gb."""
    sizes = (
        decoded_bytes(manifest.splits[split].count, len(crop_epochs), input_sizes(config))
        for split, crop_epochs in table_crops(config).items()
    )
    return sum(sizes) <= config.search.cache_gb * 1e9


def table_crops(config: Config) -> dict[str, range]:
    """Return, for each split, the crop epochs that the trials see and the logit tables contain."""
    return {TRAIN: range(num_crops(config)), VALIDATION: range(1)}


def num_crops(config: Config) -> int:
    """Return the number of different crops of each training image that the trials see."""
    num_crops = trial_stage(config).num_crops
    assert num_crops is not None
    return num_crops


def trial_stage(config: Config) -> PredictorStage:
    """Return the stage that a trial runs: stages.predictor, for search.epochs."""
    stage = config.stages.predictor
    assert stage is not None
    epochs = config.search.epochs or stage.epochs
    return stage.model_copy(
        update={"epochs": epochs, "num_crops": min(stage.num_crops or epochs, epochs), "init_from": None}
    )


def trial_config(config: Config, candidate: Candidate, seed: int) -> Config:
    """Return a trial's configuration: only the predictor stage, with one candidate."""
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
        seed: seed of weights, order and noise. With the configuration's seed, a trial computes the same as the
            predictor stage of a run with one worker and no earlier stage.
        on_epoch: called after every epoch with the number of finished epochs and the measured values. If given, every
            epoch is evaluated.

    Returns:
        The record, and the predictor's weights on the CPU. A diverged trial has no weights; its record has the reason.
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
    """Return the training loop's inputs for a trial, which evaluates after every epoch or only after the last."""
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
        num_crops=num_crops(data.config),
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
    """Build a trial's network around the backbone that all trials share, and measure its costs."""
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
    """The loop's Reporter, which keeps the values of the last epoch and the warnings of the last evaluation."""

    def __init__(self, on_epoch: Callable[[int, Mapping[str, float]], None] | None):
        self._on_epoch = on_epoch
        self.values: Mapping[str, float] = {}
        self.warnings: list[str] = []

    def step(self, progress: Progress, loss: Tensor) -> None:
        pass

    def epoch(self, progress: Progress, values: Mapping[str, float]) -> None:
        self.values, self.warnings = values, []  # the loop sends an epoch's warning after its values
        if self._on_epoch is not None:
            self._on_epoch(progress.epoch + 1, values)

    def message(self, text: str) -> None:
        self.warnings.append(text)

    def keep(self, name: str, model: DRNet) -> None:
        pass

    def checkpoint(self, state: TrainingState, values: Mapping[str, float]) -> None:
        pass
