"""Pictures for tests: smooth ones that JPEG compresses well, and unusual files."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def smooth_rgb(width: int = 64, height: int = 48, seed: int = 0) -> NDArray[np.uint8]:
    """Draw a colorful picture without fine detail: uint8 (height, width, 3)."""
    grid = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(width: int = 64, height: int = 48, seed: int = 0, **options: object) -> bytes:
    return encoded(Image.fromarray(smooth_rgb(width, height, seed)), "JPEG", **{"quality": 95, **options})


def decoded(data: bytes) -> NDArray[np.int64]:
    """Decode an image file to RGB with Pillow."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int64)


def png_bomb() -> bytes:
    """Return a PNG of a few hundred bytes whose header says 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def write_class_folders(root: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Write JPEGs ROOT/CLASS/NUMBER.jpg, all different."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number:03d}.jpg").write_bytes(jpeg(seed=1000 * (seed + label) + number))
    return root
