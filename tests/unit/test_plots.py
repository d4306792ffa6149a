"""Figures are drawn from report.json alone, are not blank, and have no label over another."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import BboxBase
from PIL import Image

from pipeline.evaluation.figures import draw_attributes, draw_figures, draw_shares, draw_tradeoff
from pipeline.evaluation.report import build_report
from pipeline.evaluation.style import DARK, LIGHT, Label, new_figure, place_labels, resolution_colors, to_png
from pipeline.models.cost import Costs
from tests.unit.evaluation_cases import easy_and_hard, evaluation_of, predictions_of

FIVE = Costs((224, 192, 168, 112, 96), (4.09, 3.0, 2.5, 1.08, 0.75), 0.04)


def three_resolutions(skill: float = 0.9, references=(), attributes=("height",)) -> dict:
    correct_NR, chosen_N, height_N = easy_and_hard(500, skill)
    return build_report(
        evaluation_of(predictions_of(correct_NR, chosen_N)),
        classes=list("abcd"),
        attributes=dict.fromkeys(attributes, height_N),
        name="three",
        context={"dataset": "a data set with $maths$ in its name", "references": references},
    )


def five_resolutions(spread: float, seed: int = 0) -> dict:
    """Return a report with accuracies from 95 % down to 95 % - spread."""
    generator = np.random.default_rng(seed)
    correct_NR = generator.random((800, 1)) < np.linspace(0.95, 0.95 - spread, 5)
    predictions = predictions_of(correct_NR, generator.integers(0, 5, 800), sides=FIVE.resolutions)
    references = [{"label": "others", "top1": 0.93}, {"label": "far away", "top1": 0.2}]
    context = {"dataset": "imagenet100", "references": references}
    return build_report(
        evaluation_of(predictions, FIVE), classes=list("abcd"), attributes={}, name="five", context=context
    )


REPORTS = {
    "gain": lambda: three_resolutions(0.95),
    "random": lambda: three_resolutions(0.0),
    "references": lambda: three_resolutions(references=[{"label": "SVM", "top1": 0.8}, {"label": "CNN", "top1": 0.95}]),
    "five": lambda: five_resolutions(0.1),
    "five, nearly level": lambda: five_resolutions(0.002),
    "five, level": lambda: five_resolutions(0.0),
}


def pixels_of(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def num_colors(pixels: np.ndarray) -> int:
    return len(np.unique(pixels.astype(np.int64) @ [65536, 256, 1]))


def drawn_texts(figure: Figure) -> list[Text]:
    """Return every visible text; matplotlib also keeps ticks outside the limits, which it does not draw."""
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title]
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            texts += [tick.label1 for tick in axis.get_major_ticks() if limits[0] <= tick.get_loc() <= limits[1]]
    return [text for text in texts if text.get_visible() and text.get_text()]


def assert_apart(texts: list[Text]) -> None:
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts]
    for (first, one), (second, other) in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), f"{first!r} lies over {second!r}"


def assert_inside(texts: list[Text], frame: BboxBase) -> None:
    for text in texts:
        box = Text.get_window_extent(text)
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1, text
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1, text


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_every_figure_is_drawn_on_its_background(theme):
    report = json.loads(json.dumps(three_resolutions()))
    figures = draw_figures(report, theme)
    assert list(figures) == ["tradeoff", "budget", "shares", "attribute"]
    background = tuple(int(theme.background[k : k + 2], 16) for k in (1, 3, 5))
    for content in figures.values():
        pixels = pixels_of(content)
        assert pixels.shape[1] > 1400
        assert pixels.shape[0] > 700
        assert tuple(pixels[0, 0]) == background
        drawn = (pixels != background).any(axis=2).mean()
        assert 0.01 < drawn < 0.6
        assert num_colors(pixels) > 50


def test_equal_reports_give_equal_bytes():
    report = three_resolutions()
    assert to_png(draw_tradeoff(report, LIGHT)) == to_png(draw_tradeoff(report, LIGHT))


@pytest.mark.parametrize("name", REPORTS)
def test_labels_of_the_tradeoff_neither_overlap_nor_leave_the_figure(name):
    report = REPORTS[name]()
    figure = draw_tradeoff(report, LIGHT)
    figure.canvas.draw()
    (axes,) = figure.axes
    labels = [text for text in axes.texts if text.get_text()]
    named = {text.get_text().split("  ")[0] for text in labels}
    assert {row["label"] for row in report["rows"] if row["kind"] != "envelope"} <= named
    assert_apart(labels)
    assert_inside(labels, axes.get_window_extent())


def test_a_reference_far_from_the_points_is_not_drawn():
    texts = " ".join(text.get_text() for text in draw_tradeoff(five_resolutions(0.1), LIGHT).axes[0].texts)
    assert "others  93.0 %" in texts
    assert "far away" not in texts


def test_texts_of_shares_and_attributes_neither_overlap_nor_leave_the_figure():
    two = three_resolutions(attributes=("height", "weight"))
    for figure in (draw_shares(two, LIGHT), draw_shares(five_resolutions(0.1), LIGHT), draw_attributes(two, LIGHT)):
        figure.canvas.draw()
        texts = drawn_texts(figure)
        assert len(texts) > 15
        assert_apart(texts)
        assert_inside(texts, figure.bbox)


def test_one_resolution_has_no_shares():
    costs = Costs((96,), (0.9,), 0.0)
    predictions = predictions_of(np.arange(60)[:, None] % 2 > 0, np.zeros(60, np.int64), sides=(96,))
    report = build_report(
        evaluation_of(predictions, costs),
        classes=list("abcd"),
        attributes={"height": range(60)},
        name="one",
        context={},
    )
    figures = draw_figures(report, LIGHT)
    assert list(figures) == ["tradeoff", "attribute"]
    assert num_colors(pixels_of(figures["tradeoff"])) > 50


def test_labels_avoid_each_other_and_lines_if_there_is_room():
    figure = new_figure(6, 4, LIGHT)
    axes = figure.add_axes((0.1, 0.1, 0.85, 0.85))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    crowd = [Label(f"label {k}", [(0.5 + k / 500, 0.5)], "black") for k in range(4)]
    line = np.array([[0, 0.5], [1, 0.5]])
    place_labels(axes, crowd, [line], size=10, background="white")
    figure.canvas.draw()
    assert_apart(axes.texts)
    level = axes.transData.transform((0.5, 0.5))[1]
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert not any(box.y0 < level < box.y1 for box in boxes)


def test_resolutions_have_different_colors_in_a_fixed_order():
    for count in range(1, 7):
        assert len(set(resolution_colors(count))) == count
    assert resolution_colors(5)[0] == resolution_colors(3)[0] == resolution_colors(1)[0]


def test_a_png_holds_no_date():
    assert b"Software" not in to_png(new_figure(1, 1, LIGHT))


def test_the_figures_do_not_import_pyplot():
    program = "import sys, pipeline.evaluation.figures; print('matplotlib.pyplot' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
