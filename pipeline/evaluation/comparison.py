"""The table of a report: each way to spend FLOPs as one row, and the routed network against every other row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.evaluation.statistics import (
    Estimate,
    Resamples,
    accuracy,
    line_accuracy,
    line_neighbours,
    mcnemar_p,
    paired_difference,
    percentile_interval,
    shares,
)
from pipeline.models.cost import Costs


def table_rows(
    correct_NR: np.ndarray, chosen_N: np.ndarray, oracle_N: np.ndarray, costs: Costs, resampled: Resamples
) -> list[dict[str, Any]]:
    """The rows, each with `id`, `kind`, `label`, `resolution`, `n`, `top1`, `top1_low`, `top1_high`, `interval` (its
    method), `mean_gflops`, `backbone_gflops` (without the predictor), `mean_cost` (in the report's unit of cost, which
    is what is compared by) and `shares` (per resolution).

    Kinds: `static` (one a resolution), then, with more than one resolution, `routed` (argmax of the predictor),
    `random` (the same shares drawn without looking: its expected accuracy sum_j share_j * accuracy_j, counted at the
    routed network's cost), `interpolation` (the line between the neighbouring static resolutions at the routed
    network's cost) and `oracle` (the cheapest resolution at which an image is right, else the cheapest; no predictor).
    """
    N, R = correct_NR.shape
    static_R = correct_NR.mean(axis=0)
    rows = [
        _row(f"static-{side}", "static", f"static {side} px", N, accuracy(int(correct_NR[:, j].sum()), N), "wilson")
        | {"resolution": side}
        | _cost(np.eye(R)[j], costs, with_predictor=False)
        for j, side in enumerate(costs.resolutions)
    ]
    if R == 1:
        return rows
    shares_R = shares(chosen_N, R)
    routed_cost = _cost(shares_R, costs, with_predictor=True)
    line_R = interpolation_shares(costs, routed_cost["mean_cost"])
    lower, upper = interpolation_ends(costs, routed_cost["mean_cost"])
    line_label = f"static {upper} px" if lower == upper else f"line, static {lower} to {upper} px"
    random = percentile_interval(static_R @ shares_R, random_accuracy(resampled))
    line = percentile_interval(static_R @ line_R, interpolation_accuracy(resampled, costs))
    return [
        *rows,
        _row("routed", "routed", "routed", N, accuracy(_count_right(correct_NR, chosen_N), N), "wilson") | routed_cost,
        _row("random", "random", "random, same shares", N, random, "bootstrap") | routed_cost,
        _row("interpolation", "interpolation", line_label, N, line, "bootstrap")
        | _cost(line_R, costs, with_predictor=False),
        _row("oracle", "oracle", "oracle", N, accuracy(_count_right(correct_NR, oracle_N), N), "wilson")
        | _cost(shares(oracle_N, R), costs, with_predictor=False),
    ]


def compare(
    correct_NR: np.ndarray,
    chosen_N: np.ndarray,
    oracle_N: np.ndarray,
    costs: Costs,
    resampled: Resamples,
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """The routed network minus every other row, by that row's id, on the same images.

    Each with `difference_points`, `low_points`, `high_points`, `interval` (its method), `cost_ratio` and `gflops_ratio`
    (the routed network's over the other's; `cost_ratio` in the report's unit of cost). Against one fixed answer an
    image (static, oracle) also `only_routed_right`, `only_other_right` and `mcnemar_p` (exact, two-sided); null against
    the two mixtures.
    """
    by_id = {row["id"]: row for row in rows}
    routed, routed_N = by_id["routed"], _right(correct_NR, chosen_N)
    answers = {f"static-{side}": correct_NR[:, j] for j, side in enumerate(costs.resolutions)}
    answers["oracle"] = _right(correct_NR, oracle_N)
    mixtures = {"random": random_accuracy(resampled), "interpolation": interpolation_accuracy(resampled, costs)}
    found: dict[str, dict[str, Any]] = {}
    for other, other_N in answers.items():
        only_routed, only_other = int((routed_N & ~other_N).sum()), int((~routed_N & other_N).sum())
        difference = paired_difference(only_routed, only_other, len(routed_N))
        found[other] = _difference(difference, "bonett-price", routed, by_id[other]) | {
            "only_routed_right": only_routed,
            "only_other_right": only_other,
            "mcnemar_p": mcnemar_p(only_routed, only_other),
        }
    for other, other_B in mixtures.items():
        gain = percentile_interval(routed["top1"] - by_id[other]["top1"], resampled.routed_B - other_B)
        found[other] = _difference(gain, "bootstrap", routed, by_id[other]) | dict.fromkeys(
            ("only_routed_right", "only_other_right", "mcnemar_p")
        )
    return {row["id"]: found[row["id"]] for row in rows if row["id"] in found}


def random_accuracy(resampled: Resamples) -> np.ndarray:
    """(B,): expected accuracy of random routing with the resample's shares."""
    return (resampled.shares_BR * resampled.static_BR).sum(axis=1)


def interpolation_accuracy(resampled: Resamples, costs: Costs) -> np.ndarray:
    """(B,): accuracy on the static line at the resample's routed cost, predictor included."""
    routed_cost_B = resampled.shares_BR @ np.asarray(costs.backbone) + costs.predictor
    return line_accuracy(costs.backbone, resampled.static_BR, routed_cost_B)


def interpolation_shares(costs: Costs, cost: float) -> np.ndarray:
    """(R,): the mixture of the two neighbouring static resolutions that costs `cost`."""
    lower, upper, weight = line_neighbours(costs.backbone, np.array([cost]))
    identity = np.eye(len(costs.resolutions))
    return (1 - weight[0]) * identity[lower[0]] + weight[0] * identity[upper[0]]


def interpolation_ends(costs: Costs, cost: float) -> tuple[int, int]:
    """Sides in pixels of the cheaper and the dearer neighbour; both the dearest where `cost` lies beyond it."""
    lower, upper, weight = line_neighbours(costs.backbone, np.array([cost]))
    dearer = costs.resolutions[upper[0]]
    return (dearer if weight[0] == 1 else costs.resolutions[lower[0]]), dearer


def _right(correct_NR: np.ndarray, choice_N: np.ndarray) -> np.ndarray:
    return correct_NR[np.arange(len(choice_N)), choice_N]


def _count_right(correct_NR: np.ndarray, choice_N: np.ndarray) -> int:
    return int(_right(correct_NR, choice_N).sum())


def _row(identity: str, kind: str, label: str, n: int, top1: Estimate, interval: str) -> dict[str, Any]:
    return {
        "id": identity,
        "kind": kind,
        "label": label,
        "resolution": None,
        "n": n,
        "top1": float(top1.value),
        "top1_low": top1.low,
        "top1_high": top1.high,
        "interval": interval,
    }


def _cost(shares_R: np.ndarray, costs: Costs, with_predictor: bool) -> dict[str, Any]:
    shares_list = [float(share) for share in shares_R]
    return {
        "mean_gflops": costs.mean_gflops(shares_list, with_predictor),
        "backbone_gflops": costs.mean_gflops(shares_list, with_predictor=False),
        "mean_cost": costs.mean(shares_list, with_predictor),
        "shares": shares_list,
    }


def _difference(
    difference: Estimate, interval: str, routed: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "difference_points": 100 * float(difference.value),
        "low_points": 100 * difference.low,
        "high_points": 100 * difference.high,
        "interval": interval,
        "cost_ratio": routed["mean_cost"] / other["mean_cost"],
        "gflops_ratio": routed["mean_gflops"] / other["mean_gflops"],
    }
