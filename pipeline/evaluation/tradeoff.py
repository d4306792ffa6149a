"""The figure that matters: accuracy against cost, every way to spend it in one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.evaluation.labels import Label, place_labels
from pipeline.evaluation.style import (
    FONT_SIZE,
    Theme,
    heading,
    new_figure,
    percent_axis,
    resolution_colors,
    style_axes,
    subject,
)
from pipeline.evaluation.tables import cost_words, percent, signed

_MARKERS = {"static": "o", "routed": "D", "random": "s", "oracle": "*"}


def draw_tradeoff(report: Mapping[str, Any], theme: Theme) -> Figure:
    """Static resolutions and their line, routed network, budget curve, random, oracle, and published references.

    A reference that lies farther from the points than they span is left to the report's table.
    """
    figure = new_figure(8.2, 5.6, theme)
    axes = figure.add_axes((0.085, 0.105, 0.895, 0.775))
    style_axes(axes, theme)
    points = [row for row in report["rows"] if row["kind"] in _MARKERS]
    static = sorted((row for row in points if row["kind"] == "static"), key=lambda row: row["mean_cost"])
    line = np.array([_position(row) for row in static])
    curve = np.array([_position(point) for point in report["budget_curve"]]).reshape(-1, 2)
    references = _set_limits(axes, points, curve, report["references"])
    levels = [np.array([[x, 100 * reference["top1"]] for x in axes.get_xlim()]) for reference in references]
    gap = _gap(report)
    axes.plot(*line.T, color=theme.muted, lw=1.4, ls=(0, (4, 2)), zorder=2)
    axes.plot(*curve.T, color=theme.routed, lw=1.5, alpha=0.55, zorder=3)
    axes.plot(*gap.T, color=theme.routed, lw=1.2, ls=(0, (1, 1.5)), zorder=3)
    for level in levels:
        axes.plot(*level.T, color=theme.reference, lw=1.1, ls=(0, (1, 2)), zorder=1)
    colors = {f"static-{side}": color for side, color in zip(report["resolutions"], _sides_colors(report), strict=True)}
    colors |= {"routed": theme.routed, "random": theme.random, "oracle": theme.oracle}
    for row in points:
        _draw_point(axes, row, colors[row["id"]], theme)
    whiskers = [
        np.array([[row["mean_cost"], 100 * row[end]] for end in ("top1_low", "top1", "top1_high")]) for row in points
    ]
    place_labels(
        axes,
        [*_point_labels(points, theme), *_line_labels(report, line, curve, gap, references, levels, theme)],
        [part for part in (line, curve, gap, *whiskers, *levels) if len(part)],
        size=FONT_SIZE,
        background=theme.background,
    )
    axes.set_xlabel(cost_words(report).axis, color=theme.muted)
    axes.set_ylabel("top-1, %", color=theme.muted)
    heading(figure, "Accuracy against cost", f"{subject(report)}; bars are 95 % intervals", theme)
    return figure


def _position(row: Mapping[str, Any]) -> tuple[float, float]:
    return row["mean_cost"], 100 * row["top1"]


def _sides_colors(report: Mapping[str, Any]) -> list[str]:
    return resolution_colors(len(report["resolutions"]))


def _gap(report: Mapping[str, Any]) -> np.ndarray:
    """From the static line up (or down) to the routed network; empty without one, or beyond the line's end."""
    rows = {row["kind"]: row for row in report["rows"]}
    if "routed" not in rows or not np.isclose(rows["interpolation"]["mean_cost"], rows["routed"]["mean_cost"]):
        return np.zeros((0, 2))
    return np.array([_position(rows["interpolation"]), _position(rows["routed"])])


def _set_limits(
    axes: Axes, points: Sequence[Mapping[str, Any]], curve: np.ndarray, references: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Set both axes' limits; returns the references that fit."""
    heights = [100 * row[end] for row in points for end in ("top1_low", "top1_high")] + curve[:, 1].tolist()
    low, high = min(heights), max(heights)
    span = max(high - low, 2)
    near = [reference for reference in references if low - span <= 100 * reference["top1"] <= high + span]
    low, high = (end([edge, *(100 * found["top1"] for found in near)]) for end, edge in ((min, low), (max, high)))
    span = max(high - low, 2)
    axes.set_ylim(low - 0.1 * span, high + 0.14 * span)
    axes.set_xlim(0, 1.1 * max([row["mean_cost"] for row in points] + curve[:, 0].tolist()))
    percent_axis(axes)
    return near


def _draw_point(axes: Axes, row: Mapping[str, Any], color: str, theme: Theme) -> None:
    x, y = _position(row)
    marker = _MARKERS[row["kind"]]
    axes.errorbar(
        [x],
        [y],
        yerr=[[max(0.0, y - 100 * row["top1_low"])], [max(0.0, 100 * row["top1_high"] - y)]],
        fmt=marker,
        ms=13 if marker == "*" else 8.5,
        color=color,
        mec=theme.background,
        mew=1.2,
        elinewidth=1.6,
        capsize=3,
        zorder=5 if row["kind"] == "routed" else 4,
    )


def _point_labels(points: Sequence[Mapping[str, Any]], theme: Theme) -> list[Label]:
    """The routed network's first: labels are placed in this order."""
    colors = {"routed": theme.routed, "oracle": theme.oracle, "random": theme.random, "static": theme.ink}
    ordered = sorted(points, key=lambda row: list(colors).index(row["kind"]))
    return [
        Label(f"{row['label']}  {percent(row['top1'])}", [_position(row)], colors[row["kind"]], row["kind"] == "routed")
        for row in ordered
    ]


def _line_labels(
    report: Mapping[str, Any],
    line: np.ndarray,
    curve: np.ndarray,
    gap: np.ndarray,
    references: Sequence[Mapping[str, Any]],
    levels: Sequence[np.ndarray],
    theme: Theme,
) -> list[Label]:
    labels = []
    if len(gap):
        gain = report["comparisons"]["interpolation"]["difference_points"]
        labels.append(Label(f"{signed(gain)} points", [tuple(gap.mean(axis=0))], theme.routed))
    for reference, level in zip(references, levels, strict=True):
        labels.append(Label(f"{reference['label']}  {percent(reference['top1'])}", _along(level), theme.reference))
    if len(curve):
        labels.append(Label("budget curve", _along(curve), theme.routed))
        labels.append(Label("static line", _along(line), theme.muted))
    return labels


def _along(line: np.ndarray, count: int = 9) -> list[tuple[float, float]]:
    """Points spread evenly over a polyline whose x ascends, without its ends."""
    x = np.linspace(line[0, 0], line[-1, 0], count + 2)[1:-1]
    return list(zip(x.tolist(), np.interp(x, line[:, 0], line[:, 1]).tolist(), strict=True))
