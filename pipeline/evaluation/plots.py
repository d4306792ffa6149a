"""The figures of a report, drawn from report.json's values alone. Agg and matplotlib's object interface only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.evaluation.budget_figure import draw_budget
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
    to_png,
)
from pipeline.evaluation.tradeoff import draw_tradeoff


def draw_figures(report: Mapping[str, Any], theme: Theme) -> dict[str, bytes]:
    """PNG bytes by name: tradeoff; with more than one resolution budget and shares; with attributes attribute."""
    figures = {"tradeoff": draw_tradeoff(report, theme)}
    if report["routing"] is not None:
        figures["budget"] = draw_budget(report, theme)
        figures["shares"] = draw_shares(report, theme)
    if report["attributes"]:
        figures["attribute"] = draw_attributes(report, theme)
    return {name: to_png(figure) for name, figure in figures.items()}


def draw_shares(report: Mapping[str, Any], theme: Theme) -> Figure:
    """Left: share of images at each resolution, routed and oracle. Right: static accuracy by chosen resolution."""
    figure = new_figure(8.2, 4.4, theme)
    left, right = figure.add_axes((0.085, 0.145, 0.37, 0.6)), figure.add_axes((0.555, 0.145, 0.425, 0.6))
    sides, colors = report["resolutions"], resolution_colors(len(report["resolutions"]))
    rows = {row["id"]: row for row in report["rows"]}
    positions = np.arange(len(sides))
    style_axes(left, theme, grid="y")
    routed, oracle = (100 * np.array(rows[kind]["shares"]) for kind in ("routed", "oracle"))
    left.bar(positions, routed, width=0.62, color=colors, zorder=2)
    for position, share in zip(positions, oracle, strict=True):
        left.plot([position - 0.38, position + 0.38], [share, share], color=theme.ink, lw=2, zorder=3)
    left.set_ylim(0, 1.06 * max(routed.max(), oracle.max()))
    texts = [f"{side} px\n{share:.0f} %" for side, share in zip(sides, routed, strict=True)]
    _sides_axis(left, texts, theme)
    title(left, "Share of images, % (line: oracle)", theme)
    style_axes(right, theme, grid="y")
    groups = report["routing"]["static_top1_by_chosen"]
    for position, group in enumerate(groups):
        if group[0] is None:
            right.annotate("none", (position, 0.5), xycoords=("data", "axes fraction"), ha="center", color=theme.muted)
            continue
        values = 100 * np.array(group)
        spread = position + 0.62 / len(sides) * (positions - positions.mean())
        right.plot(spread, values, color=theme.muted, lw=1, zorder=2)
        right.scatter(spread, values, s=40, c=colors, zorder=3)
        right.scatter(
            spread[position], values[position], s=130, facecolors="none", edgecolors=theme.ink, linewidths=1.4, zorder=4
        )
    right.set_xlim(-0.6, len(sides) - 0.4)
    low, high = right.dataLim.intervaly
    margin = max(0.12 * (high - low), 2.5 - (high - low) / 2)
    right.set_ylim(low - margin, high + margin)
    percent_axis(right)
    names = [f"{side} px\n{count:,}" for side, count in zip(sides, report["routing"]["counts_by_chosen"], strict=True)]
    _sides_axis(right, names, theme)
    title(right, "Static top-1 by choice, % (ring: as routed)", theme)
    heading(figure, "What the predictor chooses", f"{subject(report)}; colours are resolutions", theme)
    return figure


def draw_attributes(report: Mapping[str, Any], theme: Theme) -> Figure:
    """For each attribute: share of each resolution by value (above), accuracy by value (below)."""
    attributes = report["attributes"]
    figure = new_figure(8.2, 0.95 + 5.2 * len(attributes), theme)
    height = figure.get_figheight()
    for position, (name, found) in enumerate(attributes.items()):
        bottom = (height - 0.85 - 5.2 * (position + 1)) / height
        upper = figure.add_axes((0.085, bottom + 3.15 / height, 0.78, 1.9 / height))
        lower = figure.add_axes((0.085, bottom + 0.65 / height, 0.78, 2.1 / height), sharex=upper)
        _draw_bins(upper, lower, name, found["bins"], report["resolutions"], theme)
    heading(figure, "What decides the resolution", subject(report), theme)
    return figure


def _draw_bins(
    upper: Axes, lower: Axes, name: str, bins: Sequence[Mapping[str, Any]], sides: Sequence[int], theme: Theme
) -> None:
    colors = resolution_colors(len(sides))
    ranges = any(part["low"] != part["high"] for part in bins)
    if ranges:
        edges = np.array([[part["low"], part["high"]] for part in bins])
        centers, widths = edges.mean(axis=1), 0.94 * (edges[:, 1] - edges[:, 0])
    else:
        centers, widths = np.arange(len(bins), dtype=float), np.full(len(bins), 0.7)
    for axes in (upper, lower):
        style_axes(axes, theme, grid="y")
    shares = 100 * np.array([part["shares"] for part in bins])
    base = np.zeros(len(bins))
    for j in range(len(sides)):
        upper.bar(centers, shares[:, j], widths, bottom=base, color=colors[j], zorder=2)
        base = base + shares[:, j]
    upper.set_ylim(0, 100)
    title(upper, f"Share of images sent to each resolution, %, by {name}", theme)
    upper.tick_params(labelbottom=False)
    ends = []
    for j, side in enumerate(sides):
        values = [100 * part["static_top1"][j] for part in bins]
        lower.plot(centers, values, color=colors[j], lw=1.6, marker="o", ms=4, zorder=3)
        ends.append((values[-1], f"static {side} px", colors[j], False))
    if len(sides) > 1:
        routed = [100 * part["routed_top1"] for part in bins]
        lower.plot(centers, routed, color=theme.routed, lw=2.6, marker="D", ms=5, zorder=4)
        ends.append((routed[-1], "routed", theme.routed, True))
    lower.margins(y=0.1)
    percent_axis(lower)
    title(lower, f"Top-1, %, by {name}", theme)
    lower.set_xlabel(name, color=theme.muted, parse_math=False)
    if not ranges:
        lower.set_xticks(centers, [f"{part['low']:g}" for part in bins])
    _end_labels(lower, ends)


def _end_labels(axes: Axes, ends: Sequence[tuple[float, str, str, bool]]) -> None:
    """Name each line right of the axes, at the height of its end, pushed apart where they would touch."""
    low, high = axes.get_ylim()
    gap = 1.45 * FONT_SIZE / 72 * axes.figure.dpi / axes.bbox.height
    ordered = sorted(ends)
    heights = [(value - low) / (high - low) for value, *_ in ordered]
    for k in range(1, len(heights)):
        heights[k] = max(heights[k], heights[k - 1] + gap)
    heights[-1] = min(heights[-1], 0.98)
    for k in reversed(range(len(heights) - 1)):
        heights[k] = min(heights[k], heights[k + 1] - gap)
    for (_, text, color, bold), height in zip(ordered, heights, strict=True):
        weight = "bold" if bold else "normal"
        axes.text(1.015, height, text, transform=axes.transAxes, color=color, va="center", fontweight=weight)


def _sides_axis(axes: Axes, names: Sequence[str], theme: Theme) -> None:
    axes.set_xticks(range(len(names)), names, color=theme.ink)
