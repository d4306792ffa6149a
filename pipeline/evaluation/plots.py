"""The figures of a report, drawn from report.json's values alone. Agg and matplotlib's object interface only."""

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
    resolution_colors,
    style_axes,
    title,
    to_png,
)


def draw_figures(report: Mapping[str, Any], theme: Theme) -> dict[str, bytes]:
    """PNG bytes by name: tradeoff; with more than one resolution shares; with attributes attribute."""
    figures = {"tradeoff": draw_tradeoff(report, theme)}
    if report["routing"] is not None:
        figures["shares"] = draw_shares(report, theme)
    if report["attributes"]:
        figures["attribute"] = draw_attributes(report, theme)
    return {name: to_png(figure) for name, figure in figures.items()}


def draw_tradeoff(report: Mapping[str, Any], theme: Theme) -> Figure:
    """Accuracy against cost: static resolutions and their line, budget curve, routed, random, oracle, references."""
    figure = new_figure(8.2, 5.6, theme)
    axes = figure.add_axes((0.085, 0.105, 0.895, 0.775))
    style_axes(axes, theme)
    rows = {row["id"]: row for row in report["rows"]}
    static = sorted((row for row in report["rows"] if row["kind"] == "static"), key=lambda row: row["mean_gflops"])
    drawn = [row for row in report["rows"] if row["kind"] != "interpolation"]
    references = report["references"]
    curve = np.array([[point["mean_gflops"], 100 * point["top1"]] for point in report["budget_curve"]]).reshape(-1, 2)
    _limit_tradeoff(axes, drawn, references, curve)
    line = np.array([[row["mean_gflops"], 100 * row["top1"]] for row in static])
    axes.plot(*line.T, color=theme.muted, lw=1.4, ls=(0, (4, 2)), zorder=2)
    if len(curve):
        axes.plot(*curve.T, color=theme.routed, lw=1.5, alpha=0.55, zorder=3)
    side_color = dict(zip(report["resolutions"], resolution_colors(len(report["resolutions"])), strict=True))
    colors = {"routed": theme.routed, "random": theme.random, "oracle": theme.oracle}
    for row in drawn:
        color = colors.get(row["kind"]) or side_color[row["resolution"]]
        _point(axes, row, color, theme, marker=_MARKERS[row["kind"]])
    for reference in references:
        axes.axhline(100 * reference["top1"], color=theme.reference, lw=1.1, ls=(0, (1, 2)), zorder=1)
    whiskers = [
        np.array([[row["mean_gflops"], 100 * row["top1_low"]], [row["mean_gflops"], 100 * row["top1_high"]]])
        for row in drawn
    ]
    left, right = axes.get_xlim()
    levels = [np.array([[left, 100 * r["top1"]], [right, 100 * r["top1"]]]) for r in references]
    place_labels(
        axes,
        _tradeoff_labels(rows, static, references, curve, theme, axes),
        [line, *([curve] if len(curve) else []), *whiskers, *levels],
        size=FONT_SIZE,
        background=theme.background,
    )
    axes.set_xlabel("cost of one image, GFLOPs (1e9 multiply-adds, predictor included)", color=theme.muted)
    axes.set_ylabel("top-1, %", color=theme.muted)
    heading(figure, "Accuracy against cost", f"{_subject(report)}; bars are 95 % intervals", theme)
    return figure


def draw_shares(report: Mapping[str, Any], theme: Theme) -> Figure:
    """Left: share of images at each resolution, routed and oracle. Right: static accuracy by chosen resolution."""
    figure = new_figure(8.2, 4.3, theme)
    left, right = figure.add_axes((0.085, 0.15, 0.37, 0.66)), figure.add_axes((0.555, 0.15, 0.425, 0.66))
    sides, colors = report["resolutions"], resolution_colors(len(report["resolutions"]))
    rows = {row["id"]: row for row in report["rows"]}
    positions = np.arange(len(sides))
    style_axes(left, theme, grid="y")
    routed, oracle = (100 * np.array(rows[kind]["shares"]) for kind in ("routed", "oracle"))
    left.bar(positions, routed, width=0.62, color=colors, zorder=2)
    for position, routed_share, oracle_share in zip(positions, routed, oracle, strict=True):
        left.plot([position - 0.38, position + 0.38], [oracle_share] * 2, color=theme.ink, lw=2, zorder=3)
        top = max(routed_share, oracle_share)
        left.annotate(
            f"{routed_share:.0f} %", (position, top), (0, 5), textcoords="offset points", ha="center", color=theme.ink
        )
    left.set_ylim(0, 1.16 * max(routed.max(), oracle.max()))
    _sides_axis(left, [f"{side} px" for side in sides], theme)
    title(left, "Share of images, % (line: oracle)", theme)
    style_axes(right, theme, grid="y")
    groups = report["routing"]["static_top1_by_chosen"]
    for position, group in enumerate(groups):
        if group[0] is None:
            right.annotate("none", (position, 0.5), xycoords=("data", "axes fraction"), ha="center", color=theme.muted)
            continue
        values = 100 * np.array(group)
        spread = position + 0.13 * (positions - positions.mean())
        right.plot(spread, values, color=theme.muted, lw=1, zorder=2)
        right.scatter(spread, values, s=46, c=colors, zorder=3)
        right.scatter(
            spread[position], values[position], s=150, facecolors="none", edgecolors=theme.ink, linewidths=1.4, zorder=4
        )
    right.set_xlim(-0.6, len(sides) - 0.4)
    right.margins(y=0.12)
    names = [f"{side} px\n{count:,}" for side, count in zip(sides, report["routing"]["counts_by_chosen"], strict=True)]
    _sides_axis(right, names, theme)
    title(right, "Static top-1, %, of the images sent to each (ring: as routed)", theme)
    heading(figure, "What the predictor chooses", f"{_subject(report)}; colours are resolutions", theme)
    return figure


def draw_attributes(report: Mapping[str, Any], theme: Theme) -> Figure:
    """For each attribute: share of each resolution by value (above), accuracy by value (below)."""
    attributes = report["attributes"]
    figure = new_figure(8.2, 1.1 + 5.2 * len(attributes), theme)
    height = figure.get_figheight()
    for position, (name, found) in enumerate(attributes.items()):
        bottom = (height - 0.95 - 5.2 * (position + 1)) / height
        upper = figure.add_axes((0.085, bottom + 3.15 / height, 0.78, 1.9 / height))
        lower = figure.add_axes((0.085, bottom + 0.65 / height, 0.78, 2.1 / height), sharex=upper)
        _draw_bins(upper, lower, name, found["bins"], report["resolutions"], theme)
    heading(figure, "What decides the resolution", _subject(report), theme)
    return figure


_MARKERS = {"static": "o", "routed": "D", "random": "s", "oracle": "*"}


def _tradeoff_labels(
    rows: Mapping[str, Any],
    static: Sequence[Mapping[str, Any]],
    references: Sequence[Mapping[str, Any]],
    curve: np.ndarray,
    theme: Theme,
    axes: Axes,
) -> list[Label]:
    def named(row: Mapping[str, Any], text: str, color: str, bold: bool = False) -> Label:
        return Label(f"{text}  {100 * row['top1']:.1f} %", [(row["mean_gflops"], 100 * row["top1"])], color, bold)

    labels = []
    if "routed" in rows:
        labels.append(named(rows["routed"], "routed", theme.routed, bold=True))
        labels.append(named(rows["oracle"], "oracle", theme.oracle))
        labels.append(named(rows["random"], "random, same shares", theme.random))
    labels += [named(row, row["label"], theme.ink) for row in static]
    left, right = axes.get_xlim()
    for reference in references:
        anchors = [(float(x), 100 * reference["top1"]) for x in np.linspace(left, right, 9)[1:-1]]
        labels.append(Label(f"{reference['label']}  {100 * reference['top1']:.1f} %", anchors, theme.reference))
    if len(curve):
        anchors = [tuple(point) for point in curve[:: max(1, len(curve) // 12)]]
        labels.append(Label("budget curve", anchors, theme.routed))
    return labels


def _limit_tradeoff(
    axes: Axes, rows: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], curve: np.ndarray
) -> None:
    costs = [row["mean_gflops"] for row in rows] + curve[:, 0].tolist()
    heights = [100 * row[key] for row in rows for key in ("top1_low", "top1_high")]
    heights += [100 * reference["top1"] for reference in references] + curve[:, 1].tolist()
    span = max(max(heights) - min(heights), 1)
    axes.set_xlim(0, 1.1 * max(costs))
    axes.set_ylim(min(heights) - 0.08 * span, max(heights) + 0.12 * span)


def _point(axes: Axes, row: Mapping[str, Any], color: str, theme: Theme, marker: str) -> None:
    x, y = row["mean_gflops"], 100 * row["top1"]
    axes.errorbar(
        [x],
        [y],
        yerr=[[max(0.0, y - 100 * row["top1_low"])], [max(0.0, 100 * row["top1_high"] - y)]],
        fmt=marker,
        ms=12 if marker == "*" else 8.5,
        color=color,
        mec=theme.background,
        mew=1.2,
        elinewidth=1.6,
        capsize=3,
        zorder=5 if row["kind"] == "routed" else 4,
    )


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
    title(lower, f"Top-1, %, by {name}", theme)
    lower.set_xlabel(name, color=theme.muted)
    if not ranges:
        lower.set_xticks(centers, [f"{part['low']:g}" for part in bins])
    _end_labels(lower, ends)


def _end_labels(axes: Axes, ends: Sequence[tuple[float, str, str, bool]]) -> None:
    """Name each line right of the axes, at the height of its end, pushed apart where they would touch."""
    low, high = axes.get_ylim()
    box = axes.get_position()
    gap = 1.45 * FONT_SIZE / 72 / (box.height * axes.figure.get_figheight())
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


def _subject(report: Mapping[str, Any]) -> str:
    return f"{report['dataset'] or report['name']}, {report['n']:,} validation images"
