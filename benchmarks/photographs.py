"""The images that benches read: the user's own, or generated ones with the statistics of photographs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT, QUALITY = 500, 400, 90
NUM_GENERATED = 64
CLASSES = ("first", "second")
SUFFIXES = (".jpg", ".jpeg")

# A photograph's amplitude falls with frequency as f ** -FALL (Field, J. Opt. Soc. Am. A 4, 1987), down to the camera's
# noise. The deviations are gray levels of luma and chroma.
FALL = 1.2
DEVIATION, CHROMA_DEVIATION, NOISE = 50.0, 14.0, 3.0


def write_photographs(folder: Path, source: Path | None, count: int) -> Path:
    """Write `count` JPEGs at quality 90 into class folders. Generated ones have 500x400 pixels.

    Args:
        source: folder of JPEGs, at any depth; larger ones are shrunk to a shorter side of 400 pixels, and fewer than
            `count` are repeated. None generates the images.

    Raises:
        ValueError: `source` contains no JPEG.
    """
    if source is None:
        images = [generated(seed) for seed in range(min(count, NUM_GENERATED))]
    else:
        files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"--images {source} contains no .jpg or .jpeg file. Give a folder that contains some")
        images = list(_shrunk(files[:count]))
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for number, image in enumerate(islice(cycle(images), count)):
        image.save(folder / CLASSES[number % len(CLASSES)] / f"{number}.jpg", quality=QUALITY)
    return folder


def generated(seed: int) -> Image.Image:
    """Generate one image of 500x400 whose luma and chroma have the spectrum of a photograph."""
    rng = np.random.default_rng(seed)
    luma = 128 + DEVIATION * _field(rng) + rng.normal(0, NOISE, (HEIGHT, WIDTH))
    planes = [luma, *(128 + CHROMA_DEVIATION * _field(rng) for _ in range(2))]
    return Image.fromarray(np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8), "YCbCr").convert("RGB")


def _field(rng: np.random.Generator) -> NDArray[np.float64]:
    """Return noise (HEIGHT, WIDTH) of mean 0 and deviation 1 with that spectrum."""
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None, :])
    frequency[0, 0] = np.inf
    shape = frequency.shape
    field = np.fft.irfft2((rng.normal(size=shape) + 1j * rng.normal(size=shape)) * frequency**-FALL, (HEIGHT, WIDTH))
    return (field - field.mean()) / field.std()


def _shrunk(files: list[Path]) -> Iterator[Image.Image]:
    for file in files:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        factor = min(1.0, HEIGHT / min(image.size))
        yield image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
