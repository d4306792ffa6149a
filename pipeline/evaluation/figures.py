"""Draw the figures of a report from the values in report.json alone, with matplotlib's object interface and Agg."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.statistics import envelope
from pipeline.evaluation.style import (
    FONT_SIZE,
    LIGHT,
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
from pipeline.evaluation.tables import bias_text, cost_words, every, percent, signed

_MARKERS = {"static": "o", "other": "o", "routed": "D", "random": "s", "oracle": "*"}
_CURVES = {"cascade": "-", "predictor": (0, (5, 1.5)), "predictor+cascade": (0, (1, 1))}


def draw_tradeoff(report: Mapping[str, Any], theme: Theme) -> Figure:
    """Draw static networks and their envelope, the routed network, policy curves, random, oracle and references.

    A reference that is farther from the points than the points' own range is left out. The report's table still lists
    it.
    """
    figure = new_figure(8.2, 5.6, theme)
    axes = figure.add_axes((0.085, 0.105, 0.895, 0.775))
    style_axes(axes, theme)
    points = [row for row in report["rows"] if row["kind"] in _MARKERS]
    line, curves = _static_envelope(report), _policy_curves(report)
    references = _set_limits(axes, points, np.concatenate([line, *curves.values()]), report["references"])
    levels = [np.array([[x, 100 * reference["top1"]] for x in axes.get_xlim()]) for reference in references]
    gap = _gap(report)
    axes.plot(*line.T, zorder=2, **static_line(theme))
    for kind, curve in curves.items():
        axes.plot(*curve.T, color=theme.routed, lw=1.5, alpha=0.6, ls=_CURVES[kind], zorder=3)
    axes.plot(*gap.T, color=theme.routed, lw=1.2, ls=(0, (1, 1.5)), zorder=3)
    for level in levels:
        axes.plot(*level.T, color=theme.reference, lw=1.1, ls=(0, (1, 2)), zorder=1)
    colors = {f"static-{side}": color for side, color in zip(report["resolutions"], _sides_colors(report), strict=True)}
    colors |= {f"other-{side}": theme.muted for side in report["resolutions"]}
    colors |= {"routed": theme.routed, "random": theme.random, "oracle": theme.oracle}
    for row in points:
        draw_point(axes, row, colors[row["id"]], _MARKERS[row["kind"]], theme)
    whiskers = [whisker(row) for row in points]
    place_labels(
        axes,
        [*point_labels(points, theme), *_line_labels(report, line, curves, gap, references, levels, theme)],
        [part for part in (line, *curves.values(), gap, *whiskers, *levels) if len(part)],
        size=FONT_SIZE,
        background=theme.background,
    )
    axes.set_xlabel(cost_words(report).axis, color=theme.muted)
    axes.set_ylabel("top-1, %", color=theme.muted)
    heading(figure, "Accuracy against cost", f"{subject(report)}; bars are 95 % intervals", theme)
    return figure


def point_of(row: Mapping[str, Any]) -> tuple[float, float]:
    """Return the position of a row in a figure: its cost, and its top-1 in percent."""
    return row["mean_cost"], 100 * row["top1"]


def _sides_colors(report: Mapping[str, Any]) -> list[str]:
    return resolution_colors(len(report["resolutions"]))


def _static_envelope(report: Mapping[str, Any]) -> np.ndarray:
    """Return the upper concave envelope of all static networks as a polyline."""
    static = [row for row in report["rows"] if row["kind"] in ("static", "other")]
    costs, accuracies = np.array([(row["mean_cost"], row["top1"]) for row in static]).T
    grid = np.unique(np.concatenate([costs, np.linspace(costs.min(), costs.max(), 60)]))
    heights, _ = envelope(costs, np.tile(accuracies, (len(grid), 1)), grid)
    return np.column_stack([grid, 100 * heights])


def _policy_curves(report: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the accuracy of each kind of policy at rising cost, as polylines of at least two points."""
    curves = report["policies"]["curves"] if report["policies"] else {}
    lines = {kind: np.array([point_of(point) for point in curves.get(kind, [])]).reshape(-1, 2) for kind in _CURVES}
    ordered = {kind: line[np.argsort(line[:, 0], kind="stable")] for kind, line in lines.items()}
    return {kind: line for kind, line in ordered.items() if len(line) > 1}


def _gap(report: Mapping[str, Any]) -> np.ndarray:
    """Return the segment from the envelope to the routed network; empty if the envelope ends at a lower cost."""
    rows = {row["kind"]: row for row in report["rows"]}
    if "routed" not in rows or not np.isclose(rows["envelope"]["mean_cost"], rows["routed"]["mean_cost"]):
        return np.zeros((0, 2))
    return np.array([point_of(rows["envelope"]), point_of(rows["routed"])])


def _set_limits(
    axes: Axes, points: Sequence[Mapping[str, Any]], curve: np.ndarray, references: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Set the limits of both axes and return the references that fit."""
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


def whisker(row: Mapping[str, Any]) -> np.ndarray:
    """Return the interval of a row as a line (3, 2), which labels should not cover."""
    return np.array([[row["mean_cost"], 100 * row[end]] for end in ("top1_low", "top1", "top1_high")])


def static_line(theme: Theme) -> dict[str, Any]:
    """Return the style of the line through the static resolutions."""
    return {"color": theme.muted, "lw": 1.4, "ls": (0, (4, 2))}


def draw_point(
    axes: Axes,
    row: Mapping[str, Any],
    color: str,
    marker: str,
    theme: Theme,
    *,
    size: float = 8.5,
    cost_range: tuple[float, float] | None = None,
) -> None:
    """Draw a row with its interval and, across it, the range of its cost."""
    x, y = point_of(row)
    axes.errorbar(
        [x],
        [y],
        yerr=[[max(0.0, y - 100 * row["top1_low"])], [max(0.0, 100 * row["top1_high"] - y)]],
        xerr=None if cost_range is None else [[max(0.0, x - cost_range[0])], [max(0.0, cost_range[1] - x)]],
        fmt=marker,
        ms=13 if marker == "*" else size,
        color=color,
        mec=theme.background,
        mew=1.2,
        elinewidth=1.6,
        capsize=3,
        zorder=5 if row["kind"] == "routed" else 4,
    )


def point_labels(points: Sequence[Mapping[str, Any]], theme: Theme) -> list[Label]:
    """Return the labels in the order in which they are placed, with the routed network first."""
    colors = {"routed": theme.routed, "oracle": theme.oracle, "random": theme.random}
    colors |= {"static": theme.ink, "other": theme.muted}
    ordered = sorted(points, key=lambda row: list(colors).index(row["kind"]))
    return [
        Label(f"{row['label']}  {percent(row['top1'])}", [point_of(row)], colors[row["kind"]], row["kind"] == "routed")
        for row in ordered
    ]


def _line_labels(
    report: Mapping[str, Any],
    line: np.ndarray,
    curves: Mapping[str, np.ndarray],
    gap: np.ndarray,
    references: Sequence[Mapping[str, Any]],
    levels: Sequence[np.ndarray],
    theme: Theme,
) -> list[Label]:
    labels = []
    if len(gap):
        gain = report["comparisons"]["envelope"]["difference_points"]
        labels.append(Label(f"{signed(gain)} points", [tuple(gap.mean(axis=0))], theme.routed))
    for reference, level in zip(references, levels, strict=True):
        labels.append(Label(f"{reference['label']}  {percent(reference['top1'])}", _along(level), theme.reference))
    labels += [Label(kind, _along(curve), theme.routed) for kind, curve in curves.items()]
    if curves:
        labels.append(Label("static envelope", _along(line), theme.muted))
    return labels


def _along(line: np.ndarray, count: int = 9) -> list[tuple[float, float]]:
    """Return points that are evenly spread over a polyline with ascending x, without its ends."""
    x = np.linspace(line[0, 0], line[-1, 0], count + 2)[1:-1]
    return list(zip(x.tolist(), np.interp(x, line[:, 0], line[:, 1]).tolist(), strict=True))


_NUM_LABELED = 7
_MIN_SHARE_NAMED = 15
"""An area whose share stays below this percentage has no room for its name."""


def draw_budget(report: Mapping[str, Any], theme: Theme) -> Figure:
    """Draw accuracy with its interval, some biases and the static line against cost (above), and shares (below)."""
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
    upper.plot(*line.T, marker="o", ms=5, zorder=3, **static_line(theme))
    named = every(curve, _NUM_LABELED)
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
    heading(figure, "What a budget bias does", f"{subject(report)}; the same network, not retrained", theme)
    return figure


def _name_areas(axes: Axes, costs: np.ndarray, shares: np.ndarray, names: Sequence[str], theme: Theme) -> None:
    """Write each resolution into its area at the place where the area is highest, away from the ends."""
    ends = len(costs) // 10
    tops = shares.cumsum(axis=0)
    for name, area, top in zip(names, shares, tops, strict=True):
        at = ends + int(area[ends : len(costs) - ends].argmax())
        if area[at] >= _MIN_SHARE_NAMED:
            axes.text(costs[at], top[at] - area[at] / 2, name, color=theme.background, ha="center", va="center")


COLUMNS = 8
THUMBNAIL_SIDE = 160
CORRECT, WRONG = "\N{CHECK MARK}", "\N{BALLOT X}"
_TITLE_LENGTH = 15


@dataclass(frozen=True)
class Tile:
    """An image of the gallery with the routed network's answer."""

    index: int
    truth: str
    answer: str
    is_correct: bool
    correct_at: tuple[bool, ...]
    """Whether each resolution is correct."""
    jpeg: bytes
    """The thumbnail as JPEG bytes."""


def pick_tiles(
    predictions: Predictions,
    answered_N: np.ndarray,
    classes: Sequence[str],
    read_image: Callable[[int], bytes],
    *,
    columns: int = COLUMNS,
    seed: int = 0,
) -> list[list[Tile]]:
    """Pick up to `columns` images for each resolution, at random without replacement.

    Args:
        answered_N: index of the resolution whose answer counts for each image.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for j in range(len(predictions.resolutions)):
        sent = np.flatnonzero(answered_N == j)
        picked = generator.choice(sent, size=min(columns, len(sent)), replace=False)
        rows.append([_tile(predictions, classes, read_image, int(n), j) for n in picked])
    return rows


def draw_gallery(tiles: Sequence[Sequence[Tile]], report: Mapping[str, Any]) -> bytes:
    """Return a PNG with one row of images per resolution, each titled with its class and a mark for the answer."""
    columns = max(1, *(len(row) for row in tiles))
    cell, label, top = 1.18, 1.2, 0.6
    width, height = label + cell * columns + 0.1, top + (cell + 0.42) * len(tiles)
    figure = new_figure(width, height, LIGHT, dpi=120)
    colors = resolution_colors(len(tiles))
    shares = report["headline"]["shares"]
    for j, row in enumerate(tiles):
        bottom = (height - top - (cell + 0.42) * (j + 1) + 0.08) / height
        middle = bottom + cell / 2 / height
        name, share = f"{report['resolutions'][j]} px", f"{100 * shares[j]:.0f} % of images"
        figure.text(0.02, middle, name, color=colors[j], fontsize=12, fontweight="bold", va="bottom")
        figure.text(0.02, middle, share, color=LIGHT.muted, fontsize=FONT_SIZE - 3, va="top")
        for k, tile in enumerate(row):
            axes = figure.add_axes(((label + cell * k + 0.05) / width, bottom, (cell - 0.1) / width, cell / height))
            axes.imshow(Image.open(io.BytesIO(tile.jpeg)))
            axes.set_axis_off()
            color = LIGHT.oracle if tile.is_correct else LIGHT.routed
            axes.set_title(tile_title(tile), color=color, fontsize=FONT_SIZE - 3.5, pad=3, parse_math=False)
    subject = f"{report['dataset'] or report['name']}; drawn at random; {CORRECT} correct, {WRONG} wrong (with answer)"
    heading(figure, "Images by chosen resolution", subject, LIGHT)
    return to_png(figure)


def tile_title(tile: Tile) -> str:
    """Return the class and, on a second line, a mark for correct or wrong; a wrong answer follows its mark."""
    second = CORRECT if tile.is_correct else f"{WRONG} {_short(tile.answer)}"
    return f"{_short(tile.truth)}\n{second}"


def _tile(predictions: Predictions, classes: Sequence[str], read_image: Callable[[int], bytes], n: int, j: int) -> Tile:
    index = int(predictions.indices_N[n])
    return Tile(
        index=index,
        truth=classes[int(predictions.labels_N[n])],
        answer=classes[int(predictions.classes_NR[n, j])],
        is_correct=bool(predictions.correct_NR[n, j]),
        correct_at=tuple(predictions.correct_NR[n].tolist()),
        jpeg=_thumbnail(read_image(index)),
    )


def _thumbnail(jpeg: bytes) -> bytes:
    with Image.open(io.BytesIO(jpeg)) as image:
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


def _short(text: str) -> str:
    return text if len(text) <= _TITLE_LENGTH else f"{text[: _TITLE_LENGTH - 1]}\N{HORIZONTAL ELLIPSIS}"


def draw_figures(report: Mapping[str, Any], theme: Theme) -> dict[str, bytes]:
    """Return PNG bytes by name: tradeoff, budget and shares (with several resolutions only), and attribute (if there is
    one)."""
    figures = {"tradeoff": draw_tradeoff(report, theme)}
    if report["budget_curve"]:
        figures["budget"] = draw_budget(report, theme)
    if report["routing"] is not None:
        figures["shares"] = draw_shares(report, theme)
    if report["attributes"]:
        figures["attribute"] = draw_attributes(report, theme)
    return {name: to_png(figure) for name, figure in figures.items()}


def draw_shares(report: Mapping[str, Any], theme: Theme) -> Figure:
    """Draw the share of images at each resolution (left) and static accuracy by chosen resolution (right)."""
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
    heading(figure, "Resolutions of the answers", f"{subject(report)}; colors are resolutions", theme)
    return figure


def draw_attributes(report: Mapping[str, Any], theme: Theme) -> Figure:
    """Draw, for each attribute, the share of each resolution by value (above) and accuracy by value (below)."""
    attributes = report["attributes"]
    figure = new_figure(8.2, 0.95 + 5.2 * len(attributes), theme)
    height = figure.get_figheight()
    for position, (name, found) in enumerate(attributes.items()):
        bottom = (height - 0.85 - 5.2 * (position + 1)) / height
        upper = figure.add_axes((0.085, bottom + 3.15 / height, 0.78, 1.9 / height))
        lower = figure.add_axes((0.085, bottom + 0.65 / height, 0.78, 2.1 / height), sharex=upper)
        _draw_bins(upper, lower, name, found["bins"], report["resolutions"], theme)
    heading(figure, "Chosen resolution by attribute", subject(report), theme)
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
    """Label each line to the right of the axes, at the height of its end. Labels that would overlap are moved apart."""
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
