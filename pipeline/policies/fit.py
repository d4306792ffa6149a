"""Fit policies: evaluate every cascade of resolutions at every threshold of a grid, and keep the Pareto front.

Confidence cascades: Berestizshevsky and Even 2018; Streeter 2018 (arXiv 1802.07697). Do not report a policy's accuracy
on the images that it was fitted on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit

from pipeline.policies.route import Images
from pipeline.serving.runtime.policy import (
    ALWAYS,
    NEVER,
    Policy,
    first_resolution,
    predictor_policy,
    static_policy,
)

Item = TypeVar("Item")
KINDS = ("static", "cascade", "predictor", "predictor+cascade")
ALL = "all"
"""The key of the front over all kinds together."""
MAX_MEMBERS = 4
"""The largest number of resolutions in a cascade."""
GRID = {1: 400, 2: 64, 3: 24}
"""Maps the number of thresholds of a policy to the number of values tried for each: quantiles of the confidence."""
START_BIASES = 25
"""The number of predictor biases that are tried for a predictor+cascade."""
FRONT_POINTS = 60
"""The largest number of policies in a front."""


@dataclass(frozen=True)
class FittedPolicy:
    """A policy, with its cost and accuracy on the images that it was fitted on.

    Attributes:
        cost: mean cost per image, in the unit of `Images.costs`, including the predictor if the policy uses it.
        accuracy: expected accuracy, as a fraction of 1 (see `expected_correctness`).
    """

    policy: Policy
    cost: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class _Fitting:
    """The images of a fit, and values that are computed from them once.

    Attributes:
        worth_NR: weight of each image times the probability that its answer is correct. Thresholds are chosen by these
            rather than by correctness itself, because correctness would overfit single images near a threshold.
        order: indices of the resolutions, cheapest first.
    """

    images: Images
    worth_NR: np.ndarray
    order: tuple[int, ...]


def expected_correctness(images: Images) -> np.ndarray:
    """Return the probability (N, R) that each answer is correct, from a logistic regression on all R confidences."""
    confidence_NR = images.confidence_NR.astype(np.float64)
    logits_NR = np.log(confidence_NR.clip(1e-6)) - np.log((1 - confidence_NR).clip(1e-6))
    features_NF = np.column_stack([np.ones(len(logits_NR)), logits_NR, logits_NR**2 / 10])
    return np.column_stack([_logistic(features_NF, correct_N, images.weights_N) for correct_N in images.correct_NR.T])


def _logistic(features_NF: np.ndarray, targets_N: np.ndarray, weights_N: np.ndarray) -> np.ndarray:
    """Return the fitted probabilities (N,) of a logistic regression with a ridge penalty of 1 on all features but the
    first."""
    ridge_F = np.append(0.0, np.ones(features_NF.shape[1] - 1))

    def loss(weights_F: np.ndarray) -> tuple[float, np.ndarray]:
        scores_N = features_NF @ weights_F
        value = weights_N @ (np.logaddexp(0, scores_N) - targets_N * scores_N) + 0.5 * ridge_F @ weights_F**2
        gradient_F = features_NF.T @ (weights_N * (expit(scores_N) - targets_N)) + ridge_F * weights_F
        return float(value), gradient_F

    found = minimize(loss, np.zeros(features_NF.shape[1]), jac=True)
    return expit(features_NF @ found.x)


def fit_policies(images: Images, kinds: Sequence[str] = KINDS) -> list[FittedPolicy]:
    """Return the Pareto front of all policies of the given kinds, by cost and accuracy.

    Returns:
        At most FRONT_POINTS policies with rising cost and accuracy. The first is the cheapest of all policies, the last
        the most accurate. The list is empty if there is no policy of these kinds, such as `predictor` without predictor
        logits.
    """
    return _merged(_kind_fronts(images, kinds), kinds)


def fit_fronts(images: Images) -> dict[str, list[FittedPolicy]]:
    """Return a front as in `fit_policies` for each kind, and for ALL kinds.

    Static policies belong to every kind's front, with one exception: if a kind needs a predictor and has no policies of
    its own, its front is empty.
    """
    fronts = _kind_fronts(images, KINDS)
    found = {kind: _merged(fronts, dict.fromkeys(("static", kind))) for kind in KINDS}
    found |= {kind: [] for kind in KINDS if "predictor" in kind and not fronts[kind]}
    return found | {ALL: _merged(fronts, KINDS)}


def _kind_fronts(images: Images, kinds: Sequence[str]) -> dict[str, list[FittedPolicy]]:
    worth_NR = images.weights_N[:, None] * expected_correctness(images)
    order = tuple(int(index) for index in np.argsort(images.costs.backbone, kind="stable"))
    fitting = _Fitting(images, worth_NR, order)
    return {kind: _front(_candidates(fitting, kind)) for kind in kinds}


def _merged(fronts: Mapping[str, Sequence[FittedPolicy]], kinds: Iterable[str]) -> list[FittedPolicy]:
    return thin(_front(point for kind in kinds for point in fronts[kind]))


def _front(points: Iterable[FittedPolicy]) -> list[FittedPolicy]:
    return pareto(points, lambda point: (point.accuracy, point.cost))


def pareto(items: Iterable[Item], point: Callable[[Item], tuple[float, float]]) -> list[Item]:
    """Return the Pareto front, cheapest first: no other item beats one of them in both cost and accuracy.

    Args:
        point: returns an item's accuracy and cost.
    """
    kept: list[Item] = []
    for item in sorted(items, key=lambda item: (point(item)[1], -point(item)[0])):
        if not kept or point(item)[0] > point(kept[-1])[0]:
            kept.append(item)
    return kept


def thin(points: Sequence[FittedPolicy]) -> list[FittedPolicy]:
    """Return at most FRONT_POINTS points of a front, evenly spaced in accuracy, including the first and the last."""
    if len(points) <= FRONT_POINTS:
        return list(points)
    accuracies = np.array([point.accuracy for point in points])
    wanted = np.linspace(accuracies[0], accuracies[-1], FRONT_POINTS)
    return [points[place] for place in np.unique(np.searchsorted(accuracies, wanted).clip(0, len(points) - 1))]


def _candidates(fitting: _Fitting, kind: str) -> Iterator[FittedPolicy]:
    order, costs = fitting.order, fitting.images.costs
    has_predictor = fitting.images.predictor_logits_NR is not None and len(order) > 1
    if kind == "static":
        for index in order:
            yield FittedPolicy(static_policy(index), costs.backbone[index], float(fitting.worth_NR[:, index].mean()))
    elif kind == "cascade":
        for length in range(2, min(MAX_MEMBERS, len(order)) + 1):
            for members in itertools.combinations(order, length):
                yield from _swept(fitting, members, np.full(len(fitting.images), members[0]))
    elif kind == "predictor" and has_predictor:
        for bias in _biases(fitting.images, 4 * START_BIASES):
            start_N = _starts(fitting.images, order, bias)
            cost = float(np.asarray(costs.backbone)[start_N].mean()) + costs.predictor
            worth_N = fitting.worth_NR[np.arange(len(start_N)), start_N]
            yield FittedPolicy(predictor_policy(order, bias), cost, float(worth_N.mean()))
    elif kind == "predictor+cascade" and has_predictor and len(order) <= MAX_MEMBERS:
        for bias in _biases(fitting.images, START_BIASES):
            yield from _swept(fitting, order, _starts(fitting.images, order, bias), bias)


def _biases(images: Images, count: int) -> list[float]:
    """Return 0 and biases that move the predictor's mean cost from the cheapest to the most expensive resolution."""
    logits_NR, relative_R = images.predictor_logits_NR, np.asarray(images.costs.relative)
    assert logits_NR is not None
    switches = [
        (logits_NR[:, i] - logits_NR[:, j]) / (relative_R[j] - relative_R[i])
        for i, j in itertools.permutations(range(len(relative_R)), 2)
        if relative_R[j] > relative_R[i]
    ]
    quantiles = np.quantile(np.concatenate(switches), np.linspace(0.0, 1.0, count))
    return np.unique(np.append(quantiles, 0.0)).tolist()


def _starts(images: Images, members: Sequence[int], bias: float) -> np.ndarray:
    """Return the index of the resolution that the predictor chooses for each image, as in `first_resolution`."""
    assert images.predictor_logits_NR is not None
    logits, relative_R = torch.from_numpy(images.predictor_logits_NR), torch.tensor(images.costs.relative)
    return first_resolution(predictor_policy(members, bias), logits, relative_R, len(images)).numpy()


def _swept(
    fitting: _Fitting, members: tuple[int, ...], start_N: np.ndarray, start_bias: float | None = None
) -> Iterator[FittedPolicy]:
    """Yield the Pareto front of one cascade, and if there are exhausted images, also the front if they stop."""
    exhausted_NM = fitting.images.exhausted_NR[:, list(members[:-1])]
    for stops_exhausted in (False, True) if exhausted_NM.any() else (False,):
        yield from _swept_once(fitting, members, start_N, start_bias, stops_exhausted)


def _swept_once(
    fitting: _Fitting, members: tuple[int, ...], start_N: np.ndarray, start_bias: float | None, stops_exhausted: bool
) -> Iterator[FittedPolicy]:
    """Yield the Pareto front of one cascade over a grid of thresholds.

    With bin b_k of an image's confidence at member k and threshold t_k on the bins' edges, an image that starts at s
    stops at member k if b_s < t_s, ..., b_(k-1) < t_(k-1) and b_k >= t_k. So accuracy and cost at all thresholds at
    once are cumulative sums of histograms over (b_s, ..., b_k).
    """
    images, num_thresholds = fitting.images, len(members) - 1
    columns = images.confidence_NR[:, list(members[:-1])].T
    edges = [_edges(column_N, GRID[num_thresholds]) for column_N in columns]
    bins = [np.searchsorted(edge, column_N, side="right") for edge, column_N in zip(edges, columns, strict=True)]
    sizes = [len(edge) + 2 for edge in edges]  # thresholds: below all bins, between each two, above all
    if stops_exhausted:  # their bin reaches every threshold, NEVER too
        bins = [
            np.where(images.exhausted_NR[:, member], size - 1, column_N)
            for member, size, column_N in zip(members[:-1], sizes, bins, strict=True)
        ]
    accuracy, cost = np.zeros(sizes), np.zeros(sizes)
    for first in range(len(members)):
        starts_N = start_N == members[first]
        paid = 0.0
        for last in range(first, len(members)):
            paid += images.costs.backbone[members[last]]
            axes = range(first, min(last + 1, num_thresholds))
            shape = [size if axis in axes else 1 for axis, size in enumerate(sizes)]
            reached = [bins[axis][starts_N] for axis in axes]
            worth_N = fitting.worth_NR[starts_N, members[last]]
            for total, values_N in ((accuracy, worth_N), (cost, np.full(len(worth_N), paid))):
                num_bins = [sizes[axis] for axis in axes]
                stopped = _stopped(reached, num_bins, values_N, last < num_thresholds)
                total += stopped[tuple(slice(sizes[axis]) for axis in axes)].reshape(shape)
    accuracy, cost = accuracy.ravel() / len(images), cost.ravel() / len(images)
    if start_bias is not None:
        cost = cost + images.costs.predictor
    for place in _front_places(cost, accuracy):
        chosen = np.unravel_index(place, sizes)
        values = tuple(_threshold(edge, int(at)) for edge, at in zip(edges, chosen, strict=True))
        if start_bias is None and ALWAYS in values:
            continue  # every image stops there, so this equals a shorter cascade
        policy = Policy(members, values, start_bias, stops_exhausted)
        yield FittedPolicy(policy, float(cost[place]), float(accuracy[place]))


def _edges(values_N: np.ndarray, count: int) -> np.ndarray:
    """Return the inner edges of at most `count` bins that hold about the same number of values."""
    # In float32, as the confidences are when a policy is applied: images of equal confidence share a bin.
    return np.unique(np.quantile(values_N, np.linspace(0, 1, count + 1)[1:-1]).astype(np.float32))


def _threshold(edges: np.ndarray, place: int) -> float:
    """Return the confidence at which bin `place` begins, so that images in this bin and above stop."""
    if place == 0:
        return ALWAYS
    return float(edges[place - 1]) if place <= len(edges) else NEVER


def _stopped(bins: Sequence[np.ndarray], num_bins: Sequence[int], values_N: np.ndarray, stops: bool) -> np.ndarray:
    """Sum values over the images that stop at the last of some members, for all thresholds: (num_bins + 1, ...).

    An image stops at the last member if its confidence is below the threshold at every earlier member and, if the last
    member has a threshold, not below that one.

    Args:
        bins: bin of each image's confidence, for every member that has a threshold.
        num_bins: number of bins of each of these members.
        stops: whether the last member has a threshold.
    """
    if not bins:
        return np.array(values_N.sum())
    flat = np.ravel_multi_index([*bins], [*num_bins])
    sums = np.bincount(flat, values_N, minlength=int(np.prod(num_bins))).reshape(num_bins)
    for axis in range(len(num_bins)):
        below = np.cumsum(sums, axis=axis)
        below = np.concatenate([np.zeros_like(np.take(below, [0], axis=axis)), below], axis=axis)
        is_last = stops and axis == len(num_bins) - 1
        sums = np.take(below, [-1], axis=axis) - below if is_last else below
    return sums


def _front_places(cost: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """Return the indices of the points that no other point beats in both cost and accuracy."""
    order = np.lexsort((-accuracy, cost))
    best = np.maximum.accumulate(accuracy[order])
    better = np.concatenate([[True], accuracy[order][1:] > best[:-1]])
    return order[better]
