"""Images by chosen resolution, drawn at random with a seed: a look at what the predictor calls easy and hard."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.style import FONT_SIZE, LIGHT, heading, new_figure, resolution_colors, to_png

COLUMNS = 8
THUMBNAIL_SIDE = 160
RIGHT, WRONG = "\N{CHECK MARK}", "\N{BALLOT X}"
_TITLE_LENGTH = 15


@dataclass(frozen=True)
class Tile:
    """One image of the gallery with the routed network's answer."""

    index: int
    truth: str
    answer: str
    right: bool
    right_at: tuple[bool, ...]
    """for each resolution, whether it is right there"""
    jpeg: bytes
    """thumbnail"""


def pick_tiles(
    predictions: Predictions,
    classes: Sequence[str],
    read_image: Callable[[int], bytes],
    *,
    columns: int = COLUMNS,
    seed: int = 0,
) -> list[list[Tile]]:
    """For each resolution up to `columns` of the images that were sent to it, drawn at random without replacement."""
    generator = np.random.default_rng(seed)
    rows = []
    for j in range(len(predictions.resolutions)):
        sent = np.flatnonzero(predictions.chosen_N == j)
        picked = generator.choice(sent, size=min(columns, len(sent)), replace=False)
        rows.append([_tile(predictions, classes, read_image, int(n), j) for n in picked])
    return rows


def draw_gallery(tiles: Sequence[Sequence[Tile]], report: Mapping[str, Any]) -> bytes:
    """PNG bytes: one row of images a resolution, each titled with its class, the answer and whether it is right."""
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
            color = LIGHT.oracle if tile.right else LIGHT.routed
            axes.set_title(tile_title(tile), color=color, fontsize=FONT_SIZE - 3.5, pad=3, parse_math=False)
    subject = f"{report['dataset'] or report['name']}; drawn at random; {RIGHT} right, {WRONG} wrong (answer instead)"
    heading(figure, "Images by chosen resolution", subject, LIGHT)
    return to_png(figure)


def tile_title(tile: Tile) -> str:
    """`class` and a mark, in two lines; where the answer is wrong the second names it."""
    second = RIGHT if tile.right else f"{WRONG} {_short(tile.answer)}"
    return f"{_short(tile.truth)}\n{second}"


def _tile(predictions: Predictions, classes: Sequence[str], read_image: Callable[[int], bytes], n: int, j: int) -> Tile:
    index = int(predictions.indices_N[n])
    return Tile(
        index=index,
        truth=classes[int(predictions.labels_N[n])],
        answer=classes[int(predictions.classes_NR[n, j])],
        right=bool(predictions.correct_NR[n, j]),
        right_at=tuple(predictions.correct_NR[n].tolist()),
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
