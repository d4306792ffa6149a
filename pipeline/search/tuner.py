"""The trials of a search on Ray Tune: what one of its processes does, and which trial is next."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from datasets.beton import TRAIN, VALIDATION, Manifest, beton_path
from datasets.loading.decoded import DecodedCrops, Ordered, Reader, decoded_bytes
from pipeline.cluster.worker import data_of_node
from pipeline.config.schema import Config
from pipeline.search.front import budget_score
from pipeline.search.records import Record, Records, SearchFolder
from pipeline.search.space import Candidate, Space, input_sizes
from pipeline.search.trial import TrialData, num_crops, run_trial
from pipeline.training.assembly import open_loader
from pipeline.training.checkpoint import load_model
from pipeline.training.logit_table import LogitTable, TableKey, copy_table

ACCURACY, GFLOPS, SCORE, EPOCH = "accuracy", "gflops", "score", "epoch"
MAX_DRAWS = 500
"""candidates that may be drawn in vain, too dear or tried before, until the space counts as used up"""
SAMPLER_DRAWS = 20
"""of them by the sampler, which in a small space keeps to what it likes best; the others are random"""
STARTUP_SHARE = 0.25
"""of the trials, drawn at random before the sampler learns from them"""


@dataclass(frozen=True)
class SearchSettings:
    """What the driver hands to every trial."""

    config: Config
    folder: SearchFolder
    """the same on every node"""
    data_digest: str
    context: str
    cpus: int
    """of a trial"""

    @property
    def tables(self) -> Path:
        """The folder of logit tables."""
        return self.config.search.tables or self.folder.tables

    @property
    def records(self) -> Records:
        return Records(self.folder.trials)


def tune_trial(config: Mapping[str, Any], settings: SearchSettings) -> None:
    """Ray Tune's trainable: one trial, its record written before it is told.

    Raises:
        Exception: what kept the trial from its end, also in its record; a diverged trial is an end.
    """
    candidate, seed = Candidate.parse(config["candidate"]), config["seed"]
    budget = settings.config.search.budget_gflops if settings.config.search.objective == "budget" else None

    def tell_epoch(epoch: int, values: Mapping[str, float]) -> None:
        assert budget is not None
        told = {ACCURACY: values["accuracy_routed"], GFLOPS: values["gflops_routed"], EPOCH: epoch}
        tune.report(told | {SCORE: budget_score(values, budget)})

    try:
        data = trial_data(settings)
        record, predictor = run_trial(data, candidate, seed, tell_epoch if budget is not None else None)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        settings.records.write(Record(settings.context, candidate, seed, outcome="failed", reason=reason))
        raise
    settings.records.write(record, predictor)
    if budget is None or not record.has_result:
        tune.report({ACCURACY: record.accuracy, GFLOPS: record.gflops, SCORE: None, EPOCH: record.epochs})


@lru_cache(maxsize=1)
def trial_data(settings: SearchSettings) -> TrialData:
    """What this process's trials share; made by the first of them. The first process of a node copies and decodes."""
    config = settings.config
    torch.set_num_threads(settings.cpus)
    manifest = data_of_node(config.data, settings.data_digest, print)
    loaded = load_model(settings.folder.backbone)
    node = config.search.node_folder
    tables = {}
    for split, crop_epochs in ((TRAIN, range(num_crops(config))), (VALIDATION, range(1))):
        key, root = TableKey.of(loaded.model, config, manifest, split), settings.tables
        if node is not None:
            copy_table(root, node / "tables", key, crop_epochs)
            root = node / "tables"
        tables[split] = LogitTable(root, key, crop_epochs)
    cached = decodes_once(config, manifest)
    readers = {split: _reader(settings, tables[split].key, cached) for split in tables}
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
    """What trials read of a split: decoded once a node, where that is small enough."""
    config, sides = settings.config, input_sizes(settings.config)
    crop_epochs = range(num_crops(config) if key.split == TRAIN else 1)
    loader = open_loader(config, key.split, sides, num_threads=os.cpu_count() or 1 if cached else settings.cpus)
    if not cached:
        return loader
    about = {"data": key.data, "split": key.split, "crop": dict(key.crop)}
    folder = (config.search.node_folder or settings.folder.path) / "decoded"
    decoded = DecodedCrops(folder, beton_path(config.data.folder, key.split), about, crop_epochs, sides)
    decoded.fill(loader)
    return decoded


def decodes_once(config: Config, manifest: Manifest) -> bool:
    """Whether the trials' images take no more than search.cache_gb."""
    sides, train, validation = input_sizes(config), manifest.splits[TRAIN].count, manifest.splits[VALIDATION].count
    size = decoded_bytes(train, num_crops(config), sides) + decoded_bytes(validation, 1, sides)
    return size <= config.search.cache_gb * 1e9


Trial = tuple[Candidate, int]
"""a candidate and a seed"""


@dataclass(frozen=True)
class RunningTrial:
    """A trial that Tune has: of the plan's own, or drawn by the sampler as `drawn`."""

    candidate: Candidate
    seed: int
    drawn: str | None = None


class TrialSearcher(Searcher):
    """Which trial comes next: fixed ones, then as many as are wanted of the sampler's, then the finalists' seeds.

    The records are the state: what is in them is not tried again, and tells the sampler what it told before.

    Args:
        fixed: candidates that are tried whatever comes out, such as the paper's.
        num_drawn: candidates of the sampler, those that are in the records included.
        finalists: of all records so far, those to train with every seed.
        on_record: is told every trial that has ended.
    """

    def __init__(
        self,
        settings: SearchSettings,
        space: Space,
        fixed: Sequence[Candidate],
        num_drawn: int,
        finalists: Callable[[Sequence[Record]], Iterable[Candidate]],
        on_record: Callable[[Record], None],
    ):
        budget = settings.config.search.objective == "budget"
        metrics, modes = (SCORE, "max") if budget else ([ACCURACY, GFLOPS], ["max", "min"])
        super().__init__(metric=metrics, mode=modes)
        self._settings, self._space = settings, space
        self._finalists, self._on_record = finalists, on_record
        first_seed = settings.config.seed
        self._seeds = range(first_seed, first_seed + settings.config.search.seeds)
        known = settings.records.read(settings.context)
        self._done = {(record.candidate, record.seed): record for record in known if record.outcome != "failed"}
        drawn = [record for (candidate, seed), record in self._done.items() if self._was_drawn(candidate, seed, fixed)]
        self._left = max(0, num_drawn - len(drawn)) if space.parameters else 0
        self._fixed = [(candidate, first_seed) for candidate in fixed]
        self._running: dict[str, RunningTrial] = {}
        num_repeated = len(fixed) + (settings.config.search.finalists if space.parameters else 0)
        self.num_planned = len(fixed) + self._left + len(drawn) + num_repeated * (len(self._seeds) - 1)
        """at most"""
        self._random = np.random.default_rng([settings.config.seed, len(self._done)])
        self._sampler = self._make_sampler(metrics, modes, num_drawn) if self._left else None

    @property
    def num_done(self) -> int:
        """Trials that have ended, those of earlier sittings included."""
        return len(self._done)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to try."""
        return not (self._left or self._running or self._missing(self._fixed) or self._missing(self._repeats()))

    def _missing(self, wanted: Iterable[Trial]) -> list[Trial]:
        running = {(work.candidate, work.seed) for work in self._running.values()}
        return [trial for trial in wanted if trial not in self._done and trial not in running]

    def _repeats(self) -> list[Trial]:
        """The finalists with every seed: known when everything has been tried with the first."""
        first = [record for record in self._done.values() if record.seed == self._seeds[0]]
        return [(candidate, seed) for seed in self._seeds[1:] for candidate in self._finalists(first)]

    def _was_drawn(self, candidate: Candidate, seed: int, fixed: Sequence[Candidate]) -> bool:
        return seed == self._seeds[0] and candidate not in fixed and self._space.sampled(candidate) is not None

    def _make_sampler(self, metrics: Any, modes: Any, num_drawn: int) -> OptunaSearch:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage, name = optuna.storages.InMemoryStorage(), "search"
        distributions = self._space.distributions()
        up, down = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
        directions = [up, down] if isinstance(metrics, list) else [up]
        study = self._study = optuna.create_study(storage=storage, study_name=name, directions=directions)
        for record in self._done.values():
            values = self._space.sampled(record.candidate)
            told = self._told(record)
            if values is not None and told is not None and record.seed == self._seeds[0]:
                study.add_trial(optuna.create_trial(params=values, distributions=distributions, values=told))
        sampler = optuna.samplers.TPESampler(
            seed=self._settings.config.seed + len(self._done), n_startup_trials=round(STARTUP_SHARE * num_drawn)
        )
        return OptunaSearch(
            space=distributions, metric=metrics, mode=modes, sampler=sampler, storage=storage, study_name=name
        )

    def _told(self, record: Record) -> list[float] | None:
        """A record as the sampler hears of it."""
        if record.accuracy is None or record.gflops is None:
            return None
        if isinstance(self.metric, list):
            return [record.accuracy, record.gflops]
        budget = self._settings.config.search.budget_gflops
        assert budget is not None
        return [budget_score({"accuracy_routed": record.accuracy, "gflops_routed": record.gflops}, budget)]

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial; None while the next one depends on those that run."""
        work: RunningTrial | None = None
        if fixed := self._missing(self._fixed):
            work = RunningTrial(*fixed[0])
        elif self._left:
            work = self._draw(trial_id)
        if work is None and self._is_running_first():
            return None
        if work is None and (repeats := self._missing(self._repeats())):
            work = RunningTrial(*repeats[0])
        if work is None:
            return None if self._running else Searcher.FINISHED
        self._running[trial_id] = work
        return {"candidate": work.candidate.described(), "seed": work.seed, "to_the_end": work.drawn is None}

    def _is_running_first(self) -> bool:
        return any(work.seed == self._seeds[0] for work in self._running.values())

    def _draw(self, trial_id: str) -> RunningTrial | None:
        """A candidate of the sampler that is not too dear and was not tried; None where the space is used up."""
        assert self._sampler is not None
        tried = {candidate for candidate, _ in self._done} | {work.candidate for work in self._running.values()}
        for number in range(MAX_DRAWS):
            drawn = f"{trial_id}-{number}"
            if number >= SAMPLER_DRAWS:
                self._study.enqueue_trial(self._space.random(self._random))
            values = self._sampler.suggest(drawn)
            assert values is not None
            candidate = self._space.candidate(values)
            if candidate not in tried and self._space.allows(candidate):
                self._left -= 1
                return RunningTrial(candidate, self._seeds[0], drawn)
            self._sampler.on_trial_complete(drawn, error=True)
        self._left = 0
        return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take in a trial that has ended, however it did."""
        work = self._running.pop(trial_id, None)
        if work is None:
            return
        settings = self._settings
        record = settings.records.find(settings.context, work.candidate, work.seed)
        if record is None or (record.outcome == "failed" and not error):
            record = self._cut_short(work, result, error)
            settings.records.write(record)
        self._done[work.candidate, work.seed] = record
        told = self._told(record)
        if work.drawn is not None and self._sampler is not None:
            names = self.metric if isinstance(self.metric, list) else [self.metric]
            answer = dict(zip(names, told, strict=True)) if told is not None else None
            self._sampler.on_trial_complete(work.drawn, answer, error=told is None)
        self._on_record(record)

    def _cut_short(self, work: RunningTrial, result: Mapping[str, Any] | None, error: bool) -> Record:
        """The record of a trial that could not write its own: stopped by ASHA, or its process died."""
        record = Record(self._settings.context, work.candidate, work.seed, outcome="failed")
        if error or not result or result.get(ACCURACY) is None:
            tries = self._settings.config.search.max_failures + 1
            return replace(record, reason=f"its process died, {tries} times; too little memory is the usual reason")
        return replace(
            record,
            outcome="stopped",
            reason=f"worse than others after {result[EPOCH]} epochs",
            accuracy=result[ACCURACY],
            gflops=result[GFLOPS],
            epochs=result[EPOCH],
        )

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records are the state."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray Tune pickles a plan for restoring it, which the records are for."""
        return {}


class PatientASHA(ASHAScheduler):
    """ASHA that lets the plan's own trials run to their end: the paper's four and the finalists' seeds.

    A trial that diverged has no score to be compared by, which Ray's scheduler would compute with.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if trial.config["to_the_end"] or result[SCORE] is None:
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if result.get(SCORE) is None:
            self.on_trial_remove(tune_controller, trial)
        else:
            super().on_trial_complete(tune_controller, trial, result)
