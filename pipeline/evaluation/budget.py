"""Trade accuracy against cost without retraining, by a bias on the predictor's logits.

`budget_bias` is one number for all images: budget_bias * c_j is added to the logit of candidate j, where c_j is the
candidate's cost on a scale from 0 (cheapest) to 1 (most expensive). A positive bias spends more, a negative one less,
and 0 is the predictor as trained. The report and the registered model's `params` use the same number.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.evaluation.statistics import accuracy, paired_difference
from pipeline.models.cost import Costs


def biased_choice(predictor_logits_NR: np.ndarray, costs: Costs, budget_bias: float) -> np.ndarray:
    """Return argmax_j(logits_j + budget_bias * c_j) for each image, (N,), with c = `costs.relative`. The first wins a
    tie."""
    return (predictor_logits_NR.astype(np.float64) + budget_bias * np.asarray(costs.relative)).argmax(axis=1)


def budget_curve(
    predictor_logits_NR: np.ndarray, correct_NR: np.ndarray, costs: Costs, max_points: int = 101
) -> list[dict[str, Any]]:
    """Return every trade-off that a bias can reach, cheapest first, thinned to about `max_points` evenly over cost.

    The curve is exact: as b grows, an image's choice moves along the upper envelope of its R lines logit_j + b * C_j.
    Cumulative sums over the sorted crossings of all images give the whole curve, without a grid of biases.

    Returns:
        Points of `budget_bias`, `top1` with Wilson's interval `top1_low` to `top1_high`, `difference_points` from the
        predictor as trained with its paired interval `low_points` to `high_points`, `mean_gflops` and `mean_cost`
        (including the predictor), and `shares` (per resolution). The point of bias 0 is the predictor as trained and is
        always included. Each interval holds for its own point, not for the whole curve.
    """
    N, R = correct_NR.shape
    gflops_R = np.asarray(costs.backbone_gflops)
    start_N, bias_E, image_E, before_E, after_E = _switches(predictor_logits_NR.astype(np.float64), gflops_R)
    order_E = np.argsort(bias_E, kind="stable")
    bias_E, image_E, before_E, after_E = (array[order_E] for array in (bias_E, image_E, before_E, after_E))
    gain_E = correct_NR[image_E, after_E].astype(np.int64) - correct_NR[image_E, before_E]
    right_S = np.concatenate([[0], np.cumsum(gain_E)]) + correct_NR[np.arange(N), start_N].sum()
    counts_SR = _counts(start_N, before_E, after_E, R)
    gflops_S = counts_SR @ gflops_R / N + costs.predictor_gflops
    reachable_T, bias_T = _states(bias_E)
    keep_T = _thin(gflops_S[reachable_T], bias_T, max_points)
    trained_N = _right_at(correct_NR, predictor_logits_NR, costs, 0.0)
    points = []
    for state, bias in zip(reachable_T[keep_T], bias_T[keep_T] * np.ptp(gflops_R), strict=True):
        shares = (counts_SR[state] / N).tolist()
        right_N = _right_at(correct_NR, predictor_logits_NR, costs, bias)
        points.append(
            {"budget_bias": float(bias), "mean_gflops": float(gflops_S[state]), "mean_cost": costs.mean(shares)}
            | _accuracy(int(right_S[state]), right_N, trained_N)
            | {"shares": shares}
        )
    return points


def fit_bias(predictor_logits_NR: np.ndarray, costs: Costs, target: float) -> float:
    """Return the budget_bias with the highest mean cost that does not exceed `target`, or the lowest if all exceed it.

    The result is exact even if the bias is added in float32: biases that rounding would move past a switch are skipped.

    Args:
        target: limit of the backbone's mean cost, without the predictor, in `costs.unit`.
    """
    gflops_R = np.asarray(costs.backbone_gflops)
    start_N, bias_E, _, before_E, after_E = _switches(predictor_logits_NR.astype(np.float64), gflops_R)
    order_E, R = np.argsort(bias_E, kind="stable"), len(costs.resolutions)
    counts_SR = _counts(start_N, before_E[order_E], after_E[order_E], R)
    reachable_T, bias_T = _states(bias_E[order_E])
    cost_T = counts_SR[reachable_T] @ np.asarray(costs.backbone) / len(start_N)
    usable_T = _survives_float32(predictor_logits_NR, bias_E, bias_T, gflops_R)
    within_T = usable_T & (cost_T <= target * (1 + 1e-9))
    if within_T.any():
        state = np.where(within_T, cost_T, -np.inf).argmax()
    else:
        state = np.where(usable_T, cost_T, np.inf).argmin()
    return float(bias_T[state] * np.ptp(gflops_R))


def _survives_float32(
    logits_NR: np.ndarray, bias_E: np.ndarray, bias_T: np.ndarray, gflops_R: np.ndarray
) -> np.ndarray:
    """Return whether each state between two switches is wide enough for a float32 bias, (T,) bool."""
    steps = np.diff(np.unique(gflops_R))
    if len(steps) == 0:
        return np.ones(len(bias_T), bool)
    width_T = np.concatenate([[np.inf], np.diff(np.unique(bias_E)), [np.inf]])[: len(bias_T)]
    largest_T = np.abs(logits_NR).max() + np.abs(bias_T) * np.ptp(gflops_R)
    return (width_T * steps.min() > 4 * np.finfo(np.float32).eps * largest_T) | (bias_T == 0)


def _counts(start_N: np.ndarray, before_E: np.ndarray, after_E: np.ndarray, R: int) -> np.ndarray:
    """Return the number of images at each resolution before the first switch and after each, int64 (1 + E, R)."""
    moves_ER = np.eye(R, dtype=np.int64)[after_E] - np.eye(R, dtype=np.int64)[before_E]
    return np.concatenate([np.zeros((1, R), np.int64), moves_ER.cumsum(axis=0)]) + np.bincount(start_N, minlength=R)


def _right_at(correct_NR: np.ndarray, predictor_logits_NR: np.ndarray, costs: Costs, budget_bias: float) -> np.ndarray:
    """Return whether each image is correct at the resolution that the biased predictor chooses, (N,) bool."""
    return correct_NR[np.arange(len(correct_NR)), biased_choice(predictor_logits_NR, costs, budget_bias)]


def _accuracy(num_right: int, right_N: np.ndarray, trained_N: np.ndarray) -> dict[str, float]:
    top1 = accuracy(num_right, len(right_N))
    difference = paired_difference(int((right_N & ~trained_N).sum()), int((trained_N & ~right_N).sum()), len(right_N))
    return {
        "top1": top1.value,
        "top1_low": top1.low,
        "top1_high": top1.high,
        "difference_points": 100 * difference.value,
        "low_points": 100 * difference.low,
        "high_points": 100 * difference.high,
    }


def _switches(logits_NR: np.ndarray, gflops_R: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the choices at bias -infinity (N,) and, for E switches, the bias, image, and resolution before and after.

    If biased logits are equal, the more expensive resolution is chosen.
    """
    N, R = logits_NR.shape
    start_N = np.where(gflops_R == gflops_R.min(), logits_NR, -np.inf).argmax(axis=1)
    rows, current, reached = np.arange(N), start_N, np.full(N, -np.inf)
    found = [(np.zeros(0), *(np.zeros(0, np.int64) for _ in range(3)))]
    for _ in range(R - 1):
        gap = gflops_R - gflops_R[current][:, None]
        lead = logits_NR[rows, current][:, None] - logits_NR[rows]
        bias = np.divide(lead, gap, out=np.full(gap.shape, np.inf), where=gap > 0)
        first = bias.min(axis=1)
        after = np.where(bias == first[:, None], gflops_R, -np.inf).argmax(axis=1)
        going = np.isfinite(first)
        # The crossings of an envelope ascend. Prevent rounding from swapping two crossings of one image.
        reached = np.maximum(first, reached)[going]
        found.append((reached, rows[going], current[going], after[going]))
        rows, current = rows[going], after[going]
    return start_N, *(np.concatenate(parts) for parts in zip(*found, strict=True))


def _states(bias_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each state between different switch biases, the number of switches before it and a bias inside it."""
    if len(bias_E) == 0:
        return np.zeros(1, np.int64), np.zeros(1)
    edge_T = np.unique(bias_E)
    behind_T = np.concatenate([[0], np.searchsorted(bias_E, edge_T, side="right")])
    bias_T = np.concatenate([[edge_T[0] - 1], (edge_T[:-1] + edge_T[1:]) / 2, [edge_T[-1] + 1]])
    bias_T[np.searchsorted(edge_T, 0, side="right")] = 0
    return behind_T, bias_T


def _thin(gflops_T: np.ndarray, bias_T: np.ndarray, max_points: int) -> np.ndarray:
    """Return the positions of about `max_points` states evenly spaced in cost, with both ends and bias 0."""
    wanted = np.linspace(gflops_T[0], gflops_T[-1], max_points)
    nearest = np.searchsorted(gflops_T, wanted).clip(0, len(gflops_T) - 1)
    return np.unique(np.concatenate([[0], nearest, [len(gflops_T) - 1], np.flatnonzero(bias_T == 0)]))
