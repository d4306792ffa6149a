"""How every figure looks: colours for light and dark, axes, headings. No global state of matplotlib is touched."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

DPI = 180
FONT_SIZE = 10.5
_RESOLUTION_COLORS = LinearSegmentedColormap.from_list("resolutions", ["#3565b8", "#2a9d9d", "#79b86b", "#d0a01e"])


@dataclass(frozen=True)
class Theme:
    """Colours of one look; resolutions have the same colours in both."""

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
    """One colour for each resolution, the largest first, from blue to yellow; readable on light and dark."""
    return [to_hex(_RESOLUTION_COLORS(position)) for position in np.linspace(0, 1, max(num_resolutions, 2))][
        :num_resolutions
    ]


def new_figure(width: float, height: float, theme: Theme, dpi: int = DPI) -> Figure:
    """An empty figure of `width` x `height` inches on an Agg canvas."""
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor=theme.background)
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as PNG bytes, without a date: equal figures are equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()


def style_axes(axes: Axes, theme: Theme, grid: Literal["both", "x", "y"] = "both") -> None:
    """Quiet axes: no box, a light grid below everything."""
    axes.set_facecolor(theme.background)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.grid)
    axes.tick_params(colors=theme.muted, labelsize=FONT_SIZE - 1, length=0, pad=5)
    axes.grid(True, axis=grid, color=theme.grid, lw=0.8, zorder=0)
    axes.set_axisbelow(True)


def percent_axis(axes: Axes) -> None:
    """No number above 100 on the y axis: labels and markers need the room there, accuracies do not."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value <= 100 else ""))


def title(axes: Axes, text: str, theme: Theme) -> None:
    """What one pair of axes shows."""
    axes.set_title(text, loc="left", color=theme.ink, fontsize=FONT_SIZE, pad=9, parse_math=False)


def heading(figure: Figure, text: str, subtitle: str, theme: Theme) -> None:
    """What the figure shows, and of what."""
    height = figure.get_figheight()
    left: dict[str, Any] = {"x": 0.02, "ha": "left", "va": "top", "parse_math": False}
    figure.text(y=1 - 0.12 / height, s=text, color=theme.ink, fontsize=13, fontweight="bold", **left)
    figure.text(y=1 - 0.39 / height, s=subtitle, color=theme.muted, fontsize=FONT_SIZE - 1, **left)


def subject(report: Mapping[str, Any]) -> str:
    """What the figures of a report are about."""
    return f"{report['dataset'] or report['name']}, {report['n']:,} validation images"
