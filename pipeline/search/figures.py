"""Draw the figures of a search from the values in report.json, with Agg and matplotlib's object interface only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.evaluation.figures import draw_point, point_labels, point_of, static_line, whisker
from pipeline.evaluation.style import (
    FONT_SIZE,
    Label,
    Theme,
    heading,
    new_figure,
    percent_axis,
    place_labels,
    resolution_colors,
    style_axes,
    subject,
    title,
    to_png,
)
from pipeline.evaluation.tables import cost_words
from pipeline.search.front import NUM_RESAMPLES

FIGURES = ("front", "importance")


def draw_search_figures(report: Mapping[str, Any], theme: Theme) -> dict[str, bytes]:
    """Return PNG bytes by name: front, and importance if there are enough trials."""
    figures = {"front": draw_front(report, theme)}
    if report["importance"]:
        figures["importance"] = draw_importance(report, theme)
    return {name: to_png(figure) for name, figure in figures.items()}


def draw_front(report: Mapping[str, Any], theme: Theme) -> Figure:
    """Draw every trial, the static resolutions and the oracle (above), and the region of the front enlarged (below)."""
    figure = new_figure(8.6, 9.6, theme)
    above, below = figure.add_axes((0.085, 0.565, 0.895, 0.335)), figure.add_axes((0.085, 0.06, 0.895, 0.43))
    for axes in (above, below):
        style_axes(axes, theme)
        percent_axis(axes)
        axes.set_ylabel("top-1, %", color=theme.muted)
        _draw_trials(axes, report, theme)
        _draw_front_line(axes, report, theme)
    title(above, "All trials, and the same backbone without a predictor (static, oracle)", theme)
    title(below, "Near the front: the paper's four and the finalists, means over seeds", theme)
    below.set_xlabel(cost_words(report).axis, color=theme.muted)
    _limit_all(above, report)
    _draw_bounds(above, report, theme)
    _draw_compared(above, report, theme, labels=False)
    _limit_near(below, report)
    _draw_compared(below, report, theme, labels=True)
    heading(figure, "Accuracy against cost of every candidate", f"{subject(report)}; bars are 95 % intervals", theme)
    return figure


def _with_result(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["top1"] is not None]


def _draw_trials(axes: Axes, report: Mapping[str, Any], theme: Theme) -> None:
    for outcome, marker in (("finished", "o"), ("collapsed", "x"), ("stopped", "_")):
        rows = [row for row in _with_result(report["trials"]) if row["outcome"] == outcome]
        if not rows:
            continue
        points = np.array([point_of(row) for row in rows])
        axes.plot(*points.T, marker=marker, ms=5, ls="none", mew=1.0, color=theme.muted, alpha=0.55, zorder=2)
        ends = np.array([whisker(row)[[0, 2], 1] for row in rows if row["top1_low"] is not None])
        if len(ends):
            axes.vlines(points[: len(ends), 0], *ends.T, color=theme.muted, lw=0.7, alpha=0.25, zorder=1)


def _front_points(report: Mapping[str, Any]) -> np.ndarray:
    trials = {row["id"]: row for row in report["trials"]}
    return np.array([point_of(trials[key]) for key in report["front"]]).reshape(-1, 2)


def _draw_front_line(axes: Axes, report: Mapping[str, Any], theme: Theme) -> None:
    points = _front_points(report)
    if len(points):
        axes.step(*points.T, where="post", color=theme.routed, lw=1.4, alpha=0.8, zorder=3)


def _draw_bounds(axes: Axes, report: Mapping[str, Any], theme: Theme) -> None:
    """Draw the static resolutions with their line, and the oracle."""
    *statics, oracle = report["rows"]
    line = np.array(sorted(point_of(row) for row in statics))
    axes.plot(*line.T, zorder=2, **static_line(theme))
    for row, color in zip(statics, resolution_colors(len(statics)), strict=True):
        draw_point(axes, row, color, "o", theme)
    draw_point(axes, oracle, theme.oracle, "*", theme)
    whiskers = [whisker(row) for row in report["rows"]]
    _labels(axes, point_labels(report["rows"], theme), [line, _front_points(report), *whiskers], theme)


def _draw_compared(axes: Axes, report: Mapping[str, Any], theme: Theme, *, labels: bool) -> None:
    """Draw the paper's four, the finalists, random routing with their shares, and the finetuned candidates."""
    named = []
    for row in report["compared"]:
        color, marker = (theme.reference, "s") if row["paper"] else (theme.routed, "D")
        draw_point(axes, row["random"], theme.random, "v", theme, size=5.5)
        draw_point(axes, row, color, marker, theme, size=8, cost_range=(row["gflops_low"], row["gflops_high"]))
        named.append((row, color))
    for row in _with_result(report["finetuned"]):
        draw_point(axes, row, theme.oracle, "P", theme, size=8)
        named.append((row, theme.oracle))
    if not labels:
        return
    if report["compared"]:
        named.append((report["compared"][0]["random"], theme.random))
    low, high = axes.get_ylim()
    texts = [Label(row["label"], [point_of(row)], color) for row, color in named if low <= 100 * row["top1"] <= high]
    _labels(axes, texts, [_front_points(report), *(whisker(row) for row, _ in named)], theme)


def _limit_all(axes: Axes, report: Mapping[str, Any]) -> None:
    *statics, oracle = report["rows"]
    # Trials far below everything else would flatten the rest, so the static resolutions set the limits.
    lowest = min(row["top1_low"] for row in statics)
    rows = [row for row in [*_with_result(report["trials"]), *report["rows"]] if row["top1"] >= lowest]
    heights = [100 * row["top1"] for row in rows] + [100 * oracle["top1_high"]]
    span = max(max(heights) - min(heights), 2.0)
    axes.set_ylim(min(heights) - 0.06 * span, max(heights) + 0.1 * span)
    axes.set_xlim(0, 1.08 * max(row["mean_cost"] for row in statics))


def _limit_near(axes: Axes, report: Mapping[str, Any]) -> None:
    rows = [*report["compared"], *_with_result(report["finetuned"])]
    points = np.concatenate([_front_points(report), *(whisker(row) for row in rows)])
    if len(points) == 0:
        return
    low, high = points.min(axis=0), points.max(axis=0)
    width, height = max(high[0] - low[0], 0.1 * high[0]), max(high[1] - low[1], 1.0)
    axes.set_xlim(low[0] - 0.08 * width, high[0] + 0.12 * width)
    axes.set_ylim(low[1] - 0.08 * height, high[1] + 0.12 * height)


def _labels(axes: Axes, labels: Sequence[Label], lines: Sequence[np.ndarray], theme: Theme) -> None:
    drawn = [line for line in lines if len(line) > 1]
    if drawn:
        place_labels(axes, labels, drawn, size=FONT_SIZE - 0.5, background=theme.background)


def draw_importance(report: Mapping[str, Any], theme: Theme) -> Figure:
    """Draw each parameter's share of the variance of accuracy and of cost, as bars with the range of the resamples."""
    rows = report["importance"][::-1]
    figure = new_figure(8.2, 1.5 + 0.42 * len(rows), theme)
    height = figure.get_figheight()
    for place, (target, what) in enumerate((("accuracy", "of accuracy's variance, %"), ("gflops", "of the cost's, %"))):
        axes = figure.add_axes((0.15 + 0.43 * place, 0.35 / height, 0.39, 1 - 1.3 / height))
        style_axes(axes, theme, grid="x")
        means = np.array([100 * row[target]["mean"] for row in rows])
        lows, highs = (np.array([100 * row[target][end] for row in rows]) for end in ("low", "high"))
        error = [np.maximum(means - lows, 0), np.maximum(highs - means, 0)]
        axes.barh(range(len(rows)), means, height=0.6, color=theme.routed if place == 0 else theme.reference, zorder=2)
        axes.errorbar(means, range(len(rows)), xerr=error, fmt="none", ecolor=theme.ink, elinewidth=1.2, capsize=2.5)
        axes.set_yticks(range(len(rows)), [row["parameter"] for row in rows] if place == 0 else [""] * len(rows))
        axes.set_xlim(left=0)
        title(axes, what, theme)
    about = f"functional ANOVA over the first seed's trials; lines: range of {NUM_RESAMPLES} bootstrap resamples"
    heading(figure, "Which parameters matter", about, theme)
    return figure
