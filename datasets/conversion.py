"""The part of a preparation that runs in parallel: chunks of image references in, stored images or reasons out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datasets.images import BadImageError, store_image
from datasets.sources import ImageRef, read_bytes

Channels = tuple[float, float, float]

IMAGES_PER_CHUNK = 64


@dataclass(frozen=True)
class Conversion:
    """How images become JPEGs: longest allowed shorter side in pixels, and quality where encoding is needed."""

    max_side: int | None
    jpeg_quality: int


@dataclass(frozen=True)
class Outcome:
    """What became of one image: a JPEG with its size in pixels, or (`jpeg` empty) the reason why not.

    `content` is the SHA-256 of the source file, empty where it could not be read.
    """

    jpeg: bytes
    width: int
    height: int
    content: str
    reason: str = ""


@dataclass(frozen=True)
class ConvertedChunk:
    """The outcomes of a chunk in its order; `histogram` int64 (3, 256) counts the pixels of all of its images."""

    outcomes: list[Outcome]
    histogram: NDArray[np.int64]


def chunks(refs: Sequence[ImageRef]) -> Iterator[Sequence[ImageRef]]:
    """Work for one process at a time."""
    for start in range(0, len(refs), IMAGES_PER_CHUNK):
        yield refs[start : start + IMAGES_PER_CHUNK]


def convert_chunk(conversion: Conversion, refs: Sequence[ImageRef]) -> ConvertedChunk:
    """Read, check and convert images; a bad one becomes an outcome with a reason, never an exception."""
    histogram = np.zeros((3, 256), np.int64)
    outcomes = []
    for ref in refs:
        content = ""
        try:
            data = read_bytes(ref)
            content = content_digest(data)
            stored = store_image(data, conversion.max_side, conversion.jpeg_quality)
        except (BadImageError, OSError) as error:
            outcomes.append(Outcome(b"", 0, 0, content, str(error)))
            continue
        histogram += stored.histogram
        outcomes.append(Outcome(stored.jpeg, stored.width, stored.height, content))
    return ConvertedChunk(outcomes, histogram)


def digest_chunk(refs: Sequence[ImageRef]) -> list[str]:
    """The content digest of every image, empty where it cannot be read."""
    digests = []
    for ref in refs:
        try:
            digests.append(content_digest(read_bytes(ref)))
        except OSError:
            digests.append("")
    return digests


def content_digest(data: bytes) -> str:
    """SHA-256, cut to 32 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:32]


def channel_statistics(histogram: NDArray[np.int64]) -> tuple[Channels, Channels]:
    """Mean and standard deviation by channel on a scale of 0 to 1, from exact integer sums.

    Args:
        histogram: int64 (3, 256), pixels by channel and value.
    """
    values = np.arange(256)
    mean, std = [], []
    for counts in histogram:
        pixels, total = int(counts.sum()), int((counts * values).sum())
        squares = int((counts * values**2).sum())
        mean.append(round(total / pixels / 255, 6))
        std.append(round((max(pixels * squares - total**2, 0) ** 0.5) / pixels / 255, 6))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
