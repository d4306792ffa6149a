"""The rows of a report, one for each way to spend a cost, and the differences between the routed network and
the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.evaluation.statistics import (
    Estimate,
    accuracy,
    balanced_accuracy,
    bootstrap_means,
    class_weights,
    envelope,
    mcnemar_p,
    mean_over_seeds,
    oracle_choice,
    paired_difference,
    percentile_interval,
    shares,
)
from pipeline.models.cost import Costs
from pipeline.policies.calibrate import ALL, discordant
from pipeline.policies.route import Routed

BOOTSTRAP_SEED = 0


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The results on N held-out images. No policy was fitted on them.

    Attributes:
        labels_N: true classes, int64.
        correct_NR: whether each resolution is correct, bool.
        other_NR: the same for another network that could have been deployed, such as the one from before the joint
            stage; None if there is none.
        other_name: short description of that network, such as "before joint".
        routed: maps a kind of policy, or ALL, to its decisions for these images; empty with one resolution.
        placebo_NV: whether each of V shifted crops at the largest resolution is correct, bool; V is 0 if there are
            none.
        balanced: whether to compare the mean accuracy over the classes instead of top-1.
    """

    labels_N: np.ndarray
    correct_NR: np.ndarray
    other_NR: np.ndarray | None
    other_name: str
    routed: Mapping[str, Routed]
    costs: Costs
    placebo_NV: np.ndarray | None = None
    balanced: bool = False

    @cached_property
    def weights_N(self) -> np.ndarray:
        """The weight of each image in the compared accuracy, with mean 1."""
        return class_weights(self.labels_N) if self.balanced else np.ones(len(self.labels_N))

    @property
    def top1_key(self) -> str:
        """The key of the rows whose values are compared."""
        return "balanced_top1" if self.balanced else "top1"

    @property
    def is_routed(self) -> bool:
        """Whether there are policies, and so more than one resolution."""
        return bool(self.routed)

    @cached_property
    def oracle_N(self) -> np.ndarray:
        """The index of the cheapest resolution at which each image is correct, or of the cheapest of all, int64."""
        return oracle_choice(self.correct_NR, self.costs.backbone)

    def static_columns(self) -> list[tuple[str, str, int, np.ndarray]]:
        """Return the static networks: (id, label, index of the resolution, whether each image is correct)."""
        found = [
            (f"static-{side}", f"static {side} px", index, self.correct_NR[:, index])
            for index, side in enumerate(self.costs.resolutions)
        ]
        if self.other_NR is not None:
            found += [
                (f"other-{side}", f"static {side} px {self.other_name}", index, self.other_NR[:, index])
                for index, side in enumerate(self.costs.resolutions)
            ]
        return found


def table_rows(held_out: HeldOut, labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the rows of the report's table.

    Each has `id`, `kind`, `label`, `resolution`, `n`, `top1`, `top1_low`, `top1_high`, `interval` (its method),
    `balanced_top1`, `balanced_low`, `balanced_high` (mean over the classes), `mean_gflops`, `mean_cost` (in the unit of
    the costs, used for comparisons) and `shares` (of the answers, per resolution).

    Kinds: `static` and `other` (one per resolution, of the network and of the other network), `routed` (the chosen
    policy), `policy` (the best policy of each other kind that costs no more), `random` (images assigned to resolutions
    at random, with the same shares), `envelope` (the upper concave envelope of all static points at the routed cost:
    the best that a random mix of static networks reaches), `oracle` (the cheapest correct resolution) and `placebo` (an
    oracle over equally many shifted crops at the largest resolution, which shows how much of the oracle is luck).

    Args:
        labels: maps each kind of policy, and ALL, to its label.
    """
    N, R = held_out.correct_NR.shape
    costs = held_out.costs
    rows = static_rows(held_out.correct_NR, costs, held_out.labels_N)
    if held_out.other_NR is not None:
        rows += [
            row
            | {
                "id": row["id"].replace("static", "other"),
                "kind": "other",
                "label": f"{row['label']} {held_out.other_name}",
            }
            for row in static_rows(held_out.other_NR, costs, held_out.labels_N)
        ]
    if not held_out.is_routed:
        return rows
    for kind, routed in held_out.routed.items():
        name, what = ("routed", "routed") if kind == ALL else (f"policy-{kind}", "policy")
        row = answered_row(name, what, labels[kind], routed.correct_N(held_out.correct_NR), held_out.labels_N)
        rows.append(row | _routed_cost(routed, costs) | {"policy": kind if kind != ALL else None})
    routed = held_out.routed[ALL]
    spent, weights_N = _routed_cost(routed, costs), class_weights(held_out.labels_N)
    resampled, shares_R = _Resampled.of(held_out, np.ones(N)), shares(routed.last_N, R)
    random = percentile_interval(held_out.correct_NR.mean(axis=0) @ shares_R, resampled.random_B)
    at = np.array([spent["mean_cost"]])
    static_costs, accuracies = _static_points(held_out, np.ones(N))
    best, mixture = envelope(static_costs, accuracies[None], at)
    line = percentile_interval(best[0], resampled.envelope_B)
    balanced_line, _ = envelope(static_costs, _static_points(held_out, weights_N)[1][None], at)
    lower, upper, weight = (values[0] for values in mixture)
    names = [label for _, label, _, _ in held_out.static_columns()]
    first, *rest = dict.fromkeys(names[j] for j, share in ((lower, 1 - weight), (upper, weight)) if share > 1e-6)
    label = f"envelope, {first} to {rest[0].removeprefix('static ')}" if rest else first
    cost = [
        (1 - weight) * values[lower] + weight * values[upper] for values in (static_costs, _static_gflops(held_out))
    ]
    return [
        *rows,
        result_row("random", "random", "random, same shares", N, random, "bootstrap")
        | spent
        | {"shares": shares_R.tolist(), "balanced_top1": float(weights_N @ held_out.correct_NR @ shares_R / N)},
        result_row("envelope", "envelope", label, N, line, "bootstrap")
        | _cost(*cost, np.zeros(R))
        | {"balanced_top1": float(balanced_line[0])},
        oracle_row(held_out.correct_NR, held_out.oracle_N, costs, held_out.labels_N),
        *_placebo_rows(held_out),
    ]


def _placebo_rows(held_out: HeldOut) -> list[dict[str, Any]]:
    """Return the row of kind `placebo`. It costs one pass at the largest resolution, as if the best crop were known."""
    shifted_NV = held_out.placebo_NV
    if shifted_NV is None or shifted_NV.shape[1] == 0:
        return []
    largest, num_crops = int(np.argmax(held_out.costs.resolutions)), shifted_NV.shape[1] + 1
    label = f"placebo oracle, {num_crops} crops at {held_out.costs.resolutions[largest]} px"
    correct_N = held_out.correct_NR[:, largest] | shifted_NV.any(axis=1)
    row = answered_row("placebo", "placebo", label, correct_N, held_out.labels_N)
    return [row | mean_costs(np.eye(len(held_out.costs.resolutions))[largest], held_out.costs, with_predictor=False)]


def compare(held_out: HeldOut, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the difference of the routed network and every other row on the same images, by the other row's id.

    Each has `difference_points`, `low_points`, `high_points`, `interval` (its method), `cost_ratio` and `gflops_ratio`
    (routed network divided by the other). Against a network with one answer per image it also has `only_routed_right`,
    `only_other_right` and `mcnemar_p` (exact, two-sided). These are null for the two mixtures. For balanced accuracy
    there is no such test.
    """
    by_id, key = {row["id"]: row for row in rows}, held_out.top1_key
    routed, resampled = by_id["routed"], _Resampled.of(held_out, held_out.weights_N)
    routed_N = held_out.routed[ALL].correct_N(held_out.correct_NR)
    answers = {name: correct_N for name, _, _, correct_N in held_out.static_columns()}
    answers |= {
        f"policy-{kind}": other.correct_N(held_out.correct_NR) for kind, other in held_out.routed.items() if kind != ALL
    }
    answers["oracle"] = _at(held_out.correct_NR, held_out.oracle_N)
    found: dict[str, dict[str, Any]] = {}
    for other, other_N in answers.items():
        only_routed, only_other = int((routed_N & ~other_N).sum()), int((~routed_N & other_N).sum())
        difference = paired_difference(*discordant(routed_N, other_N, held_out.weights_N))
        found[other] = difference_row(difference, "bonett-price", routed, by_id[other]) | {
            "only_routed_right": only_routed,
            "only_other_right": only_other,
            "mcnemar_p": None if held_out.balanced else mcnemar_p(only_routed, only_other),
        }
    for other, other_B in (("random", resampled.random_B), ("envelope", resampled.envelope_B)):
        gain = percentile_interval(routed[key] - by_id[other][key], resampled.routed_B - other_B)
        found[other] = difference_row(gain, "bootstrap", routed, by_id[other]) | dict.fromkeys(
            ("only_routed_right", "only_other_right", "mcnemar_p")
        )
    return {row["id"]: found[row["id"]] for row in rows if row["id"] in found}


def curve_points(curve: Sequence[Routed], correct_NR: np.ndarray, costs: Costs) -> list[dict[str, float]]:
    """Return the results of policies of rising cost: `mean_cost`, `mean_gflops`, `top1`, `top1_low`, `top1_high`."""
    points = []
    for routed in curve:
        top1 = accuracy(int(routed.correct_N(correct_NR).sum()), len(correct_NR))
        spent = _routed_cost(routed, costs)
        points.append(
            {"mean_cost": spent["mean_cost"], "mean_gflops": spent["mean_gflops"]}
            | {"top1": top1.value, "top1_low": top1.low, "top1_high": top1.high}
        )
    return [point for place, point in enumerate(points) if place == 0 or point != points[place - 1]]


def predictor_gains(held_out: HeldOut, curves: Mapping[str, Sequence[Routed]], costs_C: np.ndarray) -> dict[str, Any]:
    """Return at which costs a policy with a predictor is more accurate than every policy without one that costs no
    more.

    Returns:
        `points`: for each cost limit, the better of the two kinds with a predictor compared with `best_without`, in the
        form of `gain_point`. `pays_from` and `pays_to`: the lowest and the highest cost limit at which the interval is
        above 0, or null. All intervals hold simultaneously (Bonferroni).
    """
    kinds = [kind for kind in ("predictor", "predictor+cascade") if kind in curves]
    tests, points = max(1, len(kinds) * len(costs_C)), []
    static_costs, _ = _static_points(held_out, held_out.weights_N)
    statics_NS = np.column_stack([correct_N for *_, correct_N in held_out.static_columns()])
    for place, highest in enumerate(costs_C):
        cascade_N = curves["cascade"][place].correct_N(held_out.correct_NR)
        found = []
        for kind in kinds:
            routed = curves[kind][place]
            if not routed.predictor_N.any():
                continue
            cost = _routed_cost(routed, held_out.costs)["mean_cost"]
            other_N = best_without(statics_NS, static_costs, cascade_N, cost, held_out.weights_N)
            values_N = held_out.weights_N * (routed.correct_N(held_out.correct_NR) - other_N)
            found.append(gain_point(kind, float(highest), cost, mean_over_seeds(values_N[None], tests)))
        points += [max(found, key=lambda point: point["low_points"])] if found else []
    return gains(points)


def best_without(
    statics_NS: np.ndarray, costs_S: np.ndarray, cascade_N: np.ndarray, cost: float, weights_N: np.ndarray
) -> np.ndarray:
    """Return whether the best policy without a predictor is correct, float64 (N,), in [0, 1].

    The best policy is the cascade or, if that is more accurate, a random mix of two static networks. For a mix, the
    value is the probability of a correct answer.

    Args:
        statics_NS: whether each static network is correct, bool.
        costs_S: cost of each static network.
        cascade_N: whether the best cascade within the cost limit is correct, bool.
        cost: mean cost at which the static networks are mixed.
        weights_N: weights of the images in an accuracy.
    """
    best, mixture = envelope(costs_S, (weights_N @ statics_NS / weights_N.sum())[None], np.array([cost]))
    if weights_N @ cascade_N / weights_N.sum() >= best[0]:
        return cascade_N.astype(np.float64)
    lower, upper, weight = (values[0] for values in mixture)
    return (1 - weight) * statics_NS[:, lower] + weight * statics_NS[:, upper]


def gain_point(kind: str, highest_cost: float, mean_cost: float, gain: Estimate) -> dict[str, Any]:
    """Return one of the points of `predictor_gains`."""
    return {
        "highest_cost": highest_cost,
        "mean_cost": mean_cost,
        "kind": kind,
        "difference_points": 100 * gain.value,
        "low_points": 100 * gain.low,
        "high_points": 100 * gain.high,
    }


def gains(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the points, and the lowest and highest cost limit with a proven gain: `pays_from` and `pays_to`."""
    pays = [point["highest_cost"] for point in points if point["low_points"] > 0]
    return {"points": list(points), "pays_from": min(pays, default=None), "pays_to": max(pays, default=None)}


def class_table(held_out: HeldOut, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return, for each class with an image, `name`, `n`, `static_top1` (per resolution), `routed_top1` and `shares`."""
    found = []
    routed_N = held_out.routed[ALL].correct_N(held_out.correct_NR) if held_out.is_routed else None
    for label in np.unique(held_out.labels_N):
        inside_N = held_out.labels_N == label
        row = {
            "name": classes[label],
            "n": int(inside_N.sum()),
            "static_top1": held_out.correct_NR[inside_N].mean(axis=0).tolist(),
        }
        if routed_N is not None:
            last_N = held_out.routed[ALL].last_N[inside_N]
            row |= {
                "routed_top1": float(routed_N[inside_N].mean()),
                "shares": shares(last_N, held_out.correct_NR.shape[1]).tolist(),
            }
        found.append(row)
    return found


@dataclass(frozen=True, eq=False)
class _Resampled:
    """Accuracies of B bootstrap resamples of the images, (B,) each."""

    routed_B: np.ndarray
    random_B: np.ndarray
    envelope_B: np.ndarray

    @classmethod
    def of(cls, held_out: HeldOut, weights_N: np.ndarray) -> _Resampled:
        R, routed = len(held_out.costs.resolutions), held_out.routed[ALL]
        statics = np.column_stack([correct_N for *_, correct_N in held_out.static_columns()])
        columns = [
            weights_N[:, None] * np.column_stack([statics, routed.correct_N(held_out.correct_NR)]),
            np.eye(R)[routed.last_N],
            routed.cost_N(held_out.costs),
            weights_N,
        ]
        means_BC = bootstrap_means(np.column_stack(columns).astype(np.float64), BOOTSTRAP_SEED)
        num_static = statics.shape[1]
        means_BC[:, : num_static + 1] /= means_BC[:, -1:]
        static_BS, routed_B, cost_B = means_BC[:, :num_static], means_BC[:, num_static], means_BC[:, -2]
        shares_BR = means_BC[:, num_static + 1 : -2]
        random_B = (shares_BR * static_BS[:, :R]).sum(axis=1)
        return cls(routed_B, random_B, envelope(_static_points(held_out, weights_N)[0], static_BS, cost_B)[0])


def _static_points(held_out: HeldOut, weights_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the costs and weighted accuracies of all static networks, (S,) each."""
    columns = held_out.static_columns()
    costs_S = np.array([held_out.costs.backbone[index] for _, _, index, _ in columns])
    return costs_S, np.array([weights_N @ correct_N / weights_N.sum() for *_, correct_N in columns])


def _static_gflops(held_out: HeldOut) -> np.ndarray:
    return np.array([held_out.costs.backbone_gflops[index] for _, _, index, _ in held_out.static_columns()])


def _at(correct_NR: np.ndarray, choice_N: np.ndarray) -> np.ndarray:
    return correct_NR[np.arange(len(choice_N)), choice_N]


def static_rows(correct_NR: np.ndarray, costs: Costs, labels_N: np.ndarray | None = None) -> list[dict[str, Any]]:
    """Return the rows of kind `static`. Without labels there is no balanced accuracy."""
    identity = np.eye(correct_NR.shape[1])
    return [
        answered_row(f"static-{side}", "static", f"static {side} px", correct_NR[:, j], labels_N)
        | {"resolution": side}
        | mean_costs(identity[j], costs, with_predictor=False)
        for j, side in enumerate(costs.resolutions)
    ]


def oracle_row(
    correct_NR: np.ndarray, oracle_N: np.ndarray, costs: Costs, labels_N: np.ndarray | None = None
) -> dict[str, Any]:
    """Return the row of kind `oracle`."""
    row = answered_row("oracle", "oracle", "oracle", _at(correct_NR, oracle_N), labels_N)
    return row | mean_costs(shares(oracle_N, correct_NR.shape[1]), costs, with_predictor=False)


def answered_row(
    name: str, kind: str, label: str, correct_N: np.ndarray, labels_N: np.ndarray | None = None
) -> dict[str, Any]:
    """Return the row of a network that gives each image one answer, without its cost."""
    row = result_row(name, kind, label, len(correct_N), accuracy(int(correct_N.sum()), len(correct_N)), "wilson")
    if labels_N is None:
        return row
    balanced = balanced_accuracy(correct_N, labels_N)
    return row | {"balanced_top1": balanced.value, "balanced_low": balanced.low, "balanced_high": balanced.high}


def result_row(name: str, kind: str, label: str, n: int, top1: Estimate, interval: str) -> dict[str, Any]:
    """Return a row of `table_rows` without its cost and its balanced accuracy."""
    return {
        "id": name,
        "kind": kind,
        "label": label,
        "resolution": None,
        "n": n,
        "top1": float(top1.value),
        "top1_low": top1.low,
        "top1_high": top1.high,
        "interval": interval,
        "balanced_top1": None,
        "balanced_low": None,
        "balanced_high": None,
    }


def mean_costs(shares_R: Sequence[float] | np.ndarray, costs: Costs, with_predictor: bool) -> dict[str, Any]:
    """Return the cost fields of a row whose images run once each, given the share of each resolution."""
    shares_list = [float(share) for share in shares_R]
    return _cost(costs.mean(shares_list, with_predictor), costs.mean_gflops(shares_list, with_predictor), shares_R)


def _cost(mean_cost: float, mean_gflops: float, shares_R: Sequence[float] | np.ndarray) -> dict[str, Any]:
    return {
        "mean_cost": float(mean_cost),
        "mean_gflops": float(mean_gflops),
        "shares": [float(share) for share in shares_R],
    }


def _routed_cost(routed: Routed, costs: Costs) -> dict[str, Any]:
    cost, gflops = float(routed.cost_N(costs).mean()), float(routed.gflops_N(costs).mean())
    return _cost(cost, gflops, shares(routed.last_N, len(costs.resolutions)))


def difference_row(
    difference: Estimate, interval: str, routed: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, Any]:
    """Return one of the differences of `compare`, without its tests."""
    return {
        "difference_points": 100 * float(difference.value),
        "low_points": 100 * difference.low,
        "high_points": 100 * difference.high,
        "interval": interval,
        "cost_ratio": routed["mean_cost"] / other["mean_cost"],
        "gflops_ratio": routed["mean_gflops"] / other["mean_gflops"],
    }
