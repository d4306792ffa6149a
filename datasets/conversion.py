"""The part of a preparation that runs in parallel: chunks of image references in, stored images or reasons out.

What this imports is loaded by every process of a preparation, so it imports little.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from datasets.images import BadImageError, Check, store_image
from datasets.sources import ImageRef, read_bytes, read_stamped
from datasets.statistics import PixelSums, pixel_sums

IMAGES_PER_CHUNK = 64
IMAGES_IN_STATISTICS = 256


@dataclass(frozen=True)
class Conversion:
    """How images become JPEGs: longest allowed shorter side in pixels, quality where encoding is needed, and what is
    checked of those that are kept (images.store_image).
    """

    max_side: int | None
    jpeg_quality: int
    check_images: Check = "data"


@dataclass(frozen=True)
class Chunk:
    """Work for one process at a time; `counted` are the positions of the images whose pixels are counted."""

    refs: Sequence[ImageRef]
    counted: range = range(0)


class Outcome(NamedTuple):
    """What became of one image: a JPEG of `size` bytes, width and height in pixels, or (`size` 0) the reason why not.

    `content` is the digest of the source file, empty where it could not be read, and `stored` that of the JPEG.
    """

    width: int
    height: int
    size: int
    content: str
    stored: str
    reason: str = ""


@dataclass(frozen=True)
class ConvertedChunk:
    """The outcomes of a chunk in its order.

    Attributes:
        encoded: by position, the JPEGs that differ from their source file. The others are to be read from there,
            which takes a fraction of the time of sending them from process to process.
        modified: by position, when the source file was modified last (ns), if it could be read.
        pixels: of the counted images, as they are stored.
        node: the machine at work.
    """

    outcomes: list[Outcome]
    encoded: dict[int, bytes]
    modified: dict[int, int]
    pixels: PixelSums
    node: str


def chunks(refs: Sequence[ImageRef]) -> Iterator[Sequence[ImageRef]]:
    """`refs` in parts of IMAGES_PER_CHUNK."""
    for start in range(0, len(refs), IMAGES_PER_CHUNK):
        yield refs[start : start + IMAGES_PER_CHUNK]


def counted_chunks(refs: Sequence[ImageRef], count_pixels: bool) -> list[Chunk]:
    """The work of converting `refs`; IMAGES_IN_STATISTICS of them, evenly spread, are counted, or all if fewer."""
    step = -(-len(refs) // IMAGES_IN_STATISTICS)
    return [
        Chunk(some, range(-number * IMAGES_PER_CHUNK % step, len(some), step) if count_pixels else range(0))
        for number, some in enumerate(chunks(refs))
    ]


def convert_chunk(conversion: Conversion, chunk: Chunk) -> ConvertedChunk:
    """Read, check and convert images; a bad one becomes an outcome with a reason, never an exception."""
    outcomes, encoded, modified, pixels = [], {}, {}, PixelSums()
    for position, ref in enumerate(chunk.refs):
        content = ""
        try:
            data, modified[position] = read_stamped(ref)
            content = content_digest(data)
            image = store_image(data, conversion.max_side, conversion.jpeg_quality, conversion.check_images)
        except (BadImageError, OSError) as error:
            outcomes.append(Outcome(0, 0, 0, content, "", str(error)))
            continue
        stored = content
        if image.jpeg is not data:
            encoded[position], stored = image.jpeg, content_digest(image.jpeg)
        if position in chunk.counted:
            pixels += pixel_sums(image.jpeg)
        outcomes.append(Outcome(image.width, image.height, len(image.jpeg), content, stored))
    return ConvertedChunk(outcomes, encoded, modified, pixels, os.uname().nodename)


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
