"""The style of every figure: colors for light and dark, axes, headings, and labels that do not overlap."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter

DPI = 180
FONT_SIZE = 10.5
_RESOLUTION_COLORS = LinearSegmentedColormap.from_list("resolutions", ["#3565b8", "#2a9d9d", "#79b86b", "#d0a01e"])


@dataclass(frozen=True)
class Theme:
    """The colors of the light or the dark theme. Resolutions have the same colors in both."""

    background: str
    ink: str
    muted: str
    grid: str
    routed: str
    oracle: str
    random: str
    reference: str


LIGHT = Theme("#ffffff", "#1c2128", "#656d76", "#e4e7eb", "#c8401a", "#1f7a3d", "#6b7280", "#7c4dbd")
DARK = Theme("#161b22", "#e6edf3", "#9aa4af", "#2b323b", "#ff8a5c", "#5fd38a", "#a3adb8", "#c3a1ff")


def resolution_colors(num_resolutions: int) -> list[str]:
    """Return one color per resolution, largest first, from blue to yellow, readable on light and dark."""
    return [to_hex(_RESOLUTION_COLORS(position)) for position in np.linspace(0, 1, max(num_resolutions, 2))][
        :num_resolutions
    ]


def new_figure(width: float, height: float, theme: Theme, dpi: int = DPI) -> Figure:
    """Return an empty figure of `width` x `height` inches on an Agg canvas."""
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor=theme.background)
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure) -> bytes:
    """Return the figure as PNG bytes without a date, so that equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()


def style_axes(axes: Axes, theme: Theme, grid: Literal["both", "x", "y"] = "both") -> None:
    """Style the axes: no box, a light grid below everything."""
    axes.set_facecolor(theme.background)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.grid)
    axes.tick_params(colors=theme.muted, labelsize=FONT_SIZE - 1, length=0, pad=5)
    axes.grid(True, axis=grid, color=theme.grid, lw=0.8, zorder=0)
    axes.set_axisbelow(True)


def percent_axis(axes: Axes) -> None:
    """Hide the numbers above 100 on the y axis, where no accuracy can be, to make room for labels and markers."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value <= 100 else ""))


def title(axes: Axes, text: str, theme: Theme) -> None:
    """Write the title of one pair of axes."""
    axes.set_title(text, loc="left", color=theme.ink, fontsize=FONT_SIZE, pad=9, parse_math=False)


def heading(figure: Figure, text: str, subtitle: str, theme: Theme) -> None:
    """Write the title and the subtitle of a figure."""
    height = figure.get_figheight()
    left: dict[str, Any] = {"x": 0.02, "ha": "left", "va": "top", "parse_math": False}
    figure.text(y=1 - 0.12 / height, s=text, color=theme.ink, fontsize=13, fontweight="bold", **left)
    figure.text(y=1 - 0.39 / height, s=subtitle, color=theme.muted, fontsize=FONT_SIZE - 1, **left)


def subject(report: Mapping[str, Any]) -> str:
    """Return the subtitle that the figures of a report share: data set and number of images."""
    return f"{report['dataset'] or report['name']}, {report['n']:,} validation images"


_DIRECTIONS = 24
_DISTANCES = (7, 12, 18, 26, 36, 50, 68, 90, 120)  # points between a label and its anchor
_LEADER_FROM = 18  # points; a label farther away gets a thin line to its point
_LEADER_SAMPLES = 16
_PADDING = 2.5  # points around a label's box
_STEP = 3.0  # points between the samples of a line that labels should not cover


@dataclass(frozen=True)
class Label:
    """A text with several equally good anchors, in data coordinates."""

    text: str
    anchors: Sequence[tuple[float, float]]
    color: str
    bold: bool = False


def place_labels(
    axes: Axes, labels: Sequence[Label], lines: Sequence[np.ndarray], *, size: float, background: str
) -> None:
    """Write `labels`, the most important first, at places where they cover nothing.

    Each label is placed where the penalty is lowest, among several directions and distances around its anchors. The
    penalty is highest for covering another label or the edge, then for covering lines, then for distance.

    Args:
        axes: axes with final limits and position.
        lines: polylines (M, 2) in data coordinates that labels should not cover.
        size: font size in points.
        background: color of the halo around the letters.
    """
    renderer = cast(FigureCanvasAgg, axes.figure.canvas).get_renderer()
    scale = axes.figure.dpi / 72
    frame = axes.get_window_extent(renderer)
    occupied = np.concatenate([_samples(axes, line, _STEP * scale) for line in lines])
    boxes = np.zeros((0, 2, 2))  # of the labels placed so far: low and high corner, pixels
    for label in labels:
        style: dict[str, Any] = {"fontsize": size, "color": label.color, "parse_math": False}
        style["fontweight"] = "bold" if label.bold else "normal"
        probe = axes.text(0, 0, label.text, **style)
        extent = probe.get_window_extent(renderer)
        probe.remove()
        half = np.array([extent.width, extent.height]) / 2 + _PADDING * scale
        offsets, distances = _offsets(half, scale)
        points = axes.transData.transform(label.anchors)
        penalties = np.stack(
            [_penalties(point, offsets, half, frame.get_points(), boxes, occupied) for point in points]
        )
        which, best = np.unravel_index(np.argmin(penalties + distances), penalties.shape)
        center = points[which] + offsets[best]
        boxes = np.concatenate([boxes, [[center - half, center + half]]])
        leader = None
        if distances[best] >= _LEADER_FROM:
            leader = {"arrowstyle": "-", "color": label.color, "lw": 0.7, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
            occupied = np.concatenate([occupied, np.linspace(points[which], center, _LEADER_SAMPLES)])
        text = axes.annotate(
            label.text,
            xy=label.anchors[int(which)],
            xytext=tuple(offsets[best] / scale),
            textcoords="offset points",
            ha="center",
            va="center",
            arrowprops=leader,
            zorder=10,
            **style,
        )
        text.set_path_effects([withStroke(linewidth=2.5, foreground=background)])


def _offsets(half: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return candidate centers (M, 2) of a box of half size `half`, pixels from its anchor, and distances in points."""
    angles = np.linspace(0, 2 * np.pi, _DIRECTIONS, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # Add the distance from the box's center to its edge, so that the gap is the same in every direction.
    reach = np.min(half / np.maximum(np.abs(directions), 1e-9), axis=1)
    lengths = reach[:, None] + np.array(_DISTANCES) * scale
    offsets = directions[:, None] * lengths[:, :, None]
    return offsets.reshape(-1, 2), np.tile(np.array(_DISTANCES, np.float64), _DIRECTIONS)


def _penalties(
    point: np.ndarray, offsets: np.ndarray, half: np.ndarray, frame: np.ndarray, boxes: np.ndarray, occupied: np.ndarray
) -> np.ndarray:
    """Return the penalty of each candidate place, (M,).

    The penalty is 10,000 for each label that the place covers and if it leaves the axes, 1,000 for each label that its
    leader line crosses, and 40 for each sample of a line that it covers.
    """
    low, high = point + offsets - half, point + offsets + half
    outside = (low < frame[0]).any(axis=1) | (high > frame[1]).any(axis=1)
    overlapping = ((low[:, None] < boxes[:, 1]) & (high[:, None] > boxes[:, 0])).all(axis=2).sum(axis=1)
    leaders = point + offsets[:, None] * np.linspace(0, 1, _LEADER_SAMPLES)[:, None]
    crossed = _inside(leaders[:, :, None], boxes[:, 0], boxes[:, 1]).any(axis=1).sum(axis=1)
    covered = _inside(occupied, low[:, None], high[:, None]).sum(axis=1)
    return 10_000.0 * (outside + overlapping) + 1000.0 * crossed + 40.0 * covered


def _inside(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.all((points > low) & (points < high), axis=-1)


def _samples(axes: Axes, line: np.ndarray, step: float) -> np.ndarray:
    """Return points of a polyline in pixels, about `step` pixels apart."""
    pixels = axes.transData.transform(line)
    along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(pixels, axis=0).T))])
    wanted = np.linspace(0, along[-1], int(along[-1] / step) + 2)
    return np.stack([np.interp(wanted, along, pixels[:, axis]) for axis in (0, 1)], axis=1)
