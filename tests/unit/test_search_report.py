"""The report of a search, built from records alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation.comparison import result_row
from pipeline.evaluation.statistics import Estimate, oracle_choice
from pipeline.evaluation.style import DARK
from pipeline.models.cost import Costs
from pipeline.policies.calibrate import Budget, Calibration, Split, calibrate
from pipeline.policies.route import Images
from pipeline.search.figures import draw_search_figures
from pipeline.search.front import parameter_importance
from pipeline.search.records import Record, choice_letters
from pipeline.search.report import Finetuned, build_search_report, render_search, verdict, write_search_report
from pipeline.search.space import Candidate, paper_candidates, space_of
from tests.search_cases import BACKBONE_GFLOPS, config_of, correct_of, record_of

CONFIG = config_of(Path(), preset="full", seeds=2)
SPACE_OF = space_of(CONFIG, BACKBONE_GFLOPS)
HEADLINE = result_row("routed", "routed", "routed", 200, Estimate(0.88, 0.83, 0.92), "wilson")
TUNED = {
    "headline": HEADLINE | {"mean_gflops": 0.0025, "mean_cost": 0.0025},
    "costs": {"predictor_gflops": 0.0001},
    "verdict": "fine",
}


def drawn(number: int) -> Candidate:
    """A candidate whose alpha decides how many images go to the first resolution."""
    generator = np.random.default_rng(number)
    values: dict[str, Any] = {"blocks": ["0", "1", "1-1"][number % 3], "kernel": [3, 5][number % 2]}
    values |= {"stem_stride": 2, "input_size": 16, "width": 0.125}
    values |= {"alpha_gflops": 0.0015 + 0.0001 * number, "eta": 1.0, "tau": 1.0}
    return SPACE_OF.candidate(values | {"lr": float(generator.uniform(0.02, 0.1))})


def records() -> list[Record]:
    """Fifteen drawn trials, two failures, and the paper's four and a finalist with two seeds."""
    found = [record_of(drawn(number), number / 14) for number in range(15)]
    found += [record_of(candidate, 0.5, seed) for candidate in paper_candidates(CONFIG).values() for seed in (0, 1)]
    found.append(record_of(drawn(7), 0.5, 1))
    reason = "training diverged | at <once>"
    nothing: dict[str, Any] = {"accuracy": None, "gflops": None, "shares": (), "choices": ""}
    found.append(record_of(drawn(15), 0.5, outcome="diverged", reason=reason, **nothing))
    found.append(record_of(drawn(16), 1.0, outcome="collapsed", reason="all to 48 px"))
    return found


def report_of(found: list[Record], **changed: Any) -> dict[str, Any]:
    tuned = Finetuned(drawn(7), CONFIG, TUNED)
    failed = Finetuned(drawn(8), CONFIG, None, "it diverged")
    given: dict[str, Any] = {"finetuned": [tuned, failed], "chosen": tuned, "context": {"dataset": "cases"}}
    return build_search_report(
        found, correct_of(), config=CONFIG, space=SPACE_OF, backbone_gflops=BACKBONE_GFLOPS, **(given | changed)
    )


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return report_of(records())


def test_every_trial_is_in_the_report_with_its_reason(report: dict[str, Any]) -> None:
    assert len(report["trials"]) == 26
    bad = {row["outcome"]: row["reason"] for row in report["trials"] if row["outcome"] != "finished"}
    assert bad == {"diverged": "training diverged | at <once>", "collapsed": "all to 48 px"}
    trials = {row["id"]: row for row in report["trials"]}
    front = [trials[key] for key in report["front"]]
    assert all(row["seed"] == 0 and row["outcome"] == "finished" for row in front)
    for row in report["trials"]:
        if row["top1"] is not None:
            assert row["top1_low"] < row["top1"] < row["top1_high"]
            assert (
                row["outcome"] == "collapsed"
                or any(one["top1"] >= row["top1"] and one["mean_gflops"] <= row["mean_gflops"] for one in front)
                or row["seed"] != 0
            )


def test_means_and_totals_equal_those_of_the_records(report: dict[str, Any]) -> None:
    found = records()
    assert [row["label"] for row in report["compared"] if row["paper"] is None] == ["A"]
    row = next(row for row in report["compared"] if row["label"] == "A")
    mine = [record for record in found if record.candidate == drawn(7)]
    assert row["top1"] == pytest.approx(np.mean([record.accuracy for record in mine]))
    assert row["mean_gflops"] == pytest.approx(np.mean([record.gflops for record in mine]))
    assert row["top1_low"] < row["top1"] < row["top1_high"]
    shares, correct_NR = np.asarray(row["shares"]), correct_of()
    assert row["random"]["top1"] == pytest.approx(float(shares @ correct_NR.mean(axis=0)))
    *statics, oracle = report["rows"]
    assert [static["top1"] for static in statics] == pytest.approx(correct_NR.mean(axis=0))
    assert [static["mean_gflops"] for static in statics] == pytest.approx(BACKBONE_GFLOPS)
    assert oracle["top1"] == pytest.approx(correct_NR.any(axis=1).mean())


def test_a_finalist_that_is_better_and_cheaper_dominates() -> None:
    correct_NR, first = correct_of(), drawn(7)
    best_N = oracle_choice(correct_NR, BACKBONE_GFLOPS)
    perfect: dict[str, Any] = {"choices": choice_letters(best_N), "accuracy": float(correct_NR.any(axis=1).mean())}
    found = [record for record in records() if record.candidate != first]
    found += [record_of(first, 0.3, seed, **perfect) for seed in (0, 1)]
    report = report_of(found, chosen=None, finetuned=[])
    assert [row["dominated_by"] for row in report["against_paper"]] == ["A"] * 4
    assert all(row["low_points"] > 0 and row["gflops_ratio"] < 1 for row in report["against_paper"])
    assert verdict(report) == "Finalists dominate numbers 1, 2, 3 and 4 of the paper's four."


def test_files_are_written_and_figures_can_be_opened(tmp_path: Path) -> None:
    tuned = Finetuned(drawn(7), CONFIG, TUNED)
    report = report_of(records(), chosen=tuned, finetuned=[tuned])
    write_search_report(tmp_path / "report", report)
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
    text = (tmp_path / "report" / "report.md").read_text()
    assert "training diverged \\| at &lt;once>" in text
    assert "| paper 3 |" in text
    assert text.startswith("# Search: run\n\n**Deploy A (")
    for name, picture in draw_search_figures(report, DARK).items():
        assert f"({name}.png)" in text
        assert min(Image.open(io.BytesIO(picture)).size) > 300
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.json",
        "report.md",
        "front.png",
        "importance.png",
    }
    write_search_report(tmp_path / "report", report | {"importance": []})
    assert not (tmp_path / "report" / "importance.png").exists()


def test_a_choice_that_a_static_resolution_dominates_is_reported_first(report: dict[str, Any]) -> None:
    *_, static, _ = report["rows"]
    worse = {"top1": static["top1"] - 0.01, "mean_gflops": static["mean_gflops"]}
    for changed, static_wins in ((worse, True), (worse | {"top1": 1.0}, False)):
        changed_report = report | {"chosen": report["chosen"] | changed}
        text = verdict(changed_report)
        assert text.startswith("Static wins: ") is static_wins
        assert "A (" in text
        assert "- The finetuned model against its own static resolutions: fine\n" in render_search(changed_report, ())


def test_a_choice_is_compared_with_static_resolutions_on_its_own_images() -> None:
    """The finetuned runs report on the half of the images that no policy is chosen on."""
    halves = calibrate(images_of(0.3), KEYS_N, Budget(), Split(cross_fit_below=100))
    own = correct_of()[halves.held_out].mean(axis=0)[0]
    every = correct_of().mean(axis=0)[0]
    assert own < every
    chosen = {**TUNED, "headline": HEADLINE | {"top1": (own + every) / 2, "mean_gflops": BACKBONE_GFLOPS[0]}}
    tuned = Finetuned(drawn(7), CONFIG, chosen)
    report = report_of(records(), chosen=tuned, finetuned=[tuned], calibration=halves)
    assert report["held_out_rows"][0]["top1"] == pytest.approx(own)
    assert "Static wins: " not in verdict(report)


def test_more_than_26_candidates_have_different_letters() -> None:
    found = [record_of(drawn(number), number / 60, seed) for number in range(30) for seed in (0, 1)]
    report = report_of(found, chosen=None, finetuned=[])
    labels = [row["label"] for row in report["compared"]]
    assert labels[:2] + labels[25:] == ["A", "B", "Z", "AA", "AB", "AC", "AD"]


def test_a_collapse_is_reported_without_advice_on_single_runs() -> None:
    advised = record_of(drawn(17), 1.0, outcome="collapsed", reason="99.1 % to 48 px. Lower eta; raise tau")
    report = report_of([*records(), advised])
    assert "| collapsed | 99.1 % to 48 px |" in render_search(report, ())
    assert "99.1 % to 48 px. Lower eta; raise tau" in {row["reason"] for row in report["trials"]}


def test_a_search_without_trials_can_be_reported() -> None:
    report = report_of([], chosen=None, finetuned=[])
    assert (report["trials"], report["front"], report["compared"], report["importance"]) == ([], [], [], [])
    assert draw_search_figures(report, DARK).keys() == {"front"}


def test_importance_finds_the_decisive_parameter() -> None:
    rows = parameter_importance([record for record in records() if record.seed == 0], SPACE_OF)
    assert {row["parameter"] for row in rows} == set(SPACE_OF.parameters)
    by_cost = max(rows, key=lambda row: row["gflops"]["mean"])
    assert by_cost["parameter"] == "alpha_gflops"
    assert all(
        row[target]["low"] <= row[target]["mean"] <= row[target]["high"]
        for row in rows
        for target in ("accuracy", "gflops")
    )
    assert parameter_importance(records()[:5], SPACE_OF) == [], "too few trials"


def test_text_in_a_table_is_escaped_once(report: dict[str, Any]) -> None:
    assert "| data set | a \\| b |" in render_search(report | {"dataset": "a | b"}, ())


KEYS_N = np.arange(len(correct_of()), dtype=np.uint64)


def images_of(fitted: float) -> Images:
    """200 images whose 32 px answers are all that a cascade needs, up to a share that runs at 48 px too."""
    correct_NR = correct_of()
    return Images(
        confidence_NR=np.where(correct_NR, 0.99, fitted).astype(np.float32),
        correct_NR=correct_NR,
        predictor_logits_NR=None,
        weights_N=np.ones(len(correct_NR)),
        costs=Costs(CONFIG.model.resolutions, BACKBONE_GFLOPS, 0.0),
        exhausted_NR=np.zeros(correct_NR.shape, bool),
    )


def cascades(fitted: float) -> Calibration:
    return calibrate(images_of(fitted), KEYS_N, Budget(), Split())


def test_no_predictor_is_a_candidate_and_the_first_sentence_says_whether_one_pays() -> None:
    """With honest confidence a cascade is perfect. With equal confidence it is no better than a static network."""
    honest = report_of(records(), chosen=None, finetuned=[], calibration=cascades(0.3))
    assert honest["predictor"]["pays_from"] is None
    assert verdict(honest).startswith("A predictor does not pay off here: at no cost is a policy with a predictor")
    assert {row["label"].split()[0] for row in honest["policies"]} <= {"static", "cascade"}
    costs = [row["mean_gflops"] for row in honest["policies"]]
    assert costs == sorted(costs)
    assert "## The front of whole policies" in render_search(honest, [])
    first, correct_NR = drawn(7), correct_of()
    best_N = oracle_choice(correct_NR, BACKBONE_GFLOPS)
    perfect: dict[str, Any] = {"choices": choice_letters(best_N), "accuracy": float(correct_NR.any(axis=1).mean())}
    found = [record for record in records() if record.candidate != first]
    found += [record_of(first, 0.3, seed, **perfect) for seed in (0, 1)]
    equal = report_of(found, chosen=None, finetuned=[], calibration=cascades(0.99))
    assert verdict(equal).startswith("A predictor pays off at ")
    assert "GFLOPs: A is " in verdict(equal)
    assert "A" in {row["label"] for row in equal["policies"]}
    without = report_of(found, chosen=None, finetuned=[])
    assert (without["predictor"], without["policies"]) == (None, [])
