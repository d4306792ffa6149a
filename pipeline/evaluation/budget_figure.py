"""The figure of the budget curve: what a bias on the predictor's logits buys, and where it sends the images."""

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
    title,
)
from pipeline.evaluation.tables import bias_text, cost_words, every

_LABELLED = 7
_MIN_SHARE_NAMED = 15
"""percent: an area that is nowhere higher has no room for its name"""


def draw_budget(report: Mapping[str, Any], theme: Theme) -> Figure:
    """Above: accuracy with its interval against cost, some biases named, and the static line. Below: shares."""
    figure = new_figure(8.2, 6.4, theme)
    upper = figure.add_axes((0.085, 0.4, 0.895, 0.465))
    lower = figure.add_axes((0.085, 0.09, 0.895, 0.22), sharex=upper)
    curve = report["budget_curve"]
    costs = np.array([point["mean_cost"] for point in curve])
    top1, low, high = (100 * np.array([point[key] for point in curve]) for key in ("top1", "top1_low", "top1_high"))
    static = sorted((row for row in report["rows"] if row["kind"] == "static"), key=lambda row: row["mean_cost"])
    line = np.array([(row["mean_cost"], 100 * row["top1"]) for row in static])
    for axes in (upper, lower):
        style_axes(axes, theme)
    upper.fill_between(costs, low, high, color=theme.routed, alpha=0.16, lw=0, zorder=2)
    upper.plot(costs, top1, color=theme.routed, lw=1.8, zorder=4)
    upper.plot(*line.T, color=theme.muted, lw=1.4, ls=(0, (4, 2)), marker="o", ms=5, zorder=3)
    named = every(curve, _LABELLED)
    spots = [(point["mean_cost"], 100 * point["top1"]) for point in named]
    routed = [point["budget_bias"] == 0 for point in named]
    sizes = [60 if trained else 26 for trained in routed]
    upper.scatter(*zip(*spots, strict=True), s=sizes, color=theme.routed, edgecolors=theme.background, zorder=5)
    everything = np.concatenate([low, high, line[:, 1]])
    span = max(np.ptp(everything), 2)
    upper.set_ylim(everything.min() - 0.1 * span, everything.max() + 0.16 * span)
    upper.set_xlim(0, 1.06 * max(costs.max(), line[:, 0].max()))
    percent_axis(upper)
    title(upper, "Top-1, % (band: 95 % interval of each point; dots: budget bias)", theme)
    labels = [
        Label("as trained" if trained else bias_text(point["budget_bias"]), [spot], theme.routed, trained)
        for point, spot, trained in zip(named, spots, routed, strict=True)
    ]
    labels.sort(key=lambda label: not label.bold)
    middle = [tuple(spot) for spot in ((line[1:] + line[:-1]) / 2).tolist()]
    place_labels(
        upper,
        [*labels, Label("static line", middle, theme.muted)],
        [np.stack([costs, top1], axis=1), line],
        size=FONT_SIZE,
        background=theme.background,
    )
    shares = 100 * np.array([point["shares"] for point in curve]).T
    lower.stackplot(costs, shares, colors=resolution_colors(len(report["resolutions"])), lw=0, zorder=2)
    lower.set_ylim(0, 100)
    _name_areas(lower, costs, shares, [f"{side} px" for side in report["resolutions"]], theme)
    title(lower, "Share of images at each resolution, %", theme)
    lower.set_xlabel(cost_words(report).axis, color=theme.muted)
    heading(figure, "What a budget bias does", f"{subject(report)}; the same network, nothing trained again", theme)
    return figure


def _name_areas(axes: Axes, costs: np.ndarray, shares: np.ndarray, names: Sequence[str], theme: Theme) -> None:
    """Write each resolution into its area, where that is highest but for the ends."""
    ends = len(costs) // 10
    tops = shares.cumsum(axis=0)
    for name, area, top in zip(names, shares, tops, strict=True):
        at = ends + int(area[ends : len(costs) - ends].argmax())
        if area[at] >= _MIN_SHARE_NAMED:
            axes.text(costs[at], top[at] - area[at] / 2, name, color=theme.background, ha="center", va="center")
