"""Policies: one decision for evaluation and server, an exact sweep, budgets that hold on other images."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.models.cost import Costs
from pipeline.policies.calibrate import ALL, Budget, Split, calibrate, choose, discordant, drop_bound, hashed
from pipeline.policies.fit import KINDS, _Fitting, _swept, fit_fronts, fit_policies
from pipeline.policies.route import Images, route
from pipeline.serving.runtime.policy import (
    ALWAYS,
    NEVER,
    STOP,
    Policy,
    confidence,
    first_resolution,
    next_resolution,
    predictor_policy,
    static_policy,
)

COSTS = Costs((96, 48, 32), (8.0, 2.0, 1.0), 0.25)
NUM_CLASSES = 5


def images_of(num_images: int = 1200, seed: int = 0, predictor: bool = True, smallest: float = np.inf) -> Images:
    """Images of varying difficulty: larger resolutions are right more often, and confidence says something of it.

    Args:
        smallest: the smallest extent of a crop in pixels; the largest is twice as many.
    """
    generator = np.random.default_rng(seed)
    hardness_N = generator.uniform(size=num_images)
    labels_N = generator.integers(NUM_CLASSES, size=num_images)
    strength_NR = np.clip(np.array([7.0, 5.5, 5.2]) - np.array([1.5, 5.5, 6.5]) * hardness_N[:, None], 0, None)
    logits_NRK = generator.normal(size=(num_images, 3, NUM_CLASSES))
    logits_NRK[np.arange(num_images), :, labels_N] += strength_NR
    extents_N = smallest * (1 + generator.uniform(size=num_images)) if smallest < np.inf else None
    wanted_NR = np.stack([hardness_N - 0.6, 0.3 - np.abs(hardness_N - 0.5), 0.4 - hardness_N], axis=1)
    predictor_NR = 6 * wanted_NR + generator.normal(size=(num_images, 3))
    predictor_NR = predictor_NR.astype(np.float32) if predictor else None
    return Images.of(logits_NRK.astype(np.float32), labels_N, predictor_NR, COSTS, extents_N=extents_N)


def one_by_one(policy: Policy, images: Images) -> list[tuple[list[int], float]]:
    """For each image the resolutions that run, in order, and its cost: a slow reference in plain Python."""
    found = []
    for n in range(len(images)):
        ran, index = [], policy.members[0]
        if policy.needs_predictor:
            logits = images.predictor_logits_NR[n].astype(np.float64) + policy.start_bias * np.array(COSTS.relative)
            index = max(policy.members, key=lambda j: (logits[j], -policy.members.index(j)))
        while True:
            ran.append(index)
            position = policy.members.index(index)
            if position + 1 == len(policy.members):
                break
            confident = images.confidence_NR[n, index] >= policy.thresholds[position]
            exhausted = policy.stops_exhausted and images.exhausted_NR[n, index]
            if confident or exhausted:
                break
            index = policy.members[position + 1]
        cost = sum(COSTS.backbone_gflops[j] for j in ran) + (COSTS.predictor_gflops if policy.needs_predictor else 0)
        found.append((ran, cost))
    return found


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        (static_policy(1), "static"),
        (Policy((2, 1, 0), (0.7, 0.8)), "cascade"),
        (Policy((2, 0), (0.9,)), "cascade"),
        (predictor_policy((2, 1, 0), 0.5), "predictor"),
        (Policy((2, 1, 0), (0.7, NEVER), -1.0), "predictor+cascade"),
        (Policy((2, 1, 0), (0.9, 0.8), stops_exhausted=True), "cascade"),
        (Policy((2, 1, 0), (0.9, NEVER), -1.0, stops_exhausted=True), "predictor+cascade"),
    ],
)
def test_routing_many_images_is_routing_each_of_them(policy: Policy, kind: str) -> None:
    images = images_of(200, smallest=30)
    routed, expected = route(policy, images), one_by_one(policy, images)
    assert policy.kind == kind
    assert [np.flatnonzero(ran_R).tolist() for ran_R in routed.ran_NR] == [sorted(ran) for ran, _ in expected]
    assert routed.last_N.tolist() == [ran[-1] for ran, _ in expected]
    np.testing.assert_allclose(routed.cost_N(COSTS), [cost for _, cost in expected])
    assert Policy(**policy.to_json()) == policy


def test_a_decision_is_by_the_largest_softmax_probability() -> None:
    logits_NK = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.1, 0.0]])
    sure_N = confidence(logits_NK)
    torch.testing.assert_close(sure_N, logits_NK.softmax(dim=1).amax(dim=1))
    policy = Policy((2, 0), (0.5,))
    assert next_resolution(policy, 2, sure_N).tolist() == [STOP, 0]
    assert next_resolution(policy, 0, sure_N).tolist() == [STOP, STOP]
    assert next_resolution(Policy((2, 0), (ALWAYS,)), 2, sure_N).tolist() == [STOP, STOP]
    assert next_resolution(Policy((2, 0), (NEVER,)), 2, torch.ones(1)).tolist() == [0]
    exhausted_N = torch.tensor([False, True])
    assert next_resolution(policy, 2, sure_N, exhausted_N).tolist() == [STOP, 0]
    assert next_resolution(replace(policy, stops_exhausted=True), 2, sure_N, exhausted_N).tolist() == [STOP, STOP]
    assert first_resolution(policy, None, torch.zeros(3), 2).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("members", "thresholds", "message"),
    [
        ((), (), "one or more"),
        ((1, 1), (0.5,), "different"),
        ((2, 1), (), "a threshold for each"),
        ((0,), (0.1,), "1 th"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(members: tuple, thresholds: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(members, thresholds)


@pytest.mark.parametrize("members", [(2, 0), (2, 1, 0)])
@pytest.mark.parametrize("start_bias", [None, 0.3])
@pytest.mark.parametrize("smallest", [np.inf, 30])
def test_the_sweep_is_exact(members: tuple[int, ...], start_bias: float | None, smallest: float) -> None:
    images = images_of(300, smallest=smallest)
    fitting = _Fitting(images, images.correct_NR.astype(np.float64), (2, 1, 0))
    start_N = np.full(len(images), members[0])
    if start_bias is not None:
        policy = predictor_policy(members, start_bias)
        start_N = first_resolution(
            policy, torch.from_numpy(images.predictor_logits_NR), torch.tensor(COSTS.relative), len(images)
        ).numpy()
    points = list(_swept(fitting, members, start_N, start_bias))
    assert len(points) > 3
    assert any(point.policy.stops_exhausted for point in points) == (smallest < np.inf)
    for point in points:
        routed = route(point.policy, images)
        assert routed.cost_N(COSTS).mean() == pytest.approx(point.cost)
        assert routed.correct_N(images.correct_NR).mean() == pytest.approx(point.accuracy)
    # No threshold of a coarse grid beats the front.
    grid = itertools.product(np.linspace(0.2, 1, 9), repeat=len(members) - 1)
    for thresholds, stops in itertools.product(grid, {False, smallest < np.inf}):
        routed = route(Policy(members, thresholds, start_bias, stops), images)
        cost, accuracy = routed.cost_N(COSTS).mean(), routed.correct_N(images.correct_NR).mean()
        at_this_cost = [point.accuracy for point in points if point.cost <= cost * 1.01 + 0.02]
        assert max(at_this_cost, default=1.0) >= accuracy - 0.01


def test_a_front_rises_above_the_line_between_the_static_resolutions() -> None:
    images = images_of(3000)
    fitted = fit_policies(images)
    costs, accuracies = [point.cost for point in fitted], [point.accuracy for point in fitted]
    assert costs == sorted(costs)
    assert accuracies == sorted(accuracies)
    static_R = images.correct_NR.mean(axis=0)
    halfway = max(point.accuracy for point in fitted if point.cost <= 4.0)
    assert halfway > np.interp(4.0, COSTS.backbone[::-1], static_R[::-1]) + 0.03
    assert {point.policy.kind for point in fit_policies(images_of(predictor=False))} <= {"static", "cascade"}
    assert fit_policies(images_of(predictor=False), ["predictor"]) == []


def test_images_stay_on_their_side_whatever_other_images_there_are() -> None:
    keys_N = np.random.default_rng(0).integers(2**63, size=5000).astype(np.uint64)
    ((select, held_out),) = Split().parts(keys_N)
    assert sorted([*select, *held_out]) == list(range(5000))
    assert 0.47 < len(select) / 5000 < 0.53
    ((fewer, _),) = Split().parts(keys_N[:2000])
    assert fewer.tolist() == select[select < 2000].tolist()
    ((other, _),) = Split(seed=1).parts(keys_N)
    assert 0.4 < np.isin(other, select).mean() < 0.6
    assert 0.48 < hashed(keys_N, 3).mean() < 0.52
    folds = Split(folds=4).parts(keys_N[:400])
    assert sorted(np.concatenate([apply for _, apply in folds])) == list(range(400))
    assert all(not np.isin(apply, fit).any() and len(fit) + len(apply) == 400 for fit, apply in folds)


@pytest.mark.parametrize("cross_fit_below", [0, 10_000])
def test_what_is_stated_comes_from_images_that_were_not_fitted_on(cross_fit_below: int) -> None:
    images = images_of(2000)
    keys_N = np.arange(2000, dtype=np.uint64)
    split = Split(cross_fit_below=cross_fit_below)
    found = calibrate(images, keys_N, Budget(cost=3.0), split)
    assert found.folds == (5 if cross_fit_below else None)
    expected = np.concatenate([apply for _, apply in split.parts(keys_N)])
    assert found.held_out.tolist() == sorted(expected)
    assert {*found.fronts} == {*KINDS, ALL}
    correct_NR = images.correct_NR[found.held_out]
    assert found.chosen.cost <= 3.0
    assert found.routed[ALL].cost_N(COSTS).mean() == pytest.approx(found.chosen.cost, rel=0.1)
    accuracy = {kind: routed.correct_N(correct_NR).mean() for kind, routed in found.routed.items()}
    assert accuracy[ALL] > accuracy["static"] + 0.01
    assert len(found.curves["cascade"]) == len(found.curves[ALL]) == 30


def test_an_allowed_drop_is_kept_on_other_images() -> None:
    images, violated = images_of(2000), 0
    for seed in range(12):
        found = calibrate(images, np.arange(2000, dtype=np.uint64), Budget(max_drop=0.02), Split(seed=seed))
        correct_NR = images.correct_NR[found.held_out]
        violated += correct_NR[:, 0].mean() - found.routed[ALL].correct_N(correct_NR).mean() > 0.02
    assert violated <= 2


def test_a_budget_that_nothing_meets_is_refused() -> None:
    images = images_of(500)
    fitted = fit_policies(images)
    with pytest.raises(ValueError, match=r"no policy costs at most 0\.5 GFLOPs; the cheapest costs 1 GFLOPs"):
        choose(fitted, Budget(cost=0.5), images)
    with pytest.raises(ValueError, match=r"costs at most 1\.05 GFLOPs stays within 0\.1 points"):
        choose(fitted, Budget(cost=1.05, max_drop=0.001), images)
    assert choose(fitted, Budget(), images) == fitted[-1]
    assert choose(fitted, Budget(max_drop=1.0), images) == fitted[0]


def test_without_a_policy_within_the_drop_the_best_static_resolution_is_chosen() -> None:
    """Neither confidence nor the predictor says which images need 96 px."""
    correct_NR = np.random.default_rng(0).random((500, 3)) < (0.9, 0.6, 0.4)
    images = replace(images_of(500), correct_NR=correct_NR)
    moving = [point for point in fit_policies(images) if point.policy.kind != "static"]
    accuracy = images.correct_NR[:, 0].mean()
    for budget in (Budget(max_drop=0.0), Budget(max_drop=0.0, cost=8.0)):
        chosen = choose(moving, budget, images)
        assert (chosen.policy, chosen.cost, chosen.accuracy) == (static_policy(0), 8.0, accuracy)
    with pytest.raises(ValueError, match=r"costs at most 7\.9 GFLOPs stays within 0 points"):
        choose(moving, Budget(max_drop=0.0, cost=7.9), images)
    found = calibrate(images, np.arange(500, dtype=np.uint64), Budget(max_drop=0.0), Split())
    assert found.folds == 5
    assert found.chosen.policy == static_policy(0)
    assert found.routed[ALL].cost_N(COSTS).tolist() == [8.0] * 500


@pytest.mark.parametrize(("predictor", "resolutions", "missing"), [(False, 3, 2), (True, 3, 0), (True, 5, 1)])
def test_a_kind_that_needs_a_predictor_has_no_front_without_policies_of_its_own(
    predictor: bool, resolutions: int, missing: int
) -> None:
    """A predictor+cascade has at most four resolutions."""
    images, repeated = images_of(200, predictor=predictor), np.arange(resolutions) % 3
    logits_NR = images.predictor_logits_NR
    images = replace(
        images,
        confidence_NR=images.confidence_NR[:, repeated],
        correct_NR=images.correct_NR[:, repeated],
        exhausted_NR=images.exhausted_NR[:, repeated],
        predictor_logits_NR=None if logits_NR is None else logits_NR[:, repeated],
        costs=Costs((96, 48, 32, 24, 16)[:resolutions], (8.0, 2.0, 1.0, 0.5, 0.2)[:resolutions], 0.25),
    )
    fronts = fit_fronts(images)
    assert [kind for kind in (*KINDS, ALL) if not fronts[kind]] == ["predictor", "predictor+cascade"][2 - missing :]
    found = calibrate(images, np.arange(200, dtype=np.uint64), Budget(), Split())
    assert set(found.curves) == {kind for kind in fronts if fronts[kind]} >= set(found.routed)


def test_the_accuracy_of_weighted_images_is_a_fraction() -> None:
    """The rows have only the heavier images."""
    images = images_of(400)
    heavy = replace(images, weights_N=np.repeat([1.5, 0.5], 200)).rows(np.arange(200))
    assert heavy.weights_N.tolist() == [1.0] * 200
    assert fit_policies(heavy) == fit_policies(images.rows(np.arange(200)))


def test_the_bound_of_a_drop_is_one_sided() -> None:
    first_N = np.arange(1000) < 900
    assert drop_bound(first_N, first_N) == 0
    second_N = np.arange(1000) < 880
    assert 0.02 < drop_bound(first_N, second_N) < 0.035
    assert drop_bound(second_N, first_N) < 0


def test_a_loss_in_a_rare_class_counts_as_much_as_the_class() -> None:
    """Ten of 1,000 images are of the rare class. A classifier that gets them all wrong loses 1 or 50 points."""
    rare_N, everything_N = np.arange(1000) < 10, np.ones(1000, bool)
    weights_N = np.where(rare_N, 50.0, 1000 / 1980)
    assert drop_bound(everything_N, ~rare_N) < 0.02
    assert drop_bound(everything_N, ~rare_N, weights_N) > 0.5
    # Equal weights are no weights, and the counts say what share of the weighted images differs.
    assert discordant(everything_N, ~rare_N, np.full(1000, 3.0)) == (10, 0, 1000)
    found = discordant(everything_N, ~rare_N, weights_N)
    assert found.only_first / found.num_images == pytest.approx(0.5)
    assert found.num_images == pytest.approx(20), "ten images of half the weight say as much as 20 equal ones"


def test_the_bound_of_a_weighted_drop_holds() -> None:
    """One class of nine counts as much as the other; 6 % of the first and 2 % of the second class are lost."""
    generator, labels_N = np.random.default_rng(0), np.arange(1000) % 10 == 0
    weights_N = np.where(labels_N, 5.0, 1000 / 1800)
    lost = [generator.random(1000) < np.where(labels_N, 0.06, 0.02) for _ in range(400)]
    held = [drop_bound(np.ones(1000, bool), ~lost_N, weights_N) >= 0.04 for lost_N in lost]
    assert 0.91 <= np.mean(held) <= 0.995
