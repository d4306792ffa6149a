"""Compute intervals, paired tests and baselines with NumPy and SciPy alone.

Everything works on `correct_NR` (bool: image n is correct at resolution j) and `chosen_N` (the resolution that the
predictor chose), never on logits. Accuracies are fractions of 1; costs are in any one unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri
from scipy.stats import binomtest, spearmanr

from pipeline.models.cost import Costs

CONFIDENCE = 0.95
COLLAPSED_SHARE = 0.98
"""Routing has collapsed when one resolution takes more of the images than this."""
RESAMPLES = 10_000
_CHUNK = 1000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Resamples:
    """Accuracies and shares of B bootstrap resamples of the validation images."""

    static_BR: np.ndarray
    routed_B: np.ndarray
    shares_BR: np.ndarray


def accuracy(num_right: int, num_images: int) -> Estimate:
    """Return the share of correct answers with Wilson's score interval."""
    interval = binomtest(num_right, num_images).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(num_right / num_images, float(interval.low), float(interval.high))


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p of McNemar's test, from the counts of images that only one classifier gets right."""
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0


def paired_difference(only_first: int, only_second: int, num_images: int) -> Estimate:
    """Return the difference of two accuracies on the same images, first minus second.

    The interval is the adjusted Wald interval of Bonett and Price (2012), which keeps its coverage if few images
    differ. It is centered on the adjusted difference and cut at -1 and 1.
    """
    first, second = (only_first + 1) / (num_images + 2), (only_second + 1) / (num_images + 2)
    center = first - second
    margin = float(ndtri((1 + CONFIDENCE) / 2)) * ((first + second - center**2) / (num_images + 2)) ** 0.5
    value = (only_first - only_second) / num_images
    return Estimate(value, max(-1.0, center - margin), min(1.0, center + margin))


def mean_over_seeds(values_SN: np.ndarray) -> Estimate:
    """Return the mean of S seeds' values on the same N images, with a normal interval over images and seeds.

    Images and seeds count as independent draws: the variance of the mean is var(means of images) / N + var(means of
    seeds) / S. With one seed the interval covers the choice of images alone.
    """
    S, N = values_SN.shape
    variance = float(values_SN.mean(axis=0).var(ddof=1)) / N if N > 1 else 0.0
    if S > 1:
        variance += float(values_SN.mean(axis=1).var(ddof=1)) / S
    value, margin = float(values_SN.mean()), float(ndtri((1 + CONFIDENCE) / 2)) * variance**0.5
    return Estimate(value, max(-1.0, value - margin), min(1.0, value + margin))


def oracle_choice(correct_NR: np.ndarray, costs_R: Sequence[float]) -> np.ndarray:
    """Return the cheapest resolution (N,) at which each image is correct, or the cheapest of all if there is none."""
    cheapest_first_R = np.argsort(costs_R, kind="stable")
    return cheapest_first_R[np.argmax(correct_NR[:, cheapest_first_R], axis=1)]


def shares(chosen_N: np.ndarray, num_resolutions: int) -> np.ndarray:
    """Return the share of images at each resolution, (R,)."""
    return np.bincount(chosen_N, minlength=num_resolutions) / len(chosen_N)


def line_neighbours(costs_R: Sequence[float], at_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the two static resolutions between which each given cost lies; there must be at least two resolutions.

    Returns:
        Index of the cheaper, index of the more expensive, weight of the more expensive in [0, 1], each (B,). The weight
        is 1 for a cost above all resolutions and 0 for a cost below all.
    """
    order_R = np.argsort(costs_R, kind="stable")
    ordered_R = np.asarray(costs_R, dtype=np.float64)[order_R]
    upper_B = np.clip(np.searchsorted(ordered_R, at_B, side="left"), 1, len(ordered_R) - 1)
    span_B = ordered_R[upper_B] - ordered_R[upper_B - 1]
    weight_B = np.divide(at_B - ordered_R[upper_B - 1], span_B, out=np.ones(np.shape(at_B)), where=span_B > 0)
    return order_R[upper_B - 1], order_R[upper_B], np.clip(weight_B, 0, 1)


def line_accuracy(costs_R: Sequence[float], static_BR: np.ndarray, at_B: np.ndarray) -> np.ndarray:
    """Return the accuracy (B,) on the straight line between the neighboring static resolutions, at cost `at_B`.

    Sending images to the two neighbors at random reaches it at the same cost.
    """
    lower_B, upper_B, weight_B = line_neighbours(costs_R, at_B)
    rows_B = np.arange(len(static_BR))
    return (1 - weight_B) * static_BR[rows_B, lower_B] + weight_B * static_BR[rows_B, upper_B]


def resample(correct_NR: np.ndarray, chosen_N: np.ndarray, seed: int = 0, num_resamples: int = RESAMPLES) -> Resamples:
    """Resample the images with replacement (bootstrap).

    Images with the same choice and the same correct resolutions are exchangeable. So the counts of these patterns,
    drawn from a multinomial, are distributed as if images were drawn, and more images take no more time.
    """
    N, R = correct_NR.shape
    pattern_NC = np.column_stack([chosen_N, correct_NR])
    pattern_PC, counts_P = np.unique(pattern_NC, axis=0, return_counts=True)
    chosen_P, correct_PR = pattern_PC[:, 0], pattern_PC[:, 1:].astype(np.float64)
    routed_P = correct_PR[np.arange(len(chosen_P)), chosen_P]
    columns_PC = np.column_stack([correct_PR, routed_P, np.eye(R)[chosen_P]])
    generator = np.random.default_rng(seed)
    sizes = [min(_CHUNK, num_resamples - start) for start in range(0, num_resamples, _CHUNK)]
    means_BC = np.concatenate([generator.multinomial(N, counts_P / N, size) @ columns_PC for size in sizes]) / N
    return Resamples(means_BC[:, :R], means_BC[:, R], means_BC[:, R + 1 :])


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
