"""Chooses a policy by a budget on some of the validation images, and applies it to the others.

What is chosen is chosen on other images than what is stated: on a `select` half. Where there are few images, the
policies of each fold are fitted on the other folds instead, so every image is stated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from datasets.loading.order import splitmix64
from pipeline.policies.fit import ALL, FittedPolicy, fit_fronts
from pipeline.policies.route import Images, Routed, route

CONFIDENCE = 0.95
"""of the one-sided bounds by which a budget is said to hold"""
CURVE_POINTS = 30
"""costs at which a curve is computed"""


@dataclass(frozen=True)
class Budget:
    """What a policy may cost, and how much less accurate than the best static resolution it may be.

    Attributes:
        cost: highest mean cost of an image, in the unit of the costs; None sets no limit.
        max_drop: highest loss of accuracy, a fraction of 1; None sets no limit.
    """

    cost: float | None = None
    max_drop: float | None = None


@dataclass(frozen=True)
class Split:
    """Which images policies are fitted on, and which they are applied to.

    Attributes:
        select_share: of the images that policies are fitted on; the others are stated.
        cross_fit_below: with fewer images than this, folds take the place of halves.
        folds: how many.
        seed: of the hash that splits.
    """

    select_share: float = 0.5
    cross_fit_below: int = 1000
    folds: int = 5
    seed: int = 0

    def parts(self, keys_N: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each part, the rows to fit on and the rows to apply to; together the latter are what is stated.

        Args:
            keys_N: uint64, of what identifies an image, such as the checksum of its bytes: an image stays on its side
                whatever other images there are, and so do its duplicates.
        """
        uniform_N = hashed(keys_N, self.seed)
        if len(keys_N) >= self.cross_fit_below:
            return [(np.flatnonzero(uniform_N < self.select_share), np.flatnonzero(uniform_N >= self.select_share))]
        fold_N = np.floor(uniform_N * self.folds)
        parts = [(np.flatnonzero(fold_N != fold), np.flatnonzero(fold_N == fold)) for fold in range(self.folds)]
        return [(fit, apply) for fit, apply in parts if len(apply)]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Fitted policies, the one that the budget chooses, and what they do with the stated images.

    Attributes:
        fronts: kind or ALL -> the front of these policies, fitted on all images that may be chosen on.
        chosen: the policy of fronts[ALL] that the budget chooses.
        stated: the rows that results are stated on, ascending.
        routed: kind or ALL -> what the chosen policy does with the stated rows; for a kind, its most accurate policy
            that costs no more than the chosen one. Kinds without such a policy are left out.
        curves: kind or ALL -> what policies of rising cost do with the stated rows.
        num_select: images that each of them was fitted on, the mean over the folds.
        folds: None where the halves are disjoint.
        costs_C: the highest costs of the curves, (C,).
    """

    fronts: Mapping[str, list[FittedPolicy]]
    chosen: FittedPolicy
    stated: np.ndarray
    routed: Mapping[str, Routed]
    curves: Mapping[str, list[Routed]]
    num_select: int
    folds: int | None
    costs_C: np.ndarray


class Discordant(NamedTuple):
    """How many images only one of two classifiers gets right, among how many; fractions where these are weighted."""

    only_first: float
    only_second: float
    num_images: float


def hashed(keys_N: np.ndarray, seed: int) -> np.ndarray:
    """A seeded hash of each key, uniform in [0, 1), float64 (N,)."""
    with np.errstate(over="ignore"):
        bits_N = splitmix64(splitmix64(keys_N.astype(np.uint64)) ^ splitmix64(np.uint64(seed % 2**64)))
    return (bits_N >> np.uint64(11)).astype(np.float64) * 2.0**-53


def calibrate(images: Images, keys_N: np.ndarray, budget: Budget, split: Split) -> Calibration:
    """Fit policies, choose one by the budget, and apply all of them to the stated images.

    Raises:
        ValueError: no policy meets the budget.
    """
    parts = split.parts(keys_N)
    fits = [fit_fronts(images.rows(fit)) for fit, _ in parts]
    # With folds every image may be chosen on for what is deployed; what is stated comes from the folds' own policies.
    fit = parts[0][0] if len(parts) == 1 else np.arange(len(images))
    fronts = fits[0] if len(parts) == 1 else fit_fronts(images)
    chosen = choose(fronts[ALL], budget, images.rows(fit))
    kinds = [kind for kind in fronts if cheaper(fronts[kind], chosen.cost)]
    applied = [images.rows(apply) for _, apply in parts]
    stated = np.concatenate([apply for _, apply in parts])
    order = np.argsort(stated)

    def at(kind: str, cost: float) -> Routed:
        """What each part's most accurate policy of at most this cost does with the rows of the part."""
        points = [cheaper(found[kind], cost) or found[kind][0] for found in fits]
        return Routed.joined([route(point.policy, rows) for point, rows in zip(points, applied, strict=True)]).rows(
            order
        )

    grid = np.linspace(min(images.costs.backbone), max(images.costs.backbone), CURVE_POINTS)
    exact = {ALL: route(chosen.policy, applied[0])} if len(parts) == 1 else {}
    return Calibration(
        fronts=fronts,
        chosen=chosen,
        stated=stated[order],
        routed={kind: at(kind, chosen.cost) for kind in kinds} | exact,
        curves={kind: [at(kind, cost) for cost in grid] for kind in fronts if fronts[kind]},
        num_select=round(float(np.mean([len(rows) for rows, _ in parts]))),
        folds=None if len(parts) == 1 else len(parts),
        costs_C=grid,
    )


def choose(points: Sequence[FittedPolicy], budget: Budget, images: Images) -> FittedPolicy:
    """The policy that a budget chooses; `images` are those that the policies were fitted on.

    With a highest cost: the most accurate policy that costs no more. With a highest loss of accuracy: the cheapest
    policy that loses no more by a one-sided bound, so that luck alone does not let one through.

    Raises:
        ValueError: no policy meets the budget.
    """
    affordable = [point for point in points if budget.cost is None or point.cost <= budget.cost]
    if not affordable:
        raise ValueError(f"no policy costs at most {budget.cost:.4g}: the cheapest costs {points[0].cost:.4g}")
    if budget.max_drop is None:
        return affordable[-1]
    best_N = images.correct_NR[:, int(weighted_accuracy(images.correct_NR, images.weights_N).argmax())]
    for point in affordable:
        answered_N = route(point.policy, images).correct_N(images.correct_NR)
        if drop_bound(best_N, answered_N, images.weights_N) <= budget.max_drop:
            return point
    if budget.cost is None:  # the most accurate policies agree with the best static resolution almost everywhere
        return affordable[-1]
    raise ValueError(
        f"no policy that costs at most {budget.cost:.4g} stays within {100 * budget.max_drop:g} points of the best "
        f"static resolution with {CONFIDENCE:.0%} confidence; allow a higher cost or a larger drop"
    )


def cheaper(points: Sequence[FittedPolicy], cost: float) -> FittedPolicy | None:
    """The last, so the most accurate, of a front's policies that cost no more."""
    return next((point for point in reversed(points) if point.cost <= cost * (1 + 1e-9)), None)


def weighted_accuracy(correct_NR: np.ndarray, weights_N: np.ndarray) -> np.ndarray:
    """The weighted share of right answers at each resolution, (R,)."""
    return weights_N @ correct_NR / weights_N.sum()


def discordant(first_N: np.ndarray, second_N: np.ndarray, weights_N: np.ndarray | None = None) -> Discordant:
    """Count the images that only one of two classifiers gets right, as far as they say something of its accuracy.

    With weights the counts are those of as many equally weighted images as have the same variance (Kish 1965): of all
    images, or of those on which the classifiers differ, whichever are fewer. A few images of a rare class then say as
    little as they do.
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
    """Upper one-sided bound of how much more accurate the first of two classifiers is on the same images.

    The adjusted Wald bound of Bonett and Price (2012). Classifiers that agree on every image have the bound 0.

    Args:
        weights_N: of the images in an accuracy; None counts them the same.
    """
    found = discordant(first_N, second_N, weights_N)
    if found.only_first + found.only_second == 0:
        return 0.0
    count = found.num_images + 2
    first, second = (found.only_first + 1) / count, (found.only_second + 1) / count
    margin = ((first + second - (first - second) ** 2) / count) ** 0.5
    return first - second + float(ndtri(CONFIDENCE)) * margin
