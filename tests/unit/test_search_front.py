from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.statistics import mean_over_seeds
from pipeline.policies.fit import pareto
from pipeline.search.front import (
    budget_alias,
    budget_score,
    choose_item,
    dominates,
    hypervolume,
    spread,
    summarize,
)
from pipeline.search.records import Record, Records, choice_letters
from tests.search_cases import candidate_of, config_of, correct_of, record_of

Point = tuple[float, float]
POINTS = st.lists(st.tuples(st.integers(0, 6).map(float), st.integers(1, 6).map(float)), min_size=1, max_size=12)


def itself(point: Point) -> Point:
    return point


@given(POINTS)
def test_the_front_holds_the_points_that_no_other_dominates(points: list[Point]):
    front = pareto(points, itself)
    assert set(front) == {one for one in points if not any(dominates(other, one) for other in points)}
    assert [cost for _, cost in front] == sorted({cost for _, cost in front}), "cheapest first, each cost once"


@given(POINTS)
def test_the_hypervolume_equals_the_area_counted_in_cells(points: list[Point]):
    """The slow reference counts the unit cells that a point covers from the reference (0, 7) on."""
    cells = sum(
        any(value >= row + 1 and cost <= column for value, cost in points) for row in range(7) for column in range(7)
    )
    assert hypervolume(points, (0.0, 7.0)) == cells


@given(POINTS, st.integers(1, 4))
def test_a_spread_is_a_part_of_the_front(points: list[Point], count: int):
    front, taken = pareto(points, itself), spread(points, itself, count)
    assert len(taken) == min(count, len(front))
    assert set(taken) <= set(front)
    assert spread(points, itself, len(front)) == front


def test_a_spread_keeps_the_knee_first_and_then_the_most_accurate():
    points = [(0.70, 1.0), (0.95, 1.2), (0.955, 2.0), (0.96, 4.0)]
    assert spread(points, itself, 1) == [(0.95, 1.2)]
    assert spread(points, itself, 2) == [(0.95, 1.2), (0.96, 4.0)], "then the most accurate, even if that end is flat"


def test_the_choice_by_budget_and_by_accuracy():
    points = [(0.90, 1.0), (0.95, 2.0), (0.96, 3.0), (0.96, 2.9)]
    assert choose_item(points, itself, budget_gflops=2.5) == (0.95, 2.0)
    assert choose_item(points, itself, budget_gflops=9.0) == (0.96, 2.9), "the cheapest of equally accurate ones"
    assert choose_item(points, itself, lowest_accuracy=0.955) == (0.96, 2.9)
    assert choose_item(points, itself, budget_gflops=2.5, lowest_accuracy=0.90) == (0.90, 1.0)
    assert choose_item(points, itself, budget_gflops=0.5) is None
    assert choose_item([], itself) is None


def test_each_percent_above_a_budget_costs_a_point():
    assert budget_score({"accuracy_routed": 0.9, "gflops_routed": 1.0}, 2.0) == 0.9
    assert budget_score({"accuracy_routed": 0.9, "gflops_routed": 2.2}, 2.0) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("search", "alias"),
    [
        ({"budget_gflops": 0.013}, "under-13-mflops"),
        ({"budget_gflops": 3.0}, "under-3000-mflops"),
        ({"max_accuracy_drop": 0.5}, "within-0-5-points"),
        ({"budget_gflops": 0.0125, "max_accuracy_drop": 1}, "under-12-5-mflops-within-1-points"),
    ],
)
def test_an_alias_names_its_budget(search: dict[str, float], alias: str):
    assert budget_alias(config_of(Path(), **search).search) == alias


def test_intervals_of_means_over_seeds_cover_the_truth():
    """About 95 % of the intervals of 400 draws of images and seeds contain the true value."""
    generator, covered = np.random.default_rng(0), 0
    for _ in range(400):
        seeds_S1 = generator.normal(0.8, 0.02, (8, 1))
        estimate = mean_over_seeds((generator.random((8, 400)) < seeds_S1).astype(float))
        covered += estimate.low <= 0.8 <= estimate.high
    assert 0.90 <= covered / 400 <= 0.99


def test_a_summary_covers_all_seeds_and_a_difference_the_shared_ones():
    first, second = candidate_of(), candidate_of(kernel=5)
    records = [record_of(first, 0.9, seed) for seed in (0, 1)] + [record_of(second, 0.1, seed) for seed in (0, 1, 2)]
    records.append(record_of(candidate_of(kernel=3), outcome="diverged", choices=""))
    found = summarize(records, correct_of())
    assert set(found) == {first, second}
    assert found[second].num_seeds == 3
    assert found[first].accuracy.value == pytest.approx(np.mean([record.accuracy for record in records[:2]]))
    assert found[first].gflops == pytest.approx(np.mean([record.gflops for record in records[:2]]))
    difference = found[first].minus(found[second])
    assert difference.value == pytest.approx(
        np.mean([found[first].correct_SN[n].mean() - found[second].correct_SN[n].mean() for n in range(2)])
    )
    assert difference.low < difference.value < difference.high
    equal = found[first].minus(found[first])
    assert (equal.low, equal.value, equal.high) == (0, 0, 0)


def test_records_are_found_again_with_their_weights(tmp_path: Path):
    records, record = Records(tmp_path / "trials"), record_of(candidate_of(), 0.3)
    assert records.find("context", record.candidate, 0) is None
    records.write(record, {"weight": torch.ones(2)})
    records.write(record_of(candidate_of(kernel=5), outcome="collapsed", reason="all to 48 px"))
    assert records.find("context", record.candidate, 0) == record
    assert records.find("context", record.candidate, 1) is None
    assert torch.equal(torch.load(records.weights(record), weights_only=True)["weight"], torch.ones(2))
    found = records.read("context")
    assert {one.outcome for one in found} == {"finished", "collapsed"}
    assert records.read("another") == []


def test_a_damaged_record_is_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    records = Records(tmp_path)
    records.write(record_of(candidate_of()))
    (tmp_path / "torn.json").write_text('{"format": 1, "cont')
    assert len(records.read("context")) == 1
    assert "torn.json is not a record of a trial" in caplog.text


def test_choices_survive_as_letters():
    chosen_N = np.array([0, 2, 1, 25])
    record = Record("c", candidate_of(), 0, "finished", choices=choice_letters(chosen_N))
    assert record.choices == "acbz"
    assert record.chosen_N.tolist() == chosen_N.tolist()
