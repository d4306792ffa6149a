"""The figures of a search, drawn from report.json's values alone. Agg and matplotlib's object interface only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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

GFLOPS_AXIS = "cost of one image, GFLOPs (1e9 multiply-adds, predictor included)"


def draw_search_figures(report: Mapping[str, Any], theme: Theme) -> dict[str, bytes]:
    """PNG bytes by name: front; with enough trials importance."""
    figures = {"front": draw_front(report, theme)}
    if report["importance"]:
        figures["importance"] = draw_importance(report, theme)
    return {name: to_png(figure) for name, figure in figures.items()}


def draw_front(report: Mapping[str, Any], theme: Theme) -> Figure:
    """Above everything, with static resolutions and oracle; below what lies near the front, closer."""
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
    below.set_xlabel(GFLOPS_AXIS, color=theme.muted)
    _limit_all(above, report)
    _draw_bounds(above, report, theme)
    _draw_compared(above, report, theme, labels=False)
    _limit_near(below, report)
    _draw_compared(below, report, theme, labels=True)
    heading(figure, "Accuracy against cost of every candidate", f"{subject(report)}; bars are 95 % intervals", theme)
    return figure


def _with_result(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in report["trials"] if row["accuracy"] is not None]


def _draw_trials(axes: Axes, report: Mapping[str, Any], theme: Theme) -> None:
    for outcome, marker in (("finished", "o"), ("collapsed", "x"), ("stopped", "_")):
        rows = [row for row in _with_result(report) if row["outcome"] == outcome]
        if not rows:
            continue
        points = np.array([(row["gflops"], 100 * row["accuracy"]) for row in rows])
        axes.plot(*points.T, marker=marker, ms=5, ls="none", mew=1.0, color=theme.muted, alpha=0.55, zorder=2)
        ends = np.array([(100 * row["low"], 100 * row["high"]) for row in rows if row["low"] is not None])
        if len(ends):
            axes.vlines(points[: len(ends), 0], *ends.T, color=theme.muted, lw=0.7, alpha=0.25, zorder=1)


def _front_points(report: Mapping[str, Any]) -> np.ndarray:
    trials = {row["key"]: row for row in report["trials"]}
    return np.array([(trials[key]["gflops"], 100 * trials[key]["accuracy"]) for key in report["front"]]).reshape(-1, 2)


def _draw_front_line(axes: Axes, report: Mapping[str, Any], theme: Theme) -> None:
    points = _front_points(report)
    if len(points):
        axes.step(*points.T, where="post", color=theme.routed, lw=1.4, alpha=0.8, zorder=3)


def _draw_bounds(axes: Axes, report: Mapping[str, Any], theme: Theme) -> None:
    """Static resolutions with their line, and the oracle."""
    statics = sorted(report["statics"], key=lambda row: row["gflops"])
    line = np.array([(row["gflops"], 100 * row["accuracy"]) for row in statics])
    axes.plot(*line.T, color=theme.muted, lw=1.4, ls=(0, (4, 2)), zorder=2)
    for row, color in zip(report["statics"], resolution_colors(len(statics)), strict=True):
        _point(axes, row, color, "o", theme)
    _point(axes, report["oracle"], theme.oracle, "*", theme)
    rows = [*report["statics"], report["oracle"]]
    labels = [
        Label(row["label"], [(row["gflops"], 100 * row["accuracy"])], theme.ink if row in statics else theme.oracle)
        for row in rows
    ]
    _labels(axes, labels, [line, _front_points(report)], theme)


def _draw_compared(axes: Axes, report: Mapping[str, Any], theme: Theme, *, labels: bool) -> None:
    """The paper's four, the finalists, random routing with their shares, and what was finetuned."""
    named, lines = [], [_front_points(report)]
    tuned = [row for row in report["finetuned"] if row["accuracy"] is not None]
    for row in report["compared"]:
        color = theme.reference if row["paper"] else theme.routed
        _point(axes, row, color, "s" if row["paper"] else "D", theme, spread=(row["gflops_low"], row["gflops_high"]))
        _point(axes, row["random"], theme.random, "v", theme, size=5.5)
        named.append((row, row["label"], color))
    for row in tuned:
        _point(axes, row, theme.oracle, "P", theme)
        named.append((row, row["label"], theme.oracle))
    if not labels:
        return
    if report["compared"]:
        named.append((report["compared"][0]["random"], "random, same shares", theme.random))
    limits = axes.get_ylim()
    texts = [
        Label(text, [(row["gflops"], 100 * row["accuracy"])], color)
        for row, text, color in named
        if limits[0] <= 100 * row["accuracy"] <= limits[1]
    ]
    whiskers = [np.array([(row["gflops"], 100 * row[end]) for end in ("low", "accuracy", "high")]) for row, *_ in named]
    _labels(axes, texts, [*lines, *whiskers], theme)


def _point(
    axes: Axes,
    row: Mapping[str, Any],
    color: str,
    marker: str,
    theme: Theme,
    *,
    size: float = 8.0,
    spread: tuple[float, float] | None = None,
) -> None:
    """A row with its interval, and across it the range of its cost over seeds."""
    x, y = row["gflops"], 100 * row["accuracy"]
    axes.errorbar(
        [x],
        [y],
        yerr=[[max(0.0, y - 100 * row["low"])], [max(0.0, 100 * row["high"] - y)]],
        xerr=None if spread is None else [[max(0.0, x - spread[0])], [max(0.0, spread[1] - x)]],
        fmt=marker,
        ms=13 if marker == "*" else size,
        color=color,
        mec=theme.background,
        mew=1.0,
        elinewidth=1.4,
        capsize=2.5,
        zorder=4 if marker == "v" else 5,
    )


def _limit_all(axes: Axes, report: Mapping[str, Any]) -> None:
    rows = [*_with_result(report), *report["statics"], report["oracle"]]
    # Trials that went wrong altogether would flatten the rest: the static resolutions bound what is of interest.
    lowest = min(row["low"] for row in report["statics"])
    heights = [100 * row["accuracy"] for row in rows if row["accuracy"] >= lowest] + [100 * report["oracle"]["high"]]
    span = max(max(heights) - min(heights), 2.0)
    axes.set_ylim(min(heights) - 0.06 * span, max(heights) + 0.1 * span)
    axes.set_xlim(0, 1.08 * max(row["gflops"] for row in report["statics"]))


def _limit_near(axes: Axes, report: Mapping[str, Any]) -> None:
    tuned = [row for row in report["finetuned"] if row["accuracy"] is not None]
    rows: Sequence[Mapping[str, Any]] = [*report["compared"], *tuned]
    front = _front_points(report)
    if len(rows) == 0 and len(front) == 0:
        return
    x = [row["gflops"] for row in rows] + front[:, 0].tolist()
    ends = [100 * row[end] for row in rows for end in ("low", "high")] + front[:, 1].tolist()
    width, height = max(max(x) - min(x), 0.1 * max(x)), max(max(ends) - min(ends), 1.0)
    axes.set_xlim(min(x) - 0.08 * width, max(x) + 0.12 * width)
    axes.set_ylim(min(ends) - 0.08 * height, max(ends) + 0.12 * height)


def _labels(axes: Axes, labels: Sequence[Label], lines: Sequence[np.ndarray], theme: Theme) -> None:
    drawn = [line for line in lines if len(line) > 1]
    if drawn:
        place_labels(axes, labels, drawn, size=FONT_SIZE - 0.5, background=theme.background)


def draw_importance(report: Mapping[str, Any], theme: Theme) -> Figure:
    """Bars of each parameter's share in the variance of accuracy and of cost, with intervals."""
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
    heading(figure, "What decides", "functional ANOVA over the first seed's trials; bars are 95 % intervals", theme)
    return figure
