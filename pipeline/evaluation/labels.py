"""Direct labels in a figure: each beside what it names, none over another, few over a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

_DIRECTIONS = 24
_DISTANCES = (7, 12, 18, 26, 36, 50, 68, 90, 120)  # points from what is named
_LEADER_FROM = 18  # points; a label farther away gets a thin line to its point
_PADDING = 2.5  # points around a label's box
_STEP = 3.0  # points between the samples of a line that labels keep away from


@dataclass(frozen=True)
class Label:
    """A text for one of several equally good anchors, in data coordinates."""

    text: str
    anchors: Sequence[tuple[float, float]]
    color: str
    bold: bool = False


@dataclass(frozen=True)
class _Place:
    penalty: float
    offset: np.ndarray
    anchor: tuple[float, float]
    box: Bbox
    distance: float


def place_labels(
    axes: Axes, labels: Sequence[Label], lines: Sequence[np.ndarray], *, size: float, background: str
) -> None:
    """Write `labels`, in their order of importance, where they cover nothing.

    For each label all directions and distances around its anchors are tried and the place with the least penalty is
    taken: another label or the edge counts most, then the samples of lines below it, then the distance.

    Args:
        axes: with final limits and position.
        lines: polylines (M, 2) in data coordinates, points as lines of one, that labels should not cover.
        size: of the font, points.
        background: colour of the halo around the letters.
    """
    canvas = cast(FigureCanvasAgg, axes.figure.canvas)
    scale = axes.figure.dpi / 72
    frame = axes.get_window_extent(canvas.get_renderer())
    occupied = np.concatenate([_samples(axes, line, _STEP * scale) for line in lines])
    taken: list[Bbox] = []
    for label in labels:
        style: dict[str, Any] = {"fontsize": size, "color": label.color, "parse_math": False}
        style["fontweight"] = "bold" if label.bold else "normal"
        probe = axes.text(0, 0, label.text, **style)
        extent = probe.get_window_extent(canvas.get_renderer())
        probe.remove()
        half = np.array([extent.width, extent.height]) / 2 + _PADDING * scale
        places = (
            place
            for anchor in label.anchors
            for place in _places(axes.transData.transform(anchor), anchor, half, scale, frame, taken, occupied)
        )
        best = min(places, key=lambda place: place.penalty)
        taken.append(best.box)
        far = best.distance >= _LEADER_FROM
        leader = {"arrowstyle": "-", "color": label.color, "lw": 0.7, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
        text = axes.annotate(
            label.text,
            xy=best.anchor,
            xytext=tuple(best.offset / scale),
            textcoords="offset points",
            ha="center",
            va="center",
            arrowprops=leader if far else None,
            annotation_clip=False,
            zorder=10,
            **style,
        )
        text.set_path_effects([withStroke(linewidth=2.5, foreground=background)])
        if far:
            centre = axes.transData.transform(best.anchor) + best.offset
            occupied = np.concatenate(
                [occupied, np.linspace(axes.transData.transform(best.anchor), centre, num=12, endpoint=False)]
            )


def _places(
    point: np.ndarray,
    anchor: tuple[float, float],
    half: np.ndarray,
    scale: float,
    frame: Bbox,
    taken: Sequence[Bbox],
    occupied: np.ndarray,
):
    """Every candidate place of a box of half size `half` around `point`; lengths are pixels."""
    for angle in np.linspace(0, 2 * np.pi, _DIRECTIONS, endpoint=False):
        direction = np.array([np.cos(angle), np.sin(angle)])
        # From the box's centre to its edge in this direction, so that every direction leaves the same gap.
        reach = float(np.min(half / np.maximum(np.abs(direction), 1e-9)))
        for distance in _DISTANCES:
            offset = direction * (distance * scale + reach)
            low, high = point + offset - half, point + offset + half
            box = Bbox([low, high])
            inside = ((occupied > low) & (occupied < high)).all(axis=1).sum()
            outside = low[0] < frame.x0 or low[1] < frame.y0 or high[0] > frame.x1 or high[1] > frame.y1
            collisions = sum(box.overlaps(other) for other in taken)
            penalty = 10_000.0 * (collisions + outside) + 40 * inside + distance + 3 * abs(direction[0] * direction[1])
            yield _Place(penalty, offset, anchor, box, distance)


def _samples(axes: Axes, line: np.ndarray, step: float) -> np.ndarray:
    """Points of a polyline, at most `step` pixels apart, in pixels."""
    pixels = axes.transData.transform(np.asarray(line, np.float64).reshape(-1, 2))
    if len(pixels) == 1:
        return pixels
    lengths = np.hypot(*np.diff(pixels, axis=0).T)
    return np.concatenate(
        [
            np.linspace(start, end, num=max(2, int(length / step) + 1))
            for start, end, length in zip(pixels[:-1], pixels[1:], lengths, strict=True)
        ]
    )
