"""Choose a policy by a budget on one part of the validation images, and measure the policy on the other part.

The images that a policy is chosen on are never the images that its results are reported on. With many images, one half
(`select`) is for choosing and the other half for reporting. With few images, cross-fitting takes the place of the
halves: the policies of each fold are fitted on the other folds, so results cover every image.

`compare_joint` compares the models before and after the joint stage by their cross-fitted policies. With halves it uses
only the images for choosing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from datasets.loading.order import splitmix64
from pipeline.models.cost import Costs
from pipeline.policies.fit import ALL, FittedPolicy, fit_fronts, fit_policies
from pipeline.policies.route import Images, Routed, route
from pipeline.serving.runtime.policy import static_policy

CONFIDENCE = 0.95
"""The confidence level of the one-sided bound that a policy must meet to count as within a budget."""
CURVE_POINTS = 30
"""The number of costs at which a curve is computed."""


@dataclass(frozen=True)
class Budget:
    """The highest cost of a policy, and how much less accurate than the best static resolution it may be.

    Attributes:
        cost: highest mean cost per image, in the unit of `Images.costs`; None sets no limit.
        max_drop: largest loss of accuracy, as a fraction of 1; None sets no limit.
    """

    cost: float | None = None
    max_drop: float | None = None


@dataclass(frozen=True)
class Split:
    """How to divide images into those that policies are fitted on and those that results are reported on.

    Attributes:
        select_share: share of the images that policies are fitted on; results are reported on the rest.
        cross_fit_below: with fewer images than this, cross-fitting over folds replaces the two halves.
        folds: number of folds.
        seed: seed of the hash that assigns images to parts.
    """

    select_share: float = 0.5
    cross_fit_below: int = 1000
    folds: int = 5
    seed: int = 0

    def parts(self, keys_N: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the pairs (rows to fit on, rows to apply to), int64. Results are reported on all rows to apply to
        together.

        Args:
            keys_N: uint64 keys that identify the images, such as the checksums of their bytes. The key alone decides
                the side of an image, so other images do not change it, and duplicates stay together.

        Raises:
            ValueError: fewer than two different keys are left to fit on, or none to report on.
        """
        uniform_N = hashed(keys_N, self.seed)
        if len(keys_N) >= self.cross_fit_below:
            parts = [(np.flatnonzero(uniform_N < self.select_share), np.flatnonzero(uniform_N >= self.select_share))]
        else:
            parts = _folds(np.floor(uniform_N * self.folds))
        if any(len(np.unique(keys_N[fit])) < 2 or len(apply) == 0 for fit, apply in parts):
            raise ValueError(
                f"the {len(keys_N)} validation images cannot be divided into images to choose policies on and images "
                f"to report on: they form only {len(np.unique(keys_N))} groups (without data.group_by, images with the "
                "same bytes form one group). Add validation images, choose another data.group_by, or change "
                "policy.select_share or policy.cross_fit_below"
            )
        return parts

    def choosing_folds(self, keys_N: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return pairs as in `parts`, for cross-fitting on the images that models may be chosen on.

        With two halves these are the images to fit on; results are reported on none of them. With few images, results
        are reported on the same images, so a choice between two models favors the one that was lucky on them.
        """
        parts = self.parts(keys_N)
        if len(parts) > 1:
            return parts
        rows = parts[0][0]
        _, place_N = np.unique(keys_N[rows], return_inverse=True)
        return [(rows[fit], rows[apply]) for fit, apply in _folds(place_N % self.folds)]


def _folds(fold_N: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for each fold the rows outside and inside it."""
    return [(np.flatnonzero(fold_N != fold), np.flatnonzero(fold_N == fold)) for fold in np.unique(fold_N)]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Fitted policies, the one that the budget chooses, and their decisions on the held-out images.

    The held-out images are those that results are reported on.

    Attributes:
        fronts: maps a kind, or ALL, to the Pareto front of its policies, fitted on all images that may be used to
            choose.
        chosen: the policy that the budget chooses: one of `fronts[ALL]`, or the best static resolution.
        held_out: rows of the held-out images, ascending, int64.
        routed: maps ALL to the decisions of the chosen policy on the held-out images, and each kind to those of its
            most accurate policy that costs no more than the chosen one. Kinds without such a policy are absent. With
            folds, ALL has for each fold the decisions of the most accurate policy of at most that cost, fitted on the
            other folds, unless the chosen policy is static.
        curves: maps a kind, or ALL, to the decisions on the held-out images at each of the costs `costs_C`.
        num_select: number of images that a policy was fitted on; with folds, the mean over the folds.
        folds: number of folds; None if the images were divided into two halves.
        costs_C: upper limits of the cost along the curves, (C,).
    """

    fronts: Mapping[str, list[FittedPolicy]]
    chosen: FittedPolicy
    held_out: np.ndarray
    routed: Mapping[str, Routed]
    curves: Mapping[str, list[Routed]]
    num_select: int
    folds: int | None
    costs_C: np.ndarray


class Discordant(NamedTuple):
    """How many images only one of two classifiers gets right, and the number of images; fractional with weights."""

    only_first: float
    only_second: float
    num_images: float


def hashed(keys_N: np.ndarray, seed: int) -> np.ndarray:
    """Return a seeded hash of each key, uniform in [0, 1), float64 (N,)."""
    with np.errstate(over="ignore"):
        bits_N = splitmix64(splitmix64(keys_N.astype(np.uint64)) ^ splitmix64(np.uint64(seed % 2**64)))
    return (bits_N >> np.uint64(11)).astype(np.float64) * 2.0**-53


def calibrate(images: Images, keys_N: np.ndarray, budget: Budget, split: Split) -> Calibration:
    """Fit policies, choose one by the budget, and apply the fitted policies to the held-out images.

    Args:
        keys_N: uint64 keys that identify the images (see `Split.parts`).

    Raises:
        ValueError: no policy meets the budget.
    """
    parts = split.parts(keys_N)
    fits = [fit_fronts(images.rows(fit)) for fit, _ in parts]
    # With folds, the deployed policy is chosen on all images, and results come from the policies of the folds.
    fit = parts[0][0] if len(parts) == 1 else np.arange(len(images))
    fronts = fits[0] if len(parts) == 1 else fit_fronts(images)
    chosen = choose(fronts[ALL], budget, images.rows(fit))
    kinds = [kind for kind in fronts if cheaper(fronts[kind], chosen.cost)]
    applied = [images.rows(apply) for _, apply in parts]
    held_out = np.concatenate([apply for _, apply in parts])
    order = np.argsort(held_out)
    held_out = held_out[order]

    def at(kind: str, cost: float) -> Routed:
        """Apply each part's most accurate policy of at most this cost to the rows of the part."""
        points = [_within(found[kind], cost) for found in fits]
        return Routed.joined([route(point.policy, rows) for point, rows in zip(points, applied, strict=True)]).rows(
            order
        )

    grid = _cost_limits(images.costs)
    has_one_policy = len(parts) == 1 or chosen.policy.kind == "static"  # a static policy has no fitted thresholds
    exact = {ALL: route(chosen.policy, images.rows(held_out))} if has_one_policy else {}
    return Calibration(
        fronts=fronts,
        chosen=chosen,
        held_out=held_out,
        routed={kind: at(kind, chosen.cost) for kind in kinds} | exact,
        curves={kind: [at(kind, cost) for cost in grid] for kind in fronts if fronts[kind]},
        num_select=round(float(np.mean([len(rows) for rows, _ in parts]))),
        folds=None if len(parts) == 1 else len(parts),
        costs_C=grid,
    )


@dataclass(frozen=True)
class JointComparison:
    """Accuracies, as fractions, that the policies of two models reach, averaged over limits on the mean cost.

    Attributes:
        lowest_limit, highest_limit: the limits, in `unit`, are evenly spaced between these.
    """

    accuracy_before: float
    accuracy_after: float
    lowest_limit: float
    highest_limit: float
    unit: str

    @property
    def is_after(self) -> bool:
        """Whether the model from after the joint stage is at least as accurate."""
        return self.accuracy_after >= self.accuracy_before

    def __str__(self) -> str:
        is_one = self.lowest_limit == self.highest_limit
        limits = f"{'of' if is_one else 'between'} {self.lowest_limit:.3g}"
        limits += "" if is_one else f" and {self.highest_limit:.3g}"
        return (
            f"the model from {'after' if self.is_after else 'before'} it is kept: with policies for a mean cost "
            f"{limits} {self.unit}, the accuracy on the images for choosing is {100 * self.accuracy_after:.2f} % after "
            f"it and {100 * self.accuracy_before:.2f} % before it"
        )


def compare_joint(before: Images, after: Images, keys_N: np.ndarray, budget: Budget, split: Split) -> JointComparison:
    """Compare two models by the accuracy that their cross-fitted policies reach at the same cost.

    The images are those of `Split.choosing_folds`. The accuracy is that at the budget's cost limit. Without a limit,
    it is the mean over limits from the cost of the cheapest resolution to that of the most expensive one.

    Args:
        before, after: the same images with the two models' answers.
        keys_N: as in `calibrate`.

    Raises:
        ValueError: the models have different costs, or there are too few images (see `Split.parts`).
    """
    if before.costs != after.costs or len(before) != len(after):
        raise ValueError("the models before and after the joint stage have different costs or images")
    limits_C = _cost_limits(before.costs) if budget.cost is None else np.array([budget.cost])
    folds = split.choosing_folds(keys_N)
    accuracies = [_cross_fitted(images, folds, limits_C) for images in (before, after)]
    return JointComparison(*accuracies, float(limits_C[0]), float(limits_C[-1]), before.costs.unit_name)


def _cross_fitted(images: Images, folds: Sequence[tuple[np.ndarray, np.ndarray]], limits_C: np.ndarray) -> float:
    """Return the accuracy of the policies fitted on other folds, averaged over the cost limits."""
    right, weight = 0.0, 0.0
    for fit, apply in folds:
        points, rows = fit_policies(images.rows(fit)), images.rows(apply)
        for limit in limits_C:
            routed = route(_within(points, limit).policy, rows)
            right += images.weights_N[apply] @ routed.correct_N(rows.correct_NR)
            weight += images.weights_N[apply].sum()
    return float(right / weight)


def choose(points: Sequence[FittedPolicy], budget: Budget, images: Images) -> FittedPolicy:
    """Return the policy that a budget chooses from a Pareto front.

    With a cost limit alone, this is the most accurate policy within the limit. With a limit on the loss of accuracy, it
    is the cheapest policy whose loss has a one-sided upper bound within the limit. The bound rejects policies that are
    good enough only by luck. The best static resolution itself loses nothing, so it is chosen if no other policy
    qualifies and it is within the cost limit.

    Args:
        points: the front, cheapest first. The best static resolution need not be on it.
        images: the images that the policies were fitted on.

    Raises:
        ValueError: no policy meets the budget.
    """
    highest, unit = math.inf if budget.cost is None else budget.cost, images.costs.unit_name
    affordable = [point for point in points if point.cost <= highest]
    if not affordable:
        raise ValueError(
            f"no policy costs at most {highest:.4g} {unit}; the cheapest costs {points[0].cost:.4g} {unit}. Raise the "
            "budget to at least that"
        )
    if budget.max_drop is None:
        return affordable[-1]
    best = _best_static(images)
    best_N = images.correct_NR[:, best.policy.members[0]]
    for point in sorted([*affordable, best], key=lambda point: point.cost):
        answered_N = route(point.policy, images).correct_N(images.correct_NR)
        if point.cost <= highest and drop_bound(best_N, answered_N, images.weights_N) <= budget.max_drop:
            return point
    raise ValueError(
        f"no policy that costs at most {highest:.4g} {unit} stays within {100 * budget.max_drop:g} points of the best "
        f"static resolution with {CONFIDENCE:.0%} confidence; allow a higher cost or a larger drop"
    )


def _best_static(images: Images) -> FittedPolicy:
    """Return the most accurate static policy; of equally accurate ones, the cheapest. A front may not contain it."""
    accuracy_R, cost_R = weighted_accuracy(images.correct_NR, images.weights_N), images.costs.backbone
    best = max(range(len(cost_R)), key=lambda index: (accuracy_R[index], -cost_R[index]))
    return FittedPolicy(static_policy(best), cost_R[best], float(accuracy_R[best]))


def cheaper(points: Sequence[FittedPolicy], cost: float) -> FittedPolicy | None:
    """Return the most accurate policy of a front that costs at most `cost`, or None if there is none."""
    return next((point for point in reversed(points) if point.cost <= cost * (1 + 1e-9)), None)


def _within(points: Sequence[FittedPolicy], cost: float) -> FittedPolicy:
    """Return the most accurate policy of a front that costs at most `cost`, or the cheapest if all cost more."""
    return cheaper(points, cost) or points[0]


def _cost_limits(costs: Costs) -> np.ndarray:
    """Return limits on the mean cost, evenly spaced from the cheapest to the most expensive resolution."""
    return np.linspace(min(costs.backbone), max(costs.backbone), CURVE_POINTS)


def weighted_accuracy(correct_NR: np.ndarray, weights_N: np.ndarray) -> np.ndarray:
    """Return the weighted share of correct answers at each resolution, (R,)."""
    return weights_N @ correct_NR / weights_N.sum()


def discordant(first_N: np.ndarray, second_N: np.ndarray, weights_N: np.ndarray | None = None) -> Discordant:
    """Count the images that only one of two classifiers gets right.

    With weights, return the counts of an equivalent unweighted sample: as many equally weighted images as have the same
    variance (Kish 1965). The variance is that over all images, or over the images on which the classifiers differ,
    whichever gives fewer images. So a few heavily weighted images of a rare class count as a few images only.

    Args:
        first_N, second_N: whether each classifier is correct, bool.
        weights_N: weights of the images in an accuracy; None weights all images equally.
    """
    only_first_N, only_second_N = first_N & ~second_N, ~first_N & second_N
    if weights_N is None or np.ptp(weights_N) == 0:
        return Discordant(int(only_first_N.sum()), int(only_second_N.sum()), len(first_N))
    total, differ_N = weights_N.sum(), only_first_N | only_second_N
    num_images = total**2 / (weights_N**2).sum()
    if differ_N.any():
        num_images = min(num_images, total * weights_N[differ_N].sum() / (weights_N[differ_N] ** 2).sum())
    only_first, only_second = (weights_N[only_N].sum() / total * num_images for only_N in (only_first_N, only_second_N))
    return Discordant(float(only_first), float(only_second), float(num_images))


def drop_bound(first_N: np.ndarray, second_N: np.ndarray, weights_N: np.ndarray | None = None) -> float:
    """Return a one-sided upper confidence bound on how much more accurate the first classifier is than the second.

    This is the adjusted Wald bound of Bonett and Price (2012) for paired proportions, as a fraction of 1. For
    classifiers that agree on every image the bound is 0.

    Args:
        first_N, second_N: whether each classifier is correct on the same images, bool.
        weights_N: weights of the images in an accuracy; None weights all images equally.
    """
    found = discordant(first_N, second_N, weights_N)
    if found.only_first + found.only_second == 0:
        return 0.0
    count = found.num_images + 2
    first, second = (found.only_first + 1) / count, (found.only_second + 1) / count
    margin = ((first + second - (first - second) ** 2) / count) ** 0.5
    return first - second + float(ndtri(CONFIDENCE)) * margin
