"""What the predictor's choice has to do with a known property of the images, such as the height of a glyph."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from pipeline.models.cost import Costs

MAX_BINS = 8
MIN_IMAGES_A_BIN = 25


def by_attribute(values_N: np.ndarray, correct_NR: np.ndarray, chosen_N: np.ndarray, costs: Costs) -> dict[str, Any]:
    """Describe choices and accuracy by the value of one attribute, finite float64.

    Returns:
        `by_chosen`: for each resolution `resolution`, `n`, and `mean`, `median` of the attribute of the images sent to
        it (null where there are none). `spearman`: rank correlation of attribute and chosen side (null where either is
        constant). `bins`: of about equally many images, or one for each value where there are few values; each with
        `low`, `high`, `n`, `shares`, `static_top1` (per resolution) and `routed_top1`.
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
