"""Tests of the table over several seeds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.evaluation.seeds import SUMMARIZED, seeds_markdown, summarize_seeds
from pipeline.models.cost import Costs
from tests.unit.evaluation_cases import CONTEXT, PERFECT, easy_and_hard, report_of


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
    assert f"{found['mean']:+.1f} ± {found['std']:.1f}" in lines[-1]


def test_one_seed_has_no_spread():
    summary = summarize_seeds(seed_reports()[:1])
    assert summary["summary"]["routed_top1"]["std"] is None
    assert "±" not in seeds_markdown(summary)


def test_reports_of_different_runs_are_rejected():
    other = report_of(*PERFECT, context=CONTEXT | {"dataset": "elpv"})
    with pytest.raises(ValueError, match=r"different runs.*elpv.*glyphs"):
        summarize_seeds([*seed_reports(), other])
    with pytest.raises(ValueError, match="no report"):
        summarize_seeds([])
    single = report_of(np.ones((50, 1), bool), np.zeros(50, np.int64), costs=Costs((96,), (0.9,), 0.0))
    with pytest.raises(ValueError, match="one resolution"):
        summarize_seeds([single])
