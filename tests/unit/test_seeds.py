"""Tests of the table over several seeds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jobs.compare import pairs
from pipeline.evaluation.gate import Answers
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.report import build_report
from pipeline.evaluation.seeds import SUMMARIZED, pairs_markdown, seeds_markdown, summarize_seeds
from pipeline.models.cost import Costs
from tests.unit.evaluation_cases import CLASSES, CONTEXT, PERFECT, SIDES, easy_and_hard, evaluation_of, report_of


def seed_reports() -> list[dict]:
    found = []
    for seed in range(3):
        correct_NR, chosen_N, _ = easy_and_hard(500, skill=0.9, seed=seed)
        found.append(report_of(correct_NR, chosen_N, name=f"glyphs-{seed}"))
    return found


def test_seeds_are_summarized_by_mean_and_spread():
    reports = seed_reports()
    summary = summarize_seeds(reports)
    gains = [report["comparisons"]["envelope"]["difference_points"] for report in reports]
    found = summary["summary"]["gain_over_line_points"]
    assert found["mean"] == pytest.approx(sum(gains) / 3)
    assert found["std"] == pytest.approx((sum((gain - found["mean"]) ** 2 for gain in gains) / 2) ** 0.5)
    assert (found["min"], found["max"]) == (min(gains), max(gains))
    assert set(summary["summary"]) == set(SUMMARIZED)
    assert [row["name"] for row in summary["rows"]] == ["glyphs-0", "glyphs-1", "glyphs-2"]
    json.dumps(summary, allow_nan=False)
    lines = seeds_markdown(summary).splitlines()
    assert len(lines) == 2 + 3 + 1
    margin = 4.3026527 * found["std"] / 3**0.5
    assert (found["low"], found["high"]) == pytest.approx((found["mean"] - margin, found["mean"] + margin))
    assert f"{found['mean']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})" in lines[-1]


def test_balanced_reports_are_summarized_by_balanced_accuracy():
    correct_NR, chosen_N, _ = easy_and_hard(500, skill=0.9)
    labels_N = np.arange(500) % 3 % 2  # two thirds of the images are of class 0
    logits_NRK = np.eye(2, dtype=np.float32)[np.where(correct_NR, labels_N[:, None], 1 - labels_N[:, None])]
    predictor_NR = np.eye(3, dtype=np.float32)[chosen_N]
    evaluation = evaluation_of(Predictions(SIDES, labels_N, np.arange(500), logits_NRK, predictor_NR))
    object.__setattr__(evaluation, "balanced", True)
    report = build_report(evaluation, classes=CLASSES[:2], attributes={}, name="run", context=CONTEXT)
    summary = summarize_seeds([report])
    rows, (row,) = {row["id"]: row for row in report["rows"]}, summary["rows"]
    for name, other in (("routed", "routed"), ("best_static", report["best_static"]), ("oracle", "oracle")):
        assert row[f"{name}_accuracy"] == rows[other]["balanced_top1"] != rows[other]["top1"]
    assert row["difference_points"] == pytest.approx(100 * (row["routed_accuracy"] - row["best_static_accuracy"]))
    assert seeds_markdown(summary).startswith("Accuracy is the mean over the classes here.\n\n| run |")


def test_one_seed_has_no_spread():
    summary = summarize_seeds(seed_reports()[:1])
    assert [summary["summary"]["routed_accuracy"][key] for key in ("std", "low", "high")] == [None] * 3
    assert " to " not in seeds_markdown(summary).splitlines()[-1]


def test_reports_of_different_runs_are_rejected():
    reports = seed_reports()
    other = report_of(*PERFECT, context=CONTEXT | {"dataset": "elpv"})
    with pytest.raises(ValueError, match=r"different runs.*elpv.*glyphs"):
        summarize_seeds([*reports, other])
    with pytest.raises(ValueError, match=r"by gflops and balanced_top1; glyphs.* by gflops and top1\."):
        summarize_seeds([*reports, reports[0] | {"compared_by": "balanced_top1"}])
    with pytest.raises(ValueError, match="no report"):
        summarize_seeds([])
    single = report_of(np.ones((50, 1), bool), np.zeros(50, np.int64), costs=Costs((96,), (0.9,), 0.0))
    with pytest.raises(ValueError, match="one resolution"):
        summarize_seeds([single])


def answers_of(wrong: range, held_out: range = range(1000), gflops: float = 1.0, digest: str = "d") -> Answers:
    return Answers(digest, np.asarray(held_out), ~np.isin(np.asarray(held_out), wrong), gflops)


def test_runs_of_other_resolutions_are_compared_on_the_images_that_both_are_stated_on():
    """The first run reports on a half; what the static one gets wrong on the other half does not count."""
    routed, static = answers_of(range(0), range(500), 0.4), answers_of(range(490, 800), gflops=0.5)
    other = answers_of(range(480, 800), gflops=0.5)
    lines = pairs_markdown([("a", routed, "b", static), ("a1", routed, "b1", other)]).splitlines()
    assert "| a | 100.00 % at 0.400 | b | 98.00 % at 0.50 | 500 | +2.00 (" in lines[2]
    assert lines[2].endswith("| 0.002 | 0.80 |")
    assert "| **mean of 2 pairs** |  |  |  | **500** | **+3.00 (" in lines[-1]
    # Two seeds that differ by 2 points: Student's t with about one degree of freedom.
    low = float(lines[-1].split("+3.00 (")[1].split(" to ")[0])
    assert low < 0
    with pytest.raises(ValueError, match=r"a and b cannot be compared: they were evaluated on different data"):
        pairs_markdown([("a", routed, "b", answers_of(range(0), digest="e"))])
    elsewhere = [answers_of(range(0), digest="e"), answers_of(range(9), digest="e")]
    with pytest.raises(ValueError, match=r"on different data \(digests d, e\), so they have no common mean"):
        pairs_markdown([("a", routed, "b", static), ("c", elsewhere[0], "d", elsewhere[1])])
    with pytest.raises(ValueError, match="their reports have no image in common"):
        pairs_markdown([("a", routed, "b", answers_of(range(0), range(500, 1000)))])


def test_pairs_need_as_many_runs_with_answers(tmp_path):
    with pytest.raises(ValueError, match="2 runs and 1 after --against"):
        pairs([tmp_path / "a", tmp_path / "b"], [tmp_path / "c"])
    with pytest.raises(ValueError, match=r"answers\.npz missing"):
        pairs([tmp_path / "a"], [tmp_path / "c"])
