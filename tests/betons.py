"""Betons for tests: of given samples, or of generated photographs."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.beton import BetonWriter, Sample


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Draw an RGB image with detail at every scale, like a photograph's: noise, stronger at coarser scales."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for octave in range(6):
        cells = 3 << octave
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image += (np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float64) - 128) / (octave + 1)
    return Image.fromarray(np.clip(image * 0.6 + 128, 0, 255).astype(np.uint8))


def jpeg_bytes(image: Image.Image, quality: int = 90) -> bytes:
    """Encode the image as a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_beton(path: Path, samples: Iterable[Sample], capacity: int) -> int:
    """Write samples in order, and return their number."""
    with BetonWriter(path, capacity) as writer:
        for sample in samples:
            writer.append(sample)
        writer.finish()
    return writer.count


def write_images(path: Path, images: list[Image.Image]) -> Path:
    """Write a beton of the images; the label is the index modulo 7."""
    samples = (Sample(jpeg_bytes(image), *image.size, index % 7) for index, image in enumerate(images))
    write_beton(path, samples, len(images))
    return path
