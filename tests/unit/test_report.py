"""Tests of a report in JSON, Markdown and HTML, above all that it says so when a static resolution wins."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation.figures import draw_gallery, draw_shares, pick_tiles
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.report import Evaluation, build_report, judge, to_json, write_report
from pipeline.evaluation.style import LIGHT
from pipeline.models.cost import Costs
from pipeline.policies.calibrate import Budget
from tests.unit.evaluation_cases import (
    CLASSES,
    CONTEXT,
    COSTS,
    PERFECT,
    SIDES,
    easy_and_hard,
    evaluation_of,
    jpeg,
    outcomes,
    predictions_of,
    report_of,
)


class TestVerdict:
    def test_gain(self):
        report = report_of(*PERFECT)
        assert report["outcome"] == "gain"
        # 0.62 * 0.1 + 0.1 * 0.4 + 0.28 * 0.9 + 0.03 = 0.384 GFLOPs; the envelope from 60 % to 98 % is at 73.5 % there.
        assert report["verdict"].startswith(
            "At 0.43 of the FLOPs of static 96 px the routed network is level with it (95 % CI "
        )
        assert (
            ", and 24.5 points above the envelope of the static resolutions at equal FLOPs (95 % CI +"
            in report["verdict"]
        )
        assert "wins" not in report["verdict"]

    def test_gain_below_the_best_static_resolution_says_by_how_much(self):
        correct, chosen = outcomes((600, (1, 1, 1), 2), (100, (1, 1, 0), 1), (250, (1, 0, 0), 0), (50, (1, 0, 0), 2))
        verdict = report_of(correct, chosen)["verdict"]
        assert verdict.startswith(
            "At 0.40 of the FLOPs of static 96 px the routed network is 5.0 points below it (95 % CI -6.4 to -3.6)"
        )

    def test_dominated(self):
        """Hard images go to 32 px and easy ones to 96 px."""
        correct, chosen = outcomes((600, (1, 1, 1), 0), (400, (1, 1, 0), 2))
        report = report_of(correct, chosen)
        assert report["outcome"] == "dominated"
        assert re.match(
            r"Static wins: static 64 px is 40\.0 points more accurate than the routed network "
            r"\(95 % CI \+3\d\.\d to \+4\d\.\d, McNemar p < 0\.001\) at 0\.66 of its FLOPs\.",
            report["verdict"],
        )

    def test_dominated_by_less_than_noise(self):
        correct, chosen = outcomes((500, (1, 1, 1), 0), (498, (1, 1, 1), 1), (2, (0, 1, 1), 0))
        report = report_of(correct, chosen)
        assert report["outcome"] == "dominated"
        assert report["verdict"].startswith(
            "Static wins: static 32 px is at least as accurate as the routed network (+0.2 points, 95 % CI -0.2 to "
            "+0.6, McNemar p = 0.5) at 0.15 of its FLOPs."
        )

    def test_collapsed_onto_one_resolution(self):
        correct, _ = PERFECT
        report = report_of(correct, np.ones(1000, np.int64))
        assert report["outcome"] == "dominated"
        assert report["verdict"].startswith("Static wins: static 64 px is at least as accurate as the routed network")
        assert "100.0 % of the images are answered at 64 px: the routing has collapsed" in report["verdict_details"][0]
        assert not any("collapsed" in sentence for sentence in report_of(*PERFECT)["verdict_details"])

    def test_below_the_line(self):
        """Random routing between 96 px and 32 px loses to 64 px, which lies above the line between the two."""
        correct, _ = outcomes((600, (1, 1, 1), 0), (250, (1, 1, 0), 0), (150, (1, 0, 0), 0))
        report = report_of(correct, np.where(np.arange(1000) % 10 < 7, 0, 2))
        assert report["outcome"] == "below_line"
        # 88 % at 0.69 GFLOPs, where the line from 85 % to 100 % is at 93.7 %.
        assert report["verdict"].startswith(
            "Static wins: the routed network is 5.7 points below the envelope of the static resolutions at equal FLOPs"
        )
        assert "At 0.77 of the FLOPs of static 96 px the routed network is 12.0 points below it" in report["verdict"]

    def test_unproven(self):
        """On twenty images, one correct image more than on the line proves nothing."""
        everywhere, not_at_32, at_96 = (1, 1, 1), (1, 1, 0), (1, 0, 0)
        correct, chosen = outcomes(
            (10, everywhere, 1), (2, everywhere, 0), (5, not_at_32, 1), (1, not_at_32, 0), (1, at_96, 0), (1, at_96, 1)
        )
        report = report_of(correct, chosen)
        assert report["outcome"] == "unproven"
        assert report["verdict"].startswith(
            "A gain is not proven: the routed network is 2.4 points above the envelope of the static resolutions"
        )
        assert "an interval contains 0" in report["verdict"]

    def test_more_accurate_than_every_static_resolution_beyond_the_lines_end(self):
        correct, chosen = outcomes((900, (1, 0, 0), 0), (60, (0, 0, 1), 2), (40, (0, 0, 0), 0))
        costs = Costs(SIDES, (0.9, 0.4, 0.1), 0.2)
        report = report_of(correct, chosen, costs=costs)
        assert report["outcome"] == "gain"
        assert report["verdict"].startswith(
            "At 1.17 of the FLOPs of static 96 px the routed network is 6.0 points above it"
        )
        assert "6.0 points above the envelope of the static resolutions" in report["verdict"]

    def test_the_majority_class_alone_never_looks_good(self):
        """Of 1,000 images 900 are of one class, and the network answers it for nearly all of them."""
        labels_N = np.repeat([0, 1, 2, 3], [900, 40, 30, 30])
        found = np.zeros((1000, 3), np.int64)
        found[[900, 905, 950]] = labels_N[[900, 905, 950], None]
        logits_NRK = np.eye(4, dtype=np.float32)[found]
        predictions = Predictions(SIDES, labels_N, np.arange(1000), logits_NRK, np.zeros((1000, 3), np.float32))
        report = build_report(evaluation_of(predictions), classes=CLASSES, attributes={}, name="run", context=CONTEXT)
        assert report["outcome"] == "constant"
        assert report["verdict"].startswith("No better than a constant answer: routed: predictor 32, 64, 96 px reaches")
        assert "always answering the most frequent class reaches 90.0 %" in report["verdict"]
        assert "mean accuracy over the classes is 27.1 %" in report["verdict"]

    def test_the_first_sentence_says_whether_a_predictor_pays(self):
        report = report_of(*PERFECT)
        point = {"highest_cost": 0.4, "mean_cost": 0.384, "kind": "predictor"}
        point |= {"difference_points": 2.0, "low_points": 0.5, "high_points": 3.5}
        pays = judge(report | {"predictor": {"points": [point], "pays_from": 0.4, "pays_to": 0.4}})
        assert pays["outcome"] == "gain"
        assert pays["verdict"].startswith(
            "A predictor pays off at a cost limit of 0.400 GFLOPs: predictor is 2.0 points more accurate than the "
            "best policy without a predictor at 0.384 GFLOPs (simultaneous 95 % CI +0.5 to +3.5). At 0.43 of the FLOPs"
        )
        second = point | {"highest_cost": 0.9}
        unproven = point | {"highest_cost": 0.6, "low_points": -0.1}
        several = judge(report | {"predictor": {"points": [point, unproven, second], "pays_from": 0.4, "pays_to": 0.9}})
        assert several["verdict"].startswith(
            "A predictor pays off at 2 of 3 cost limits, between 0.400 and 0.900 GFLOPs: "
        )
        not_at_all = judge(report | {"predictor": {"points": [point], "pays_from": None, "pays_to": None}})
        assert not_at_all["verdict"].startswith("A predictor does not pay off here: ")

    def test_balanced_accuracy_decides_where_it_is_asked_for(self):
        """96 px is right for 8 of 10 images of every class, 32 px for all of the first class."""
        labels_N = np.repeat([0, 1, 2, 3], [700, 100, 100, 100])
        right_NR = np.column_stack([np.arange(1000) % 10 < 8, np.arange(1000) % 10 < 3, labels_N == 0])
        found = np.where(right_NR, labels_N[:, None], (labels_N[:, None] + 1) % 4)
        logits_NRK, logits_NR = np.eye(4, dtype=np.float32)[found], np.eye(3, dtype=np.float32)[np.zeros(1000, int)]
        shifted_NV = np.where(np.arange(1000) % 10 == 8, labels_N, (labels_N + 1) % 4)[:, None]
        predictions = Predictions(SIDES, labels_N, np.arange(1000), logits_NRK, logits_NR, shifted_NV)
        found = {}
        for balanced in (False, True):
            evaluation = evaluation_of(predictions)
            object.__setattr__(evaluation, "balanced", balanced)
            found[balanced] = build_report(evaluation, classes=CLASSES, attributes={}, name="run", context=CONTEXT)
        assert found[True]["best_static"] == found[False]["best_static"] == "static-96"
        assert (found[True]["compared_by"], found[False]["compared_by"]) == ("balanced_top1", "top1")
        against = {balanced: report["comparisons"]["static-32"] for balanced, report in found.items()}
        assert against[False]["difference_points"] == pytest.approx(10)
        assert against[True]["difference_points"] == pytest.approx(55)
        assert found[True]["verdict"].startswith("Accuracy is the mean over the classes here. ")
        # An oracle is right for the whole first class and for 8 of 10 others. The shifted crop adds 1 of 10 everywhere.
        for balanced, oracle, above in ((False, "94.0 %", "14.0"), (True, "85.0 %", "5.0")):
            _, reached, luck = found[balanced]["verdict_details"][-3:]
            assert f"would reach {oracle} at" in reached
            assert luck.startswith(f"The oracle is {above} points above static 96 px.")
            assert luck.endswith("is 10.0 points above it by luck alone.")

    def test_one_resolution(self):
        report = report_of(np.ones((50, 1), bool), np.zeros(50, np.int64), costs=Costs((96,), (0.9,), 0.0))
        assert report["outcome"] == "single_resolution"
        assert report["verdict"].startswith(
            "There is only one resolution, so nothing is routed: static 96 px reaches 100.0 %"
        )
        assert (report["comparisons"], report["routing"], report["budget_curve"]) == (None, None, [])
        assert report["headline"]["id"] == "static-96"


def test_the_report_is_strict_json_with_the_documented_keys():
    _, _, height_N = easy_and_hard(1000)
    report = report_of(*PERFECT, attributes={"height": height_N.tolist()})
    read = json.loads(to_json(report), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read == report
    documented = re.findall(r"`(\w+)`", build_report.__doc__.split("Keys:")[1].split("With one")[0])
    assert set(report) == {key for key in documented if key not in ("judge", "_policies")}
    assert read["schema_version"] == 3
    assert read["environment"] == {"torch": "2.13"}
    assert (read["dataset"], read["git_commit"], read["created"]) == ("glyphs", "abc123", CONTEXT["created"])


def test_a_report_with_an_unused_resolution_is_strict_json():
    """The mean over no images must be null, not NaN."""
    correct, _ = PERFECT
    report = report_of(correct, np.zeros(1000, np.int64), attributes={"height": [0.5] * 1000})
    assert report["routing"]["static_top1_by_chosen"][2] == [None, None, None]
    assert "NaN" not in to_json(report)


def test_routing_counts_images_by_choice_by_oracle_and_never_correct():
    routing = report_of(*PERFECT)["routing"]
    assert routing["counts_by_chosen"] == [280, 100, 620]
    assert routing["chosen_by_oracle"] == [[280, 0, 0], [0, 100, 0], [0, 0, 620]]
    assert routing["right_nowhere_by_chosen"] == [0, 0, 20]
    assert routing["agreement_with_oracle"] == 1
    assert (routing["wrong"], routing["wrong_but_right_elsewhere"]) == (20, 0)
    assert routing["static_top1_by_chosen"] == [[1, 0, 0], [1, 1, 0], [pytest.approx(600 / 620)] * 3]


def test_the_best_static_resolution_is_the_cheapest_of_the_most_accurate():
    correct, chosen = outcomes((90, (1, 1, 0), 0), (10, (0, 0, 0), 1))
    assert report_of(correct, chosen)["best_static"] == "static-64"


def test_attributes_follow_the_images_own_indices():
    """The predictions cover every second image of the beton."""
    predictions = predictions_of(*PERFECT)
    object.__setattr__(predictions, "indices_N", 2 * np.arange(1000))
    heights = np.zeros(1999)
    heights[::2] = np.arange(1000)
    evaluation = evaluation_of(predictions)
    report = build_report(evaluation, classes=CLASSES, attributes={"height": heights}, name="run", context=CONTEXT)
    assert report["attributes"]["height"]["by_chosen"][1]["mean"] == np.arange(600, 700).mean()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"classes": CLASSES[:3]}, "3 class names for 4 logits"),
        ({"attributes": {"height": [0.5] * 999}}, "attribute height has 999 values, but image 999 was predicted"),
        ({"attributes": {"height": [float("nan")] * 1000}}, "attribute height has values that are NaN"),
    ],
)
def test_inputs_that_do_not_match_are_rejected(changed, message):
    with pytest.raises(ValueError, match=message):
        report_of(*PERFECT, **changed)


def test_all_mismatches_are_named_together():
    with pytest.raises(
        ValueError,
        match=r"predictions are for \[96, 64, 32\] px, costs for \[64, 32\] px; there are 3 .*; there are 9 keys",
    ):
        build_report(
            Evaluation(predictions_of(*PERFECT), Costs((64, 32), (0.4, 0.1), 0), np.arange(9, dtype=np.uint64)),
            classes=CLASSES[:3],
            attributes={},
            name="run",
            context={},
        )


def test_a_context_that_json_cannot_represent_is_rejected_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="give context as text and numbers"):
        written(tmp_path, context={"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def written(folder: Path, **changed) -> dict:
    correct_NR, chosen_N, height_N = easy_and_hard(400, skill=0.9)
    given = {
        "classes": CLASSES,
        "attributes": {"height": height_N.tolist()},
        "read_image": jpeg,
        "name": "run",
        "context": CONTEXT,
    } | changed
    return write_report(folder, evaluation_of(predictions_of(correct_NR, chosen_N)), **given)


class Page(HTMLParser):
    """Parse a page: the addresses that a browser would load, and the tags still open at the end."""

    VOID = ("meta", "img", "source", "br")

    def __init__(self, text: str):
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "srcset", "href", "data", "poster")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


FILES = {"report.json", "answers.npz", "report.md", "report.html", "tradeoff.png", "budget.png", "shares.png"}
"""of every report"""


@pytest.fixture(scope="module")
def report_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "report"
    context = CONTEXT | {"references": [{"label": "SVM", "top1": 0.824, "note": "another split"}]}
    written(folder, classes=("<b>ant</b>", "b|ee", "$cat$", "dog"), name="a <run> | b", context=context)
    return folder


def test_the_folder_holds_the_report_and_nothing_else(report_folder):
    expected = FILES | {"attribute.png", "gallery.png"}
    assert {file.name for file in report_folder.iterdir()} == expected


def test_the_html_loads_nothing_from_outside(report_folder):
    text = (report_folder / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"https?://|url\(|@import", text)
    assert page.tags.count("img") == 4 + 24, "four figures and three rows of eight images"
    assert page.tags.count("source") == 4, "a dark version of every figure"


def test_the_html_shows_the_values_of_the_json(report_folder):
    text = (report_folder / "report.html").read_text()
    report = json.loads((report_folder / "report.json").read_text())
    plain = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))
    assert report["verdict"] in plain
    for row in report["rows"]:
        assert f"{100 * row['top1']:.1f} %" in plain
    for phrase in ("SVM", "another split", "Wilson", "abc123", "2.13"):
        assert phrase in plain


def test_names_from_outside_cannot_become_markup(report_folder):
    text = (report_folder / "report.html").read_text()
    assert "<b>ant</b>" not in text
    assert "&lt;b&gt;ant&lt;/b&gt;" in text
    assert "a &lt;run&gt; | b" in text
    markdown = (report_folder / "report.md").read_text()
    assert markdown.startswith("# a &lt;run> \\| b\n")


def test_the_markdowns_tables_are_regular_and_its_figures_exist(report_folder):
    markdown = (report_folder / "report.md").read_text()
    report = json.loads((report_folder / "report.json").read_text())
    assert f"**{report['verdict']}**" in markdown
    assert "b = 0 is the predictor as trained." in markdown
    for table in re.findall(r"(?:^\|.*\|$\n?)+", markdown, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
    figures = re.findall(r"!\[.*\]\((.*)\)", markdown)
    assert sorted(figures) == ["attribute.png", "budget.png", "gallery.png", "shares.png", "tradeoff.png"]
    assert all((report_folder / figure).is_file() for figure in figures)


def test_the_gallery_shows_images_of_each_choice_by_seed():
    correct_NR, chosen_N, _ = easy_and_hard(400, skill=0.9)
    predictions, asked = predictions_of(correct_NR, chosen_N), []

    def read_image(index: int) -> bytes:
        asked.append(index)
        return jpeg(index)

    first, again = (pick_tiles(predictions, chosen_N, CLASSES, read_image) for _ in range(2))
    assert first == again
    assert len(set(asked)) == 24
    for j, row in enumerate(first):
        assert [chosen_N[tile.index] for tile in row] == [j] * 8
        for tile in row:
            assert tile.correct_at == tuple(correct_NR[tile.index])
            assert tile.is_correct == correct_NR[tile.index, j] == (tile.truth == tile.answer)
            assert tile.truth == CLASSES[tile.index % 4]
            assert Image.open(io.BytesIO(tile.jpeg)).size == (40, 30)
    assert pick_tiles(predictions, chosen_N, CLASSES, read_image, seed=1) != first


def test_the_gallery_handles_a_resolution_without_images(report_folder):
    correct_NR, chosen_N, _ = easy_and_hard(40)
    answered_N = np.where(chosen_N == 1, 0, chosen_N)
    tiles = pick_tiles(predictions_of(correct_NR, answered_N), answered_N, CLASSES, jpeg, columns=3)
    assert [len(row) for row in tiles] == [3, 0, 3]
    report = json.loads((report_folder / "report.json").read_text())
    assert Image.open(io.BytesIO(draw_gallery(tiles, report))).width > 400


def test_a_report_without_images_or_attributes_removes_the_earlier_figures(tmp_path):
    written(tmp_path)
    report = written(tmp_path, read_image=None, attributes={})
    names = {file.name for file in tmp_path.iterdir()}
    assert names == FILES
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_without_a_trained_predictor_no_policy_uses_it(tmp_path):
    correct_NR, chosen_N, _ = easy_and_hard(300)
    keys_N = np.arange(300, dtype=np.uint64)
    evaluation = Evaluation(predictions_of(correct_NR, chosen_N), COSTS, keys_N, has_predictor=False)
    report = write_report(
        tmp_path, evaluation, classes=CLASSES, attributes={}, read_image=None, name="backbone alone", context=CONTEXT
    )
    assert {point["kind"] for point in report["policies"]["front"]} <= {"static", "cascade"}
    assert report["budget_curve"] == []
    assert "predictor" not in report["policies"]["curves"]
    assert not [row["id"] for row in report["rows"] if row["kind"] == "policy" and "predictor" in row["policy"]]
    assert next(text.get_text() for text in draw_shares(report, LIGHT).texts) == "Resolutions of the answers"
    for page in ("report.md", "report.html"):
        assert "What the predictor chooses" not in (tmp_path / page).read_text()
    assert Page((tmp_path / "report.html").read_text()).open == []


def test_a_static_choice_has_its_name_with_folds():
    correct_NR, chosen_N, _ = easy_and_hard(300, skill=0)
    keys_N, budget = np.arange(300, dtype=np.uint64), Budget(max_drop=0.0)
    evaluation = Evaluation(predictions_of(correct_NR, chosen_N), COSTS, keys_N, budget=budget)
    report = build_report(evaluation, classes=CLASSES, attributes={}, name="run", context=CONTEXT)
    assert report["policies"]["folds"] == 5
    assert report["outcome"] == "static"
    assert "within the budget no policy is better than static 96 px. " in report["verdict"]
    assert report["headline"]["label"] == "routed: static 96 px"
    assert (report["headline"]["shares"], report["headline"]["mean_cost"]) == ([1, 0, 0], pytest.approx(0.9))
    assert report["comparisons"]["static-96"]["difference_points"] == 0


def test_a_report_with_one_resolution_is_written(tmp_path):
    predictions = predictions_of(np.arange(50)[:, None] % 3 > 0, np.zeros(50, np.int64), sides=(96,))
    write_report(
        tmp_path,
        evaluation_of(predictions, Costs((96,), (0.9,), 0.0)),
        classes=CLASSES,
        attributes={"height": list(range(50))},
        read_image=jpeg,
        name="static",
        context={},
    )
    page = Page((tmp_path / "report.html").read_text())
    assert page.open == []
    assert {file.name for file in tmp_path.iterdir()} == {
        *("report.json", "answers.npz", "report.md", "report.html", "tradeoff.png", "attribute.png", "gallery.png")
    }
    assert json.loads((tmp_path / "report.json").read_text())["created"], "the time of writing is the default"
