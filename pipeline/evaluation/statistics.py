"""Intervals, paired tests and baselines, computed with NumPy and SciPy alone.

Functions about images take `correct_NR` (bool: image n is correct at resolution j) and `chosen_N` (the index of the
resolution whose answer counts), never logits. Accuracies are fractions of 1; costs may have any unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri, stdtrit
from scipy.stats import binomtest, spearmanr

from pipeline.models.cost import Costs

CONFIDENCE = 0.95
COLLAPSED_SHARE = 0.98
"""Routing has collapsed if one resolution gets more than this share of the images."""
RESAMPLES = 10_000
_CHUNK = 1000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def accuracy(num_right: float, num_images: float) -> Estimate:
    """Return the share of correct answers with Wilson's score interval. Counts may be effective (fractional) ones."""
    share, square = num_right / num_images, float(ndtri((1 + CONFIDENCE) / 2)) ** 2
    center = (num_right + square / 2) / (num_images + square)
    margin = (square * (num_images * share * (1 - share) + square / 4)) ** 0.5 / (num_images + square)
    return Estimate(share, max(0.0, center - margin), min(1.0, center + margin))


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p value of McNemar's test, from the counts of images that only one classifier gets
    right."""
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0


def paired_difference(only_first: float, only_second: float, num_images: float) -> Estimate:
    """Return the difference of two accuracies on the same images, first minus second.

    The interval is the adjusted Wald interval of Bonett and Price (2012), which keeps its coverage if few images
    differ. It is centered on the adjusted difference and cut at -1 and 1.
    """
    first, second = (only_first + 1) / (num_images + 2), (only_second + 1) / (num_images + 2)
    center = first - second
    margin = float(ndtri((1 + CONFIDENCE) / 2)) * ((first + second - center**2) / (num_images + 2)) ** 0.5
    value = (only_first - only_second) / num_images
    return Estimate(value, max(-1.0, center - margin), min(1.0, center + margin))


def student_t(freedom: float, tests: int = 1) -> float:
    """Return the factor of the standard error in a two-sided interval by Student's t, for `tests` simultaneous
    intervals."""
    return float(stdtrit(freedom, 1 - (1 - CONFIDENCE) / (2 * tests)))


def mean_of(values_S: Sequence[float] | np.ndarray) -> Estimate | None:
    """Return the mean of S seeds' values with Student's t interval, or None for one seed."""
    S = len(values_S)
    if S < 2:
        return None
    mean, margin = float(np.mean(values_S)), student_t(S - 1) * float(np.std(values_S, ddof=1)) / S**0.5
    return Estimate(mean, mean - margin, mean + margin)


def mean_over_seeds(values_SN: np.ndarray, tests: int = 1) -> Estimate:
    """Return the mean of S seeds' values on the same N images, with an interval over images and seeds.

    Images and seeds count as independent draws: the variance of the mean is var(means of images) / N + var(means of
    seeds) / S. Its degrees of freedom are Satterthwaite's, so a few seeds that differ widen the interval as Student's t
    does. With one seed the interval covers only the choice of images.

    Args:
        tests: number of means that are examined together, so that all their intervals hold simultaneously (Bonferroni).
    """
    S, N = values_SN.shape
    parts = [(float(values_SN.mean(axis=0).var(ddof=1)) / N, N - 1)] if N > 1 else []
    parts += [(float(values_SN.mean(axis=1).var(ddof=1)) / S, S - 1)] if S > 1 else []
    variance, value = sum(part for part, _ in parts), float(values_SN.mean())
    if variance == 0:
        return Estimate(value, value, value)
    margin = student_t(variance**2 / sum(part**2 / freedom for part, freedom in parts), tests) * variance**0.5
    return Estimate(value, max(-1.0, value - margin), min(1.0, value + margin))


def oracle_choice(correct_NR: np.ndarray, costs_R: Sequence[float]) -> np.ndarray:
    """Return the cheapest resolution at which each image is correct, or the cheapest of all if there is none, (N,)."""
    cheapest_first_R = np.argsort(costs_R, kind="stable")
    return cheapest_first_R[np.argmax(correct_NR[:, cheapest_first_R], axis=1)]


def shares(chosen_N: np.ndarray, num_resolutions: int) -> np.ndarray:
    """Return the share of images at each resolution, (R,)."""
    return np.bincount(chosen_N, minlength=num_resolutions) / len(chosen_N)


def class_weights(labels_N: np.ndarray) -> np.ndarray:
    """Return weights (N,) that give every class the same total weight. Their mean is 1."""
    classes, positions_N, counts = np.unique(labels_N, return_inverse=True, return_counts=True)
    return (len(labels_N) / len(classes) / counts)[positions_N]


def balanced_accuracy(correct_N: np.ndarray, labels_N: np.ndarray) -> Estimate:
    """Return the mean over the classes of the share of correct answers.

    The interval is Wilson's for the number of equally weighted images with the same variance (Kish 1965).
    """
    weights_N = class_weights(labels_N)
    num_images = weights_N.sum() ** 2 / (weights_N**2).sum()
    return accuracy(float(weights_N @ correct_N / weights_N.sum() * num_images), float(num_images))


def envelope(
    costs_S: np.ndarray, accuracy_BS: np.ndarray, at_B: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return the upper concave envelope of points (cost, accuracy) at given costs.

    The envelope is the highest accuracy that a random mix of any two points reaches without exceeding the cost. Below
    the cheapest point it is the cheapest point's accuracy, because nothing can cost less.

    Returns:
        The accuracy (B,), and the two mixed points: index of the cheaper, index of the more expensive, and weight of
        the latter in [0, 1], each (B,).
    """
    S, rows_B = len(costs_S), np.arange(len(at_B))
    cheapest = int(np.argmin(costs_S))
    best_B = accuracy_BS[:, cheapest].astype(np.float64)
    lower_B, upper_B, weight_B = (np.full(len(at_B), value) for value in (cheapest, cheapest, 1.0))
    for lower in range(S):
        for upper in range(S):
            span = costs_S[upper] - costs_S[lower]
            if span < 0 or (span == 0 and lower != upper):
                continue
            weights_B = np.clip((at_B - costs_S[lower]) / span, 0, 1) if span else np.ones(len(at_B))
            mixed_B = (1 - weights_B) * accuracy_BS[rows_B, lower] + weights_B * accuracy_BS[rows_B, upper]
            better_B = (costs_S[lower] <= at_B) & (mixed_B > best_B)
            for kept, value in ((best_B, mixed_B), (weight_B, weights_B)):
                kept[better_B] = value[better_B]
            lower_B[better_B], upper_B[better_B] = lower, upper
    return best_B, (lower_B, upper_B, weight_B)


def bootstrap_means(values_NC: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the column means of B bootstrap resamples of the rows, (B, C).

    Equal rows are exchangeable, so drawing their counts from a multinomial distribution equals drawing rows. The time
    depends on the number of different rows rather than on the number of images.
    """
    rows_PC, counts_P = np.unique(values_NC, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    sizes = [min(_CHUNK, RESAMPLES - start) for start in range(0, RESAMPLES, _CHUNK)]
    N = len(values_NC)
    return np.concatenate([generator.multinomial(N, counts_P / N, size) @ rows_PC for size in sizes]) / N


def percentile_interval(value: float, values_B: np.ndarray) -> Estimate:
    """Return `value` with the percentile interval of its bootstrap values."""
    low, high = np.quantile(values_B, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(value), float(low), float(high))


MAX_BINS = 8
MIN_IMAGES_A_BIN = 25


def by_attribute(values_N: np.ndarray, correct_NR: np.ndarray, chosen_N: np.ndarray, costs: Costs) -> dict[str, Any]:
    """Describe choices and accuracy by the values (finite float64) of one attribute.

    Returns:
        `by_chosen`: for each resolution, `resolution`, `n`, and the attribute's `mean` and `median` over the images
        routed to it (null without images). `spearman`: rank correlation of attribute and chosen side (null if either is
        constant). `bins`: ranges with about the same number of images, or one bin per value if there are few values;
        each has `low`, `high`, `n`, `shares`, `static_top1` (per resolution) and `routed_top1`.
    """
    sides_R = np.asarray(costs.resolutions)
    by_chosen = []
    for j, side in enumerate(costs.resolutions):
        group = values_N[chosen_N == j]
        mean, median = (float(group.mean()), float(np.median(group))) if len(group) else (None, None)
        by_chosen.append({"resolution": side, "n": len(group), "mean": mean, "median": median})
    constant = np.ptp(values_N) == 0 or np.ptp(chosen_N) == 0
    return {
        "by_chosen": by_chosen,
        "spearman": None if constant else float(spearmanr(values_N, sides_R[chosen_N]).statistic),
        "bins": _bins(values_N, correct_NR, chosen_N),
    }


def _bins(values_N: np.ndarray, correct_NR: np.ndarray, chosen_N: np.ndarray) -> list[dict[str, Any]]:
    levels = np.unique(values_N)
    if len(levels) <= MAX_BINS:
        bin_N, edges = np.searchsorted(levels, values_N), [(level, level) for level in levels]
    else:
        num_bins = min(MAX_BINS, max(1, len(values_N) // MIN_IMAGES_A_BIN))
        bounds = np.unique(np.quantile(values_N, np.linspace(0, 1, num_bins + 1)))
        bin_N = np.searchsorted(bounds[1:-1], values_N, side="right")
        edges = list(itertools.pairwise(bounds))
    found = []
    for position, (low, high) in enumerate(edges):
        inside_N = bin_N == position
        n, chosen = int(inside_N.sum()), chosen_N[inside_N]
        if n == 0:
            continue
        correct = correct_NR[inside_N]
        found.append(
            {
                "low": float(low),
                "high": float(high),
                "n": n,
                "shares": (np.bincount(chosen, minlength=correct.shape[1]) / n).tolist(),
                "static_top1": correct.mean(axis=0).tolist(),
                "routed_top1": float(correct[np.arange(n), chosen].mean()),
            }
        )
    return found
