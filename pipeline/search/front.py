"""The front of a search: candidates that none beats in both accuracy and cost, and the choice by a budget.

Accuracies are fractions of 1, costs GFLOPs (1e9 multiply-adds), the predictor included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from pipeline.config import SearchConfig
from pipeline.evaluation.statistics import Estimate, accuracy, mean_over_seeds
from pipeline.search.records import Record, by_candidate
from pipeline.search.space import Candidate

Item = TypeVar("Item")
Point = tuple[float, float]
"""accuracy, GFLOPs"""


@dataclass(frozen=True, eq=False)
class Summary:
    """A candidate over its seeds; every record has a result.

    Attributes:
        right_SN: whether each image is routed to a resolution that is right, by seed, bool.
    """

    candidate: Candidate
    records: tuple[Record, ...]
    right_SN: np.ndarray

    @property
    def num_seeds(self) -> int:
        return len(self.records)

    @cached_property
    def accuracy(self) -> Estimate:
        """Mean over the seeds; the interval is over images and seeds, Wilson's where there is one seed."""
        if self.num_seeds == 1:
            return accuracy(int(self.right_SN.sum()), self.right_SN.shape[1])
        return mean_over_seeds(self.right_SN.astype(np.float64))

    @cached_property
    def gflops(self) -> float:
        """Mean over the seeds."""
        return float(np.mean([record.gflops for record in self.records]))

    @property
    def gflops_range(self) -> tuple[float, float]:
        """Of the seeds."""
        costs = [record.gflops for record in self.records if record.gflops is not None]
        return min(costs), max(costs)

    @property
    def predictor_gflops(self) -> float:
        return self.records[0].predictor_gflops or 0.0

    @property
    def shares(self) -> list[float]:
        """Of the images at each resolution, the mean over the seeds."""
        return np.mean([record.shares for record in self.records], axis=0).tolist()

    @property
    def point(self) -> Point:
        return self.accuracy.value, self.gflops

    def minus(self, other: Summary) -> Estimate:
        """Difference of two accuracies, on the same images and with the seeds that both have."""
        seeds = sorted({record.seed for record in self.records} & {record.seed for record in other.records})
        mine, theirs = self._rows(seeds), other._rows(seeds)
        return mean_over_seeds(mine.astype(np.float64) - theirs)

    def _rows(self, seeds: Sequence[int]) -> np.ndarray:
        places = {record.seed: row for row, record in enumerate(self.records)}
        return self.right_SN[[places[seed] for seed in seeds]]


def summarize(records: Sequence[Record], correct_NR: np.ndarray) -> dict[Candidate, Summary]:
    """Every candidate with a result.

    Args:
        correct_NR: whether each resolution is right, by image of the validation beton, bool.
    """
    rows_N = np.arange(len(correct_NR))
    return {
        candidate: Summary(candidate, tuple(found), np.stack([correct_NR[rows_N, record.chosen_N] for record in found]))
        for candidate, found in by_candidate(record for record in records if record.has_result).items()
    }


def pareto(items: Sequence[Item], point: Callable[[Item], Point]) -> list[Item]:
    """Those that no other dominates, cheapest first: none is as accurate and as cheap, and better in one of the two."""
    front: list[Item] = []
    for item in sorted(items, key=lambda item: (point(item)[1], -point(item)[0])):
        if not front or point(item)[0] > point(front[-1])[0]:
            front.append(item)
    return front


def dominates(first: Point, second: Point) -> bool:
    """Whether `first` is no worse in both, and better in one."""
    return first[0] >= second[0] and first[1] <= second[1] and first != second


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The area between a set of points and a reference that is worse in both."""
    volume, lowest = 0.0, reference[0]
    for value, gflops in pareto(points, lambda point: point):
        if value > lowest and gflops < reference[1]:
            volume += (value - lowest) * (reference[1] - gflops)
            lowest = value
    return volume


def spread(items: Sequence[Item], point: Callable[[Item], Point], count: int) -> list[Item]:
    """Up to `count` of the front's items that together keep the most of its hypervolume, cheapest first.

    The second is always the most accurate: a flat end adds little area, but whoever allows little loss needs it.
    Greedy, so the first ones taken are those to keep where `count` is smaller.
    """
    front, chosen = pareto(items, point), []
    if not front:
        return []
    costs, values = [point(item)[1] for item in front], [point(item)[0] for item in front]
    # A tenth of the range beyond the worst, so that both ends count.
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


def choose(
    items: Sequence[Item],
    point: Callable[[Item], Point],
    *,
    budget_gflops: float | None = None,
    lowest_accuracy: float | None = None,
) -> Item | None:
    """The one to deploy: within the budget the most accurate, or of those that are accurate enough the cheapest.

    With both, the cheapest that is within the budget and accurate enough. None where there is no such item.
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
    """What objective=budget maximises: accuracy, less a point for every percent above the budget."""
    return values["accuracy_routed"] - max(0.0, values["gflops_routed"] / budget_gflops - 1)


def budget_alias(search: SearchConfig) -> str:
    """The registry's alias of what a budget chooses, such as under-13-mflops or within-0-5-points."""
    parts = []
    if search.budget_gflops is not None:
        parts.append(f"under-{1000 * search.budget_gflops:g}-mflops")
    if search.max_accuracy_drop is not None:
        parts.append(f"within-{search.max_accuracy_drop:g}-points")
    return "-".join(parts).replace(".", "-")
