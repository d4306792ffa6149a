"""Choose the next trial of a search, and the trials that ASHA may stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from pipeline.search.front import budget_score
from pipeline.search.records import Record
from pipeline.search.space import Candidate, Space
from pipeline.search.trial import ACCURACY, EPOCH, GFLOPS, SCORE, SearchSettings

MAX_DRAWS = 500
"""The number of consecutively rejected candidates (too expensive or already tried) after which the space is used up."""
SAMPLER_DRAWS = 20
"""The number of draws from the sampler. Later draws are random, because in a small space the sampler repeats itself."""
STARTUP_SHARE = 0.25
"""The share of the trials that are drawn at random before the sampler learns from them."""

Trial = tuple[Candidate, int]
"""A candidate and a seed."""


@dataclass(frozen=True)
class RunningTrial:
    """A trial that Tune is running. `drawn` is the sampler's name for it, or None for a fixed trial or a repeat."""

    candidate: Candidate
    seed: int
    drawn: str | None = None


def records_in(space: Space, fixed: Sequence[Candidate], settings: SearchSettings) -> list[Record]:
    """Return the records, with the seeds of this search, of the fixed candidates and of the candidates in the space.

    An earlier attempt may have had a larger space or more seeds.
    """
    records = [record for record in settings.records.read(settings.context) if record.seed in settings.seeds]
    return [record for record in records if record.candidate in fixed or record.candidate in space]


class TrialSearcher(Searcher):
    """Choose the next trial: the fixed candidates, then the sampler's, then the finalists with the other seeds.

    The records are the state: a recorded trial is not repeated, and the sampler learns from it again after a restart.

    Args:
        fixed: candidates that are always tried, such as the paper's.
        num_drawn: number of the sampler's candidates, including recorded ones.
        finalists: selects, from the first seed's records, the candidates to train with every seed.
        on_record: called with the record of every trial that ends.
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
        self._seeds = settings.seeds
        first_seed = self._seeds[0]
        known = records_in(space, fixed, settings)
        self._done = {(record.candidate, record.seed): record for record in known if record.outcome != "failed"}
        drawn = [candidate for candidate, seed in self._done if seed == first_seed and candidate not in fixed]
        self._left = max(0, num_drawn - len(drawn)) if space.parameters else 0
        self._fixed = [(candidate, first_seed) for candidate in fixed]
        self._running: dict[str, RunningTrial] = {}
        num_repeated = len(fixed) + (settings.config.search.finalists if space.parameters else 0)
        self.num_planned = len(fixed) + self._left + len(drawn) + num_repeated * (len(self._seeds) - 1)
        """An upper bound on the number of trials."""
        self._random = np.random.default_rng([settings.config.seed, len(self._done)])
        self._sampler = self._make_sampler(metrics, modes, num_drawn) if self._left else None

    @property
    def num_done(self) -> int:
        """The number of trials that have ended, including those of earlier attempts."""
        return len(self._done)

    @property
    def is_over(self) -> bool:
        """Whether no trial is left to run."""
        return not (self._left or self._running or self._missing(self._fixed) or self._missing(self._repeats()))

    def _missing(self, wanted: Iterable[Trial]) -> list[Trial]:
        running = {(trial.candidate, trial.seed) for trial in self._running.values()}
        return [trial for trial in wanted if trial not in self._done and trial not in running]

    def _repeats(self) -> list[Trial]:
        """Return the finalists with every other seed. They are known once all trials of the first seed have ended."""
        first = [record for record in self._done.values() if record.seed == self._seeds[0]]
        return [(candidate, seed) for seed in self._seeds[1:] for candidate in self._finalists(first)]

    def _make_sampler(self, metrics: Any, modes: Any, num_drawn: int) -> OptunaSearch:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage, name = optuna.storages.InMemoryStorage(), "search"
        distributions = self._space.distributions()
        up, down = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
        directions = [up, down] if isinstance(metrics, list) else [up]
        study = self._study = optuna.create_study(storage=storage, study_name=name, directions=directions)
        for record in self._done.values():
            values = self._space.sampled(record.candidate)
            objectives = self._objectives(record)
            if values is not None and objectives is not None and record.seed == self._seeds[0]:
                study.add_trial(optuna.create_trial(params=values, distributions=distributions, values=objectives))
        sampler = optuna.samplers.TPESampler(
            seed=self._settings.config.seed + len(self._done), n_startup_trials=round(STARTUP_SHARE * num_drawn)
        )
        return OptunaSearch(
            space=distributions, metric=metrics, mode=modes, sampler=sampler, storage=storage, study_name=name
        )

    def _objectives(self, record: Record) -> list[float] | None:
        """Return the values that the sampler optimizes, or None for a trial without a result."""
        if record.accuracy is None or record.gflops is None:
            return None
        if isinstance(self.metric, list):
            return [record.accuracy, record.gflops]
        budget = self._settings.config.search.budget_gflops
        assert budget is not None
        return [budget_score({"accuracy_routed": record.accuracy, "gflops_routed": record.gflops}, budget)]

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial, or None while it depends on trials that are still running."""
        trial: RunningTrial | None = None
        if fixed := self._missing(self._fixed):
            trial = RunningTrial(*fixed[0])
        elif self._left:
            trial = self._draw(trial_id)
        if trial is None and self._is_running_first():
            return None
        if trial is None and (repeats := self._missing(self._repeats())):
            trial = RunningTrial(*repeats[0])
        if trial is None:
            return None if self._running else Searcher.FINISHED
        # A record that is here says how an earlier attempt failed, which is not the reason if this one fails.
        self._settings.records.remove(self._settings.context, trial.candidate, trial.seed)
        self._running[trial_id] = trial
        return {"candidate": trial.candidate.described(), "seed": trial.seed, "to_the_end": trial.drawn is None}

    def _is_running_first(self) -> bool:
        return any(trial.seed == self._seeds[0] for trial in self._running.values())

    def _draw(self, trial_id: str) -> RunningTrial | None:
        """Draw a new candidate within the cost limit, or return None if the space is used up."""
        assert self._sampler is not None
        tried = {candidate for candidate, _ in self._done} | {trial.candidate for trial in self._running.values()}
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
        """Record a trial that has ended, and report it to the sampler."""
        trial = self._running.pop(trial_id, None)
        if trial is None:
            return
        settings = self._settings
        record = settings.records.find(settings.context, trial.candidate, trial.seed)
        if record is None or (record.outcome == "failed" and not error):
            record = self._cut_short(trial, result, error)
            settings.records.write(record)
        self._done[trial.candidate, trial.seed] = record
        objectives = self._objectives(record)
        if trial.drawn is not None and self._sampler is not None:
            names = self.metric if isinstance(self.metric, list) else [self.metric]
            answer = dict(zip(names, objectives, strict=True)) if objectives is not None else None
            self._sampler.on_trial_complete(trial.drawn, answer, error=objectives is None)
        self._on_record(record)

    def _cut_short(self, trial: RunningTrial, result: Mapping[str, Any] | None, error: bool) -> Record:
        """Return the record of a trial that could not write one itself: ASHA stopped it, or its process died."""
        record = Record(self._settings.context, trial.candidate, trial.seed, outcome="failed")
        if error or not result or result.get(ACCURACY) is None:
            tries = self._settings.config.search.max_failures + 1
            times = f"{tries} time{'s' if tries > 1 else ''}"
            return replace(record, reason=f"its process died {times}; the usual cause is too little memory")
        return replace(
            record,
            outcome="stopped",
            reason=f"worse than others after {result[EPOCH]} epochs",
            accuracy=result[ACCURACY],
            gflops=result[GFLOPS],
            epochs=result[EPOCH],
        )

    def save(self, checkpoint_path: str) -> None:
        """Do nothing, because the records are the state."""

    def __getstate__(self) -> dict[str, Any]:
        """Return no state. Ray Tune pickles the searcher to restore it, but the records are the state."""
        return {}


class PatientASHA(ASHAScheduler):
    """ASHA that never stops the paper's four, the finalists' repeats, or a trial after its last epoch.

    A diverged trial has no score, and Ray's own scheduler would fail on it.

    Args:
        epochs: epochs of a trial.
        grace_epochs: epochs before a trial may be stopped.
    """

    def __init__(self, epochs: int, grace_epochs: int):
        super().__init__(time_attr=EPOCH, metric=SCORE, mode="max", max_t=epochs, grace_period=grace_epochs)
        self._epochs = epochs

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return ASHA's decision about a trial, or CONTINUE for a trial that it must not stop."""
        # A trial that is stopped after its last epoch could not write its record.
        if trial.config["to_the_end"] or result[SCORE] is None or result[EPOCH] >= self._epochs:
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Tell ASHA about a trial that has ended, or remove the trial if it has no score."""
        if result.get(SCORE) is None:
            self.on_trial_remove(tune_controller, trial)
        else:
            super().on_trial_complete(tune_controller, trial, result)
