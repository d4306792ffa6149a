"""Intervals, tests, baselines and the budget curve match slow references that loop over images."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.evaluation.budget import biased_choice, budget_curve
from pipeline.evaluation.comparison import HeldOut, compare, predictor_gains, table_rows
from pipeline.evaluation.statistics import (
    MAX_BINS,
    accuracy,
    balanced_accuracy,
    bootstrap_means,
    by_attribute,
    envelope,
    mcnemar_p,
    mean_of,
    mean_over_seeds,
    oracle_choice,
    paired_difference,
    percentile_interval,
    shares,
)
from pipeline.models.cost import Costs
from pipeline.policies.calibrate import ALL, discordant
from pipeline.policies.route import Routed
from tests.unit.evaluation_cases import COSTS, easy_and_hard

Z = 1.959963984540054


@st.composite
def evaluations(draw) -> tuple[np.ndarray, np.ndarray, Costs]:
    """Draw correct (N, R), predictor logits (N, R) with ties, and costs in any order."""
    N, R = draw(st.integers(1, 30)), draw(st.integers(2, 5))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gflops = tuple(generator.permutation(np.arange(1, R + 1) * 0.25).tolist())
    logits_NR = generator.integers(-3, 4, (N, R)).astype(np.float32)
    return generator.random((N, R)) < 0.6, logits_NR, Costs(tuple(range(R)), gflops, 0.1)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (7, 10), (981, 1000), (10, 10)])
def test_accuracy_has_wilsons_interval(right, n):
    share = right / n
    center = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    margin = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    found = accuracy(right, n)
    assert (found.value, found.low, found.high) == pytest.approx((share, center - margin, center + margin), abs=1e-12)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (3, 9), (12, 12), (40, 21)])
def test_mcnemar_sums_the_binomial(first, second):
    total, fewer = first + second, min(first, second)
    tail = sum(math.comb(total, k) for k in range(fewer + 1)) / 2**total
    assert mcnemar_p(first, second) == pytest.approx(min(1, 2 * tail))


def test_paired_difference_is_bonett_and_prices():
    found = paired_difference(12, 30, 500)
    first, second = 13 / 502, 31 / 502
    margin = Z * math.sqrt((first + second - (first - second) ** 2) / 502)
    assert found.value == pytest.approx(-18 / 500)
    assert (found.low, found.high) == pytest.approx((first - second - margin, first - second + margin))


def test_paired_difference_is_antisymmetric_and_inside_minus_one_to_one():
    one, other = paired_difference(3, 8, 40), paired_difference(8, 3, 40)
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert paired_difference(2, 0, 2).high == 1


def test_the_interval_of_a_paired_difference_has_95_percent_coverage():
    generator = np.random.default_rng(0)
    probabilities, n = (0.03, 0.06, 0.91), 300
    draws = generator.multinomial(n, probabilities, size=3000)
    intervals = [paired_difference(int(first), int(second), n) for first, second, _ in draws]
    covered = np.mean([interval.low <= -0.03 <= interval.high for interval in intervals])
    assert 0.935 < covered < 0.97


@settings(deadline=None)
@given(evaluations())
def test_oracle_is_the_cheapest_right_resolution(evaluation):
    correct_NR, _, costs = evaluation
    found = oracle_choice(correct_NR, costs.backbone_gflops)
    by_cost = sorted(range(correct_NR.shape[1]), key=lambda j: costs.backbone_gflops[j])
    for n, row in enumerate(correct_NR):
        right = [j for j in by_cost if row[j]]
        assert found[n] == (right[0] if right else by_cost[0])


@settings(deadline=None)
@given(evaluations())
def test_no_choice_is_more_accurate_than_the_oracle_and_none_as_accurate_is_cheaper(evaluation):
    correct_NR, logits_NR, costs = evaluation
    gflops, rows = np.array(costs.backbone_gflops), np.arange(len(correct_NR))
    oracle_N = oracle_choice(correct_NR, gflops)
    best = correct_NR[rows, oracle_N].mean()
    for choice_N in [logits_NR.argmax(axis=1), *(np.full(len(rows), j) for j in range(len(gflops)))]:
        reached = correct_NR[rows, choice_N].mean()
        assert reached <= best
        if reached == best:
            assert gflops[choice_N].sum() >= gflops[oracle_N].sum() - 1e-9


def test_the_envelope_is_the_upper_hull_of_the_static_points():
    costs_S, accuracy_S = np.array([0.9, 0.1, 0.4, 0.5]), np.array([0.9, 0.5, 0.8, 0.6])
    at = np.array([0.1, 0.25, 0.4, 0.5, 0.65, 0.9, 1.5, 0.05])
    expected = [0.5, 0.65, 0.8, 0.82, 0.85, 0.9, 0.9, 0.5]
    found, (lower, upper, weight) = envelope(costs_S, np.tile(accuracy_S, (len(at), 1)), at)
    np.testing.assert_allclose(found, expected)
    assert (lower[4], upper[4]) == (2, 0)
    assert weight[4] == pytest.approx(0.5)


def test_a_dip_in_one_resolution_does_not_lower_the_envelope():
    """Joining neighbors only would make a coin that avoids the bad middle resolution look like a gain."""
    costs_S, accuracy_S = np.array([0.1, 0.4, 0.9]), np.array([0.8, 0.2, 0.9])
    found, _ = envelope(costs_S, accuracy_S[None], np.array([0.5]))
    assert found[0] == pytest.approx(0.85)


def test_points_of_equal_cost_give_the_better_one():
    assert envelope(np.array([0.4, 0.4, 0.1]), np.array([[0.9, 0.8, 0.5]]), np.array([0.4]))[0][0] == 0.9


def test_the_bootstrap_over_equal_rows_agrees_with_drawing_images():
    correct_NR, chosen_N, _ = easy_and_hard(300, skill=0.7)
    routed_N = correct_NR[np.arange(300), chosen_N]
    columns = np.column_stack([correct_NR, routed_N, np.eye(3)[chosen_N]]).astype(float)
    means_BC = bootstrap_means(columns, seed=1)
    generator = np.random.default_rng(2)
    images = generator.integers(0, 300, (4000, 300))
    slow_BC = columns[images].mean(axis=1)
    for column in range(columns.shape[1]):
        assert means_BC[:, column].mean() == pytest.approx(slow_BC[:, column].mean(), abs=3e-3)
        assert means_BC[:, column].std() == pytest.approx(slow_BC[:, column].std(), rel=0.06)
    np.testing.assert_allclose(means_BC[:, 4:].sum(axis=1), 1)


def test_the_bootstrap_depends_on_the_seed_alone():
    correct_NR, _, _ = easy_and_hard(200)
    values_NC = correct_NR.astype(float)
    order = np.random.default_rng(3).permutation(200)
    one = bootstrap_means(values_NC, 5)
    np.testing.assert_array_equal(one, bootstrap_means(values_NC[order], 5))
    assert not np.array_equal(one, bootstrap_means(values_NC, 6))


def test_balanced_accuracy_is_the_mean_over_the_classes():
    labels_N = np.array([0] * 90 + [2] * 10)
    assert balanced_accuracy(labels_N == 0, labels_N).value == pytest.approx(0.5)
    assert balanced_accuracy(np.ones(100, bool), labels_N).value == pytest.approx(1.0)


def test_the_percentile_interval_holds_95_percent():
    found = percentile_interval(0.5, np.linspace(0, 1, 100_001))
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.025, 0.975))


def rows_of(correct_NR: np.ndarray, chosen_N: np.ndarray, costs: Costs, **changed) -> tuple[dict, dict]:
    """Return rows and comparisons where each image runs once, at the chosen resolution, after a predictor."""
    ran_NR = chosen_N[:, None] == np.arange(correct_NR.shape[1])
    routed = {ALL: Routed(ran_NR, chosen_N, np.ones(len(chosen_N), bool))}
    labels_N = np.arange(len(chosen_N)) % 4
    held_out = HeldOut(labels_N, correct_NR, None, "before joint", routed, costs)
    held_out = dataclasses.replace(held_out, **changed)
    rows = table_rows(held_out, {ALL: "routed"} | {kind: kind for kind in held_out.routed if kind != ALL})
    return {row["id"]: row for row in rows}, compare(held_out, rows)


def test_every_row_equals_a_loop_over_the_images():
    correct_NR, chosen_N, _ = easy_and_hard(400, skill=0.6)
    rows, compared = rows_of(correct_NR, chosen_N, COSTS)
    right, spent, expected_random = 0, 0.0, 0.0
    share = [sum(int(choice) == j for choice in chosen_N) / 400 for j in range(3)]
    for n in range(400):
        right += int(correct_NR[n, chosen_N[n]])
        spent += COSTS.backbone_gflops[chosen_N[n]]
        expected_random += sum(share[j] * int(correct_NR[n, j]) for j in range(3))
    assert rows["routed"]["top1"] == right / 400
    assert rows["routed"]["mean_gflops"] == pytest.approx(spent / 400 + 0.03)
    assert rows["random"]["top1"] == pytest.approx(expected_random / 400)
    assert rows["random"]["mean_gflops"] == rows["routed"]["mean_gflops"]
    assert rows["routed"]["shares"] == rows["random"]["shares"] == pytest.approx(share)
    for j, side in enumerate(COSTS.resolutions):
        static = rows[f"static-{side}"]
        assert (static["top1"], static["mean_gflops"]) == (correct_NR[:, j].mean(), COSTS.backbone_gflops[j])
        found = compared[f"static-{side}"]
        only_routed = sum(bool(correct_NR[n, chosen_N[n]] and not correct_NR[n, j]) for n in range(400))
        assert found["only_routed_right"] == only_routed
        assert found["difference_points"] == pytest.approx(100 * (rows["routed"]["top1"] - static["top1"]))
        assert found["gflops_ratio"] == pytest.approx(rows["routed"]["mean_gflops"] / static["mean_gflops"])
        assert found["low_points"] < found["difference_points"] < found["high_points"]


def test_the_envelope_row_costs_what_the_routed_network_costs():
    correct_NR, chosen_N, _ = easy_and_hard(400)
    rows, compared = rows_of(correct_NR, chosen_N, COSTS)
    line, routed = rows["envelope"], rows["routed"]
    assert line["mean_gflops"] == pytest.approx(routed["mean_gflops"])
    static = np.array([rows[f"static-{side}"]["top1"] for side in COSTS.resolutions])
    (expected,), _ = envelope(np.array(COSTS.backbone), static[None], np.array([routed["mean_gflops"]]))
    assert line["top1"] == pytest.approx(expected)
    assert line["label"].startswith("envelope, static ")
    gain = compared["envelope"]
    assert gain["difference_points"] == pytest.approx(100 * (routed["top1"] - expected))
    assert gain["low_points"] < gain["difference_points"] < gain["high_points"]
    assert line["top1_low"] < line["top1"] < line["top1_high"]


def test_the_envelope_at_a_static_resolution_has_its_name():
    """All images run at 64 px, which is on the envelope."""
    correct_NR = np.arange(400)[:, None] % 10 < np.array([9, 8, 3])
    chosen_N = np.ones(400, np.int64)
    alone = Routed(chosen_N[:, None] == np.arange(3), chosen_N, np.zeros(400, bool))
    rows, _ = rows_of(correct_NR, chosen_N, COSTS, routed={ALL: alone})
    assert rows["routed"]["mean_gflops"] == pytest.approx(0.4)
    assert rows["envelope"]["label"] == "static 64 px"


def test_the_envelope_ends_at_the_most_expensive_static_resolution():
    correct_NR, _, _ = easy_and_hard(200)
    rows, compared = rows_of(correct_NR, np.zeros(200, np.int64), COSTS)
    assert rows["envelope"]["label"] == "static 96 px"
    assert rows["envelope"]["mean_gflops"] == 0.9 < rows["routed"]["mean_gflops"]
    assert compared["envelope"]["difference_points"] == 0


def test_the_network_before_the_joint_stage_counts_as_static_too():
    correct_NR, chosen_N, _ = easy_and_hard(300)
    rows, compared = rows_of(correct_NR, chosen_N, COSTS, other_NR=np.ones((300, 3), bool))
    assert rows["other-96"]["label"] == "static 96 px before joint"
    assert (rows["other-32"]["top1"], rows["other-32"]["mean_gflops"]) == (1.0, 0.1)
    assert rows["envelope"]["top1"] == 1.0
    assert compared["other-64"]["difference_points"] < 0


def test_a_cascade_pays_for_every_pass():
    correct_NR, chosen_N, _ = easy_and_hard(300)
    predictor = Routed(chosen_N[:, None] == np.arange(3), chosen_N, np.ones(300, bool))
    cascade = Routed(np.arange(3) >= chosen_N[:, None], chosen_N, np.zeros(300, bool))
    rows, compared = rows_of(correct_NR, chosen_N, COSTS, routed={ALL: predictor, "cascade": cascade})
    paid = np.array([1.4, 0.5, 0.1])[chosen_N].mean()
    assert rows["policy-cascade"]["mean_gflops"] == pytest.approx(paid)
    assert rows["policy-cascade"]["top1"] == rows["routed"]["top1"]
    assert compared["policy-cascade"]["difference_points"] == 0
    assert compared["policy-cascade"]["gflops_ratio"] == pytest.approx(rows["routed"]["mean_gflops"] / paid)


def test_one_resolution_has_its_static_row_alone():
    costs = Costs((96,), (0.9,), 0.03)
    correct_N1, zeros = np.array([[True], [False]]), np.zeros(2, np.int64)
    rows = table_rows(HeldOut(zeros, correct_N1, None, "", {}, costs), {})
    assert [(row["id"], row["top1"], row["mean_gflops"]) for row in rows] == [("static-96", 0.5, 0.9)]


@settings(deadline=None, max_examples=60)
@given(evaluations())
def test_every_point_of_the_budget_curve_matches_its_bias(evaluation):
    correct_NR, logits_NR, costs = evaluation
    rows, gflops = np.arange(len(correct_NR)), np.array(costs.backbone_gflops)
    for point in budget_curve(logits_NR, correct_NR, costs, max_points=1000):
        if point["budget_bias"] == 0:
            continue
        choice_N = biased_choice(logits_NR, costs, point["budget_bias"])
        assert point["top1"] == pytest.approx(correct_NR[rows, choice_N].mean())
        assert point["mean_gflops"] == pytest.approx(gflops[choice_N].mean() + 0.1)
        assert point["shares"] == pytest.approx(shares(choice_N, len(gflops)).tolist())
        right_N, routed_N = (correct_NR[rows, picked] for picked in (choice_N, biased_choice(logits_NR, costs, 0)))
        assert point["top1_low"] <= point["top1"] <= point["top1_high"]
        wilson = accuracy(int(right_N.sum()), len(rows))
        assert (point["top1_low"], point["top1_high"]) == (wilson.low, wilson.high)
        only_it, only_routed = int((right_N & ~routed_N).sum()), int((routed_N & ~right_N).sum())
        expected = paired_difference(only_it, only_routed, len(rows))
        found = (point["difference_points"], point["low_points"], point["high_points"])
        assert found == pytest.approx(tuple(100 * end for end in (expected.value, expected.low, expected.high)))


@settings(deadline=None, max_examples=60)
@given(evaluations(), st.floats(-40, 40))
def test_no_bias_reaches_a_point_that_the_budget_curve_lacks(evaluation, bias):
    correct_NR, logits_NR, costs = evaluation
    biased_NR = logits_NR.astype(np.float64) + bias * np.array(costs.relative)
    ordered_NR = np.sort(biased_NR, axis=1)
    assume((ordered_NR[:, -1] - ordered_NR[:, -2]).min() > 1e-9)  # at a tie either choice is valid
    choice_N = biased_NR.argmax(axis=1)
    trade = (correct_NR[np.arange(len(choice_N)), choice_N].mean(), *shares(choice_N, correct_NR.shape[1]))
    curve = budget_curve(logits_NR, correct_NR, costs, max_points=1000)
    reachable = np.array([(point["top1"], *point["shares"]) for point in curve])
    assert np.isclose(reachable, trade).all(axis=1).any()


def test_the_budget_curve_runs_from_cheapest_to_most_expensive_through_the_routed_network():
    correct_NR, chosen_N, _ = easy_and_hard(500, skill=0.8)
    logits_NR = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32) + 2 * np.eye(3)[chosen_N]
    logits_NR = logits_NR.astype(np.float32)
    curve = budget_curve(logits_NR, correct_NR, COSTS, max_points=30)
    costs = [point["mean_gflops"] for point in curve]
    assert costs == sorted(costs)
    assert len(curve) in (30, 31)
    assert max(np.diff(costs)) < 1.5 * (costs[-1] - costs[0]) / 29
    assert (curve[0]["shares"], curve[-1]["shares"]) == ([0, 0, 1], [1, 0, 0])
    (here,) = [point for point in curve if point["budget_bias"] == 0]
    routed_N = logits_NR.argmax(axis=1)
    assert here["top1"] == correct_NR[np.arange(500), routed_N].mean()
    assert here["shares"] == pytest.approx(shares(routed_N, 3).tolist())


def test_equal_predictor_logits_give_only_the_ends_of_the_curve():
    curve = budget_curve(np.zeros((4, 2), np.float32), np.ones((4, 2), bool), Costs((64, 32), (0.4, 0.1), 0.0))
    assert [point["shares"] for point in curve] == [[0, 1], [1, 0]]
    assert curve[1]["budget_bias"] == 0


@pytest.mark.parametrize("steps", [None, 17], ids=["continuous", "on the bounds"])
def test_attributes_are_described_by_choice_and_by_bins(steps):
    correct_NR, chosen_N, height_N = easy_and_hard(800)
    if steps:
        height_N = np.floor(height_N * steps)
    found = by_attribute(height_N, correct_NR, chosen_N, COSTS)
    for j, part in enumerate(found["by_chosen"]):
        assert part["resolution"] == COSTS.resolutions[j]
        assert (part["n"], part["mean"]) == ((chosen_N == j).sum(), pytest.approx(height_N[chosen_N == j].mean()))
    assert found["spearman"] < -0.8
    assert sum(part["n"] for part in found["bins"]) == 800
    for part in found["bins"]:
        last = part is found["bins"][-1]
        inside = [n for n in range(800) if part["low"] <= height_N[n] and (height_N[n] < part["high"] or last)]
        assert len(inside) == part["n"]
        assert part["routed_top1"] == pytest.approx(np.mean([correct_NR[n, chosen_N[n]] for n in inside]))
        assert part["static_top1"] == pytest.approx(correct_NR[inside].mean(axis=0).tolist())
        assert part["shares"] == pytest.approx([np.mean(chosen_N[inside] == j) for j in range(3)])
    if not steps:
        assert [part["n"] for part in found["bins"]] == [100] * MAX_BINS


def test_an_attribute_of_few_values_has_a_bin_for_each():
    values_N = np.array([0.0, 1.0, 1.0, 0.0, 0.33])
    correct_NR, chosen_N = np.ones((5, 3), bool), np.array([0, 1, 1, 0, 0])
    found = by_attribute(values_N, correct_NR, chosen_N, COSTS)
    assert [(part["low"], part["high"], part["n"]) for part in found["bins"]] == [(0, 0, 2), (0.33, 0.33, 1), (1, 1, 2)]
    assert found["by_chosen"][2] == {"resolution": 32, "n": 0, "mean": None, "median": None}


def test_a_constant_attribute_or_choice_has_no_rank_correlation():
    correct_NR, varied = np.ones((40, 3), bool), np.arange(40.0)
    assert by_attribute(np.ones(40), correct_NR, np.arange(40) % 3, COSTS)["spearman"] is None
    assert by_attribute(varied, correct_NR, np.zeros(40, np.int64), COSTS)["spearman"] is None


def test_a_mean_of_few_seeds_has_students_interval():
    """For three seeds the factor is 4.30, not 1.96."""
    found = mean_of([1.0, 2.0, 3.0])
    assert (found.value, found.high - found.value) == pytest.approx((2.0, 4.3026527 / math.sqrt(3)))
    assert mean_of([1.0]) is None
    # Without noise of the images, an interval over images and seeds is that of the seeds.
    values_SN = np.tile(np.array([[0.5], [0.6], [0.7]]), 50)
    assert mean_over_seeds(values_SN).high == pytest.approx(0.6 + 4.3026527 * 0.1 / math.sqrt(3))


def test_with_balanced_accuracy_every_comparison_weighs_the_classes():
    """A tenth of the images is of the class that only 96 px gets right."""
    labels_N = (np.arange(400) % 10 == 0).astype(np.int64)
    correct_NR = np.column_stack([np.ones(400, bool), labels_N == 0, labels_N == 0])
    rows, compared = rows_of(correct_NR, np.full(400, 1), COSTS, labels_N=labels_N, balanced=True)
    assert (rows["routed"]["top1"], rows["routed"]["balanced_top1"]) == (0.9, pytest.approx(0.5))
    assert rows["routed"]["balanced_low"] < 0.5 < rows["routed"]["balanced_high"]
    assert (rows["random"]["top1"], rows["random"]["balanced_top1"]) == (pytest.approx(0.9), pytest.approx(0.5))
    lost = compared["static-96"]
    assert lost["difference_points"] == pytest.approx(-50)
    assert lost["low_points"] < -50 < lost["high_points"] < -30
    assert lost["mcnemar_p"] is None
    # Mixing 32 and 96 px at the cost of 64 px and the predictor gets more of the rare class.
    assert compared["envelope"]["difference_points"] == pytest.approx(-50 * (0.43 - 0.1) / 0.8)
    assert compared["envelope"]["high_points"] < 0
    assert rows_of(correct_NR, np.full(400, 1), COSTS, labels_N=labels_N)[1]["static-96"]["difference_points"] == -10


def test_a_placebo_oracle_has_the_luck_of_as_many_crops():
    correct_NR = np.array([[False, True, False], [False, False, False], [True, False, False], [False, False, False]])
    placebo_NV = np.array([[False, True], [False, False], [False, False], [True, True]])
    rows, _ = rows_of(correct_NR, np.zeros(4, np.int64), COSTS, placebo_NV=placebo_NV)
    assert (rows["oracle"]["top1"], rows["placebo"]["top1"], rows["static-96"]["top1"]) == (0.5, 0.75, 0.25)
    assert rows["placebo"]["label"] == "placebo oracle, 3 crops at 96 px"
    assert rows["placebo"]["mean_gflops"] == rows["static-96"]["mean_gflops"]
    assert "placebo" not in rows_of(correct_NR, np.zeros(4, np.int64), COSTS)[0]


def test_a_predictor_pays_where_it_is_proven_better_than_every_cascade():
    correct_NR, chosen_N, _ = easy_and_hard(600)
    held_out = HeldOut(np.zeros(600, np.int64), correct_NR, None, "", {}, COSTS)
    good = Routed(chosen_N[:, None] == np.arange(3), chosen_N, np.ones(600, bool))
    bad = [Routed(np.eye(3, dtype=bool)[[j] * 600], np.full(600, j), np.zeros(600, bool)) for j in (2, 1, 0)]
    curves, costs_C = {"cascade": bad, "predictor": [bad[0], good, good]}, np.array([0.1, 0.4, 0.9])
    found = predictor_gains(held_out, curves, costs_C)
    # At 0.1 no predictor runs. At 0.9 a cascade is as accurate.
    assert [point["highest_cost"] for point in found["points"]] == [0.4, 0.9]
    assert (found["pays_from"], found["pays_to"]) == (0.4, 0.4)
    gain, right_N = found["points"][0], good.correct_N(correct_NR)
    cost = (chosen_N[:, None] == np.arange(3)).mean(axis=0) @ np.array(COSTS.backbone) + COSTS.predictor
    best, _ = envelope(np.array(COSTS.backbone), correct_NR.mean(axis=0)[None], np.array([cost]))
    assert gain["difference_points"] == pytest.approx(100 * (right_N.mean() - best[0]))
    one = paired_difference(*discordant(right_N, correct_NR[:, 1]))
    assert gain["high_points"] - gain["low_points"] > 100 * (one.high - one.low), "two intervals hold at once"
    assert predictor_gains(held_out, curves | {"predictor": bad}, costs_C)["points"] == []


def test_a_predictor_that_tosses_a_coin_does_not_pay():
    """It fills the gap between two static resolutions, where there is no cascade, and so does drawing at random."""
    correct_NR, _, _ = easy_and_hard(3000)
    coin_N = np.random.default_rng(0).integers(0, 2, 3000)
    coin = Routed(coin_N[:, None] == np.arange(3), coin_N, np.ones(3000, bool))
    cheap = Routed(np.eye(3, dtype=bool)[[2] * 3000], np.full(3000, 2), np.zeros(3000, bool))
    held_out = HeldOut(np.zeros(3000, np.int64), correct_NR, None, "", {}, COSTS)
    assert coin.correct_N(correct_NR).mean() > correct_NR[:, 2].mean() + 0.1
    found = predictor_gains(held_out, {"cascade": [cheap], "predictor": [coin]}, np.array([0.7]))
    assert found["pays_from"] is None
