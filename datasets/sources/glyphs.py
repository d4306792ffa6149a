"""Generated images with a known required resolution: one letter of widely varying height over a textured background.

A letter of 9 % of the image side can be recognized only at full resolution, one of 60 % already at a third of it. So
choosing the resolution can save cost. Every image is a pure function of (settings, split, index). It does not depend on
the number of processes or on the order in which images are drawn.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from datasets.files import SPLITS, TRAIN, VALIDATION
from datasets.parallel import map_ordered
from datasets.sources.index import ImageIndex, ImageRef, Source, SourceError, checked, choose

LETTERS = "BCDEFGHKRS"
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "STIXGeneral",
    "STIXGeneralBol",
)
GENERATOR_VERSION = 2
JPEG_QUALITY = 92
IMAGES_PER_CHUNK = 100
MASTER_HEIGHT = 256
MARKER = "generated.json"


@dataclass(frozen=True)
class GlyphSettings:
    """The settings of the generated images. Heights are fractions of `image_size`, which is in pixels."""

    num_train: int = 6000
    num_validation: int = 2000
    image_size: int = 128
    min_height: float = 0.09
    max_height: float = 0.7
    seed: int = 0

    def count(self, split: str) -> int:
        """Return the number of images of a split."""
        return {TRAIN: self.num_train, VALIDATION: self.num_validation}[split]


@dataclass(frozen=True)
class Glyph:
    """A letter to draw: label, font, and height and width of its ink in pixels."""

    label: int
    font: int
    height: int
    width: int


def glyph_label(index: int) -> int:
    """Return the class of the image at `index`. The classes take turns."""
    return index % len(LETTERS)


def glyph_name(split: str, index: int) -> str:
    """Return the path of an image, relative to the folder of generated images."""
    return f"{split}/{LETTERS[glyph_label(index)]}/{index:05d}.jpg"


def glyph_height(settings: GlyphSettings, split: str, index: int) -> float:
    """Return the height of the letter's ink in the image at `index`, as a fraction of the image side."""
    return _random_glyph(settings, _generator(settings, split, index), index).height / settings.image_size


def render(settings: GlyphSettings, split: str, index: int) -> NDArray[np.uint8]:
    """Draw the image at `index` of a split: uint8 (image_size, image_size, 3), RGB."""
    rng = _generator(settings, split, index)
    glyph = _random_glyph(settings, rng, index)
    side = settings.image_size
    top, left = (int(rng.integers(0, side - extent + 1)) for extent in (glyph.height, glyph.width))
    image_CHW = _background(side, rng)
    mask_HW = np.asarray(_master(glyph.label, glyph.font).resize((glyph.width, glyph.height), Image.Resampling.BOX))
    under_CHW = image_CHW[:, top : top + glyph.height, left : left + glyph.width]
    under_CHW += (mask_HW / np.float32(255)) * (_ink_color(under_CHW, rng)[:, None, None] - under_CHW)
    image_CHW += rng.standard_normal((side, side), np.float32) * np.float32(rng.uniform(1, 3))
    return np.clip(np.rint(image_CHW), 0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def scan_glyphs(folder: Path, settings: GlyphSettings, images_per_class: int | None, seed: int) -> Source:
    """Find the images that `generate` writes into `folder`. Each has its letter's height as attribute "height"."""

    def read_index() -> ImageIndex:
        splits = {split: _refs(folder, settings, split) for split in SPLITS}
        splits[TRAIN] = choose(splits[TRAIN], images_per_class, seed)
        return checked(ImageIndex(list(LETTERS), splits, ("height",)))

    # The images follow from the settings alone, so they need not exist to know that nothing changed.
    return Source(json.dumps({**asdict(settings), "generator": GENERATOR_VERSION}, sort_keys=True), read_index)


def generate(
    folder: Path, settings: GlyphSettings, num_processes: int, advance: Callable[[int], None] = lambda count: None
) -> None:
    """Write `folder`/SPLIT/LETTER/NNNNN.jpg for every image, unless these images already exist.

    Args:
        folder: images of other settings, or of an interrupted generation, are replaced.
        advance: called with the number of images that were written since its last call.

    Raises:
        SourceError: `folder` has files that were not generated here.
    """
    if is_generated(folder, settings):
        return
    if (folder / MARKER).is_file():
        shutil.rmtree(folder)
    if folder.exists() and any(folder.iterdir()):
        raise SourceError(f"{folder} has files that were not generated; move them, or choose another data.folder")
    for split in SPLITS:
        for letter in LETTERS:
            (folder / split / letter).mkdir(parents=True, exist_ok=True)
    # The marker file says that the folder is generated before the first image, and that it is complete after the last.
    (folder / MARKER).write_text("{}")
    chunks = [
        (split, range(start, min(start + IMAGES_PER_CHUNK, settings.count(split))))
        for split in SPLITS
        for start in range(0, settings.count(split), IMAGES_PER_CHUNK)
    ]
    for count in map_ordered(partial(_write_chunk, folder, settings), chunks, num_processes):
        advance(count)
    (folder / MARKER).write_text(json.dumps(_marker(settings), indent=2) + "\n")


def is_generated(folder: Path, settings: GlyphSettings) -> bool:
    """Return whether `folder` has all images of exactly these settings, drawn by this generator."""
    try:
        complete = json.loads((folder / MARKER).read_text()) == _marker(settings)
    except (OSError, ValueError):
        return False
    return complete and all(
        sum(1 for _ in (folder / split).glob("*/*.jpg")) == settings.count(split) for split in SPLITS
    )


def _marker(settings: GlyphSettings) -> dict[str, object]:
    # Pillow's font rendering and numpy's distributions may change with their versions.
    versions = {"generator": GENERATOR_VERSION, "numpy": np.__version__, "pillow": PIL.__version__}
    return {"settings": asdict(settings), "versions": versions}


def _refs(folder: Path, settings: GlyphSettings, split: str) -> list[ImageRef]:
    refs = []
    for index in range(settings.count(split)):
        name, height = glyph_name(split, index), glyph_height(settings, split, index)
        path = folder / name
        refs.append(ImageRef(name, glyph_label(index), str(path), 0, path.stat().st_size, (height,)))
    return refs


def _write_chunk(folder: Path, settings: GlyphSettings, chunk: tuple[str, range]) -> int:
    split, indices = chunk
    for index in indices:
        buffer = io.BytesIO()
        Image.fromarray(render(settings, split, index)).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        (folder / glyph_name(split, index)).write_bytes(buffer.getvalue())
    return len(indices)


def _generator(settings: GlyphSettings, split: str, index: int) -> np.random.Generator:
    seed = np.random.SeedSequence([settings.seed & 0xFFFFFFFFFFFFFFFF, SPLITS.index(split), index])
    return np.random.Generator(np.random.Philox(seed))


def _random_glyph(settings: GlyphSettings, rng: np.random.Generator, index: int) -> Glyph:
    """Choose the font and height of a letter at random. The height is log-uniform, so every doubling of the size is
    equally likely."""
    label, font, side = glyph_label(index), int(rng.integers(len(FONTS))), settings.image_size
    height = round(side * math.exp(rng.uniform(math.log(settings.min_height), math.log(settings.max_height))))
    master = _master(label, font)
    aspect = master.width / master.height
    height = min(max(height, 1), side, int(side / aspect))
    return Glyph(label, font, height, min(max(round(height * aspect), 1), side))


@cache
def _master(label: int, font: int) -> Image.Image:
    """Render a letter large and cropped to its ink: grayscale, 255 is ink."""
    import matplotlib  # takes half a second, and a folder that is already prepared needs no fonts

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{FONTS[font]}.ttf")
    canvas = Image.new("L", (3 * MASTER_HEIGHT, 3 * MASTER_HEIGHT))
    face = ImageFont.truetype(str(path), MASTER_HEIGHT, layout_engine=ImageFont.Layout.BASIC)
    ImageDraw.Draw(canvas).text((MASTER_HEIGHT, MASTER_HEIGHT // 2), LETTERS[label], fill=255, font=face)
    return canvas.crop(canvas.getbbox())


def _background(side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw a gradient, gratings and smooth noise of several scales, each with a tint: float32 (3, side, side)."""
    y_HW, x_HW = np.mgrid[0:side, 0:side].astype(np.float32) / side - np.float32(0.5)
    image_CHW = np.empty((3, side, side), np.float32)
    image_CHW[:] = (rng.uniform(70, 185) + rng.uniform(-35, 35, (3, 1, 1))).astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    _add_tinted(image_CHW, x_HW * math.cos(angle) + y_HW * math.sin(angle), rng.uniform(0, 45), rng)
    for _ in range(2):
        angle, cycles, phase = rng.uniform(0, math.pi), math.exp(rng.uniform(0.7, 3.2)), rng.uniform(0, 2 * math.pi)
        wave_HW = np.sin((x_HW * math.cos(angle) + y_HW * math.sin(angle)) * (2 * math.pi * cycles) + phase)
        _add_tinted(image_CHW, wave_HW, rng.uniform(0, 8), rng)
    for cells in (4, 12, 36):
        grid = Image.fromarray(rng.standard_normal((cells, cells), np.float32))
        noise_HW = np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC))
        _add_tinted(image_CHW, noise_HW, rng.uniform(1, 8), rng)
    return image_CHW


def _add_tinted(
    image_CHW: NDArray[np.float32], pattern_HW: NDArray[np.float32], amplitude: float, rng: np.random.Generator
) -> None:
    image_CHW += pattern_HW * (amplitude * rng.uniform(0.7, 1.3, (3, 1, 1))).astype(np.float32)


def _ink_color(under_CHW: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw a color 70 to 140 gray levels darker or lighter than what it covers: float32 (3,)."""
    ground_C = under_CHW.mean(axis=(1, 2))
    sign = -1 if rng.random() < ground_C.mean() / 255 else 1
    return (ground_C + sign * rng.uniform(70, 140) + rng.uniform(-25, 25, 3)).astype(np.float32)
