"""The Pareto front of a search: the best candidates, the one to deploy, and which parameters matter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import optuna

from pipeline.config.schema import SearchConfig
from pipeline.evaluation.statistics import Estimate, accuracy, mean_over_seeds
from pipeline.policies.fit import pareto
from pipeline.search.records import Record, by_candidate
from pipeline.search.space import Candidate, Range, Space

MIN_TRIALS = 10
NUM_RESAMPLES = 20
"""The number of bootstrap resamples of the trials. They are too few for quantiles, so their range is reported."""
TARGETS = ("accuracy", "gflops")
Item = TypeVar("Item")
Point = tuple[float, float]
"""The accuracy and the GFLOPs of an item."""


@dataclass(frozen=True, eq=False)
class Summary:
    """The results of a candidate over its seeds. Every record has a result.

    Attributes:
        correct_SN: whether the routed answer is correct, by seed and image, bool.
    """

    candidate: Candidate
    records: tuple[Record, ...]
    correct_SN: np.ndarray

    @property
    def num_seeds(self) -> int:
        """The number of seeds."""
        return len(self.records)

    @cached_property
    def accuracy(self) -> Estimate:
        """The mean over the seeds. The interval covers images and seeds, or is Wilson's interval for one seed."""
        if self.num_seeds == 1:
            return accuracy(int(self.correct_SN.sum()), self.correct_SN.shape[1])
        return mean_over_seeds(self.correct_SN.astype(np.float64))

    @cached_property
    def gflops(self) -> float:
        """The mean cost over the seeds, including the predictor."""
        return float(np.mean([record.gflops for record in self.records]))

    @property
    def gflops_range(self) -> tuple[float, float]:
        """The lowest and the highest cost of the seeds."""
        costs = [record.gflops for record in self.records if record.gflops is not None]
        return min(costs), max(costs)

    @property
    def predictor_gflops(self) -> float:
        """The predictor's cost for one image, in GFLOPs."""
        return self.records[0].predictor_gflops or 0.0

    @property
    def shares(self) -> list[float]:
        """The share of the images at each resolution, averaged over the seeds."""
        return np.mean([record.shares for record in self.records], axis=0).tolist()

    @property
    def point(self) -> Point:
        """Accuracy and GFLOPs, the means over the seeds."""
        return self.accuracy.value, self.gflops

    def minus(self, other: Summary) -> Estimate:
        """Return the difference of two accuracies on the same images, over the seeds that both candidates have."""
        seeds = sorted({record.seed for record in self.records} & {record.seed for record in other.records})
        mine, theirs = self._rows(seeds), other._rows(seeds)
        return mean_over_seeds(mine.astype(np.float64) - theirs)

    def _rows(self, seeds: Sequence[int]) -> np.ndarray:
        places = {record.seed: row for row, record in enumerate(self.records)}
        return self.correct_SN[[places[seed] for seed in seeds]]


def summarize(records: Sequence[Record], correct_NR: np.ndarray) -> dict[Candidate, Summary]:
    """Summarize every candidate that has a result.

    Args:
        correct_NR: whether each resolution is correct, for the images of the validation beton, bool.
    """
    rows_N = np.arange(len(correct_NR))
    return {
        candidate: Summary(candidate, tuple(found), np.stack([correct_NR[rows_N, record.chosen_N] for record in found]))
        for candidate, found in by_candidate(record for record in records if record.has_result).items()
    }


def dominates(first: Point, second: Point) -> bool:
    """Return whether `first` is at least as good in both values, and better in one."""
    return first[0] >= second[0] and first[1] <= second[1] and first != second


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Return the area between a set of points and a reference that is worse in both values."""
    volume, lowest = 0.0, reference[0]
    for value, gflops in pareto(points, lambda point: point):
        if value > lowest and gflops < reference[1]:
            volume += (value - lowest) * (reference[1] - gflops)
            lowest = value
    return volume


def spread(items: Sequence[Item], point: Callable[[Item], Point], count: int) -> list[Item]:
    """Select up to `count` items of the front that together keep most of its hypervolume, cheapest first.

    The selection is greedy, so a smaller `count` selects a subset of the same items. The second selected item is always
    the most accurate one: the flat end of a front adds little area, but users who accept little loss need it.
    """
    front, chosen = pareto(items, point), []
    if not front:
        return []
    costs, values = [point(item)[1] for item in front], [point(item)[0] for item in front]
    # The reference is a tenth of the range worse than the worst values, so that both ends add area.
    margin = 0.1
    reference = (
        min(values) - margin * (max(values) - min(values) or 1.0),
        max(costs) + margin * (max(costs) - min(costs) or 1.0),
    )
    while len(chosen) < min(count, len(front)):
        rest = [item for item in front if item not in chosen]
        if len(chosen) == 1 and front[-1] in rest:
            rest = front[-1:]
        taken = [point(item) for item in chosen]
        chosen.append(max(rest, key=lambda item: hypervolume([*taken, point(item)], reference)))
    return sorted(chosen, key=lambda item: point(item)[1])


def choose_item(
    items: Sequence[Item],
    point: Callable[[Item], Point],
    *,
    budget_gflops: float | None = None,
    lowest_accuracy: float | None = None,
) -> Item | None:
    """Return the item to deploy: the most accurate one within the budget, or the cheapest one that is accurate enough.

    With both limits, it is the cheapest one that is within the budget and accurate enough. Return None if there is
    none.
    """
    allowed = [
        item
        for item in items
        if (budget_gflops is None or point(item)[1] <= budget_gflops)
        and (lowest_accuracy is None or point(item)[0] >= lowest_accuracy)
    ]
    if not allowed:
        return None
    if lowest_accuracy is None:
        return max(allowed, key=lambda item: (point(item)[0], -point(item)[1]))
    return min(allowed, key=lambda item: (point(item)[1], -point(item)[0]))


def budget_score(values: Mapping[str, float], budget_gflops: float) -> float:
    """Return the score that objective=budget maximizes: accuracy, minus one point for each percent above the budget."""
    return values["accuracy_routed"] - max(0.0, values["gflops_routed"] / budget_gflops - 1)


def budget_alias(search: SearchConfig) -> str:
    """Return the registry alias of the model that a budget chooses, such as under-13-mflops or within-0-5-points."""
    parts = []
    if search.budget_gflops is not None:
        parts.append(f"under-{1000 * search.budget_gflops:g}-mflops")
    if search.max_accuracy_drop is not None:
        parts.append(f"within-{search.max_accuracy_drop:g}-points")
    return "-".join(parts).replace(".", "-")


def parameter_importance(records: Sequence[Record], space: Space) -> list[dict[str, Any]]:
    """Return each parameter's share of the variance of accuracy and of cost, by fANOVA (Hutter et al., ICML 2014).

    Args:
        records: trials of one seed.

    Returns:
        For each parameter, `parameter` and, for accuracy and gflops, the `mean` and the range `low` to `high` over
        NUM_RESAMPLES bootstrap resamples of the trials; the most important for accuracy first. Empty with fewer than
        MIN_TRIALS trials.
    """
    usable = [record for record in records if record.has_result and space.sampled(record.candidate) is not None]
    varied = [key for key, parameter in space.parameters.items() if _varies(parameter)]
    if len(usable) < MIN_TRIALS or not varied:
        return []
    generator = np.random.default_rng(0)
    draws = [generator.integers(len(usable), size=len(usable)) for _ in range(NUM_RESAMPLES)]
    samples = [[_importance([usable[n] for n in draw], space, varied, target) for target in TARGETS] for draw in draws]
    rows: list[dict[str, Any]] = []
    for key in varied:
        row: dict[str, Any] = {"parameter": key}
        for place, target in enumerate(TARGETS):
            values = np.array([sample[place][key] for sample in samples])
            row[target] = {"mean": float(values.mean()), "low": float(values.min()), "high": float(values.max())}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["accuracy"]["mean"])


def _varies(parameter: Any) -> bool:
    return parameter.low < parameter.high if isinstance(parameter, Range) else len(set(parameter.values)) > 1


def _importance(records: Sequence[Record], space: Space, varied: Sequence[str], target: str) -> dict[str, float]:
    every = space.distributions()
    distributions = {key: every[key] for key in varied}
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # otherwise a line for every study
    study = optuna.create_study()
    for record in records:
        sampled = space.sampled(record.candidate)
        assert sampled is not None
        params = {key: sampled[key] for key in varied}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=getattr(record, target)))
    if len({getattr(record, target) for record in records}) == 1:
        return dict.fromkeys(varied, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=8, max_depth=16, seed=0)
        return optuna.importance.get_param_importances(study, evaluator=evaluator, params=list(varied))
