"""Mutate image files at random and check that the decoder returns a crop or a reason for each.

    python -m benchmarks.decoding_fuzz --count 100000

A crash ends the process, so a printed line shows that there was none. It says how many files were decoded and refused,
and how much the process's memory grew after the first tenth.
"""

from __future__ import annotations

import argparse
import io
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from benchmarks.harness import memory_mb
from benchmarks.photographs import generated
from pipeline.serving.runtime.images import BadImageError, Picture

SIDES = (32, 224)
FRACTION = 0.875


@dataclass
class Counts:
    """The results for all mutants."""

    decoded: int = 0
    refused: int = 0
    grown_mb: float = 0.0
    """The growth of resident memory after the first tenth, in MB."""


def fuzz(count: int, seed: int = 0) -> Counts:
    """Feed `count` mutants to the decoder.

    Raises:
        Exception: the decoder raised something other than BadImageError.
    """
    found, start_mb = Counts(), 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every second mutant causes a warning about its metadata
        for number, mutant in enumerate(mutants(count, seed)):
            try:
                picture = Picture(mutant, FRACTION, max(SIDES))
                for side in SIDES:
                    crop = picture.crop(side)
                    assert (crop.shape, crop.dtype) == ((side, side, 3), np.uint8)
                found.decoded += 1
            except BadImageError:
                found.refused += 1
            if number == count // 10:
                start_mb = memory_mb("VmRSS")
    found.grown_mb = memory_mb("VmRSS") - start_mb
    return found


def mutants(count: int, seed: int) -> Iterator[bytes]:
    """Yield image files with bytes changed, removed, repeated or taken from another file; the same ones for a seed."""
    rng, files = random.Random(seed), list(originals())
    for _ in range(count):
        file = bytearray(rng.choice(files))
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            # Half of the changes hit the headers, which are a small part of a file.
            at = rng.randrange(min(len(file), 700) if rng.random() < 0.5 else len(file))
            length = rng.choice((1, 2, 4, 64, 1024))
            match rng.randrange(6):
                case 0:
                    file[at] ^= 1 << rng.randrange(8)
                case 1:
                    file[at] = rng.choice((0, 1, 0x7F, 0x80, 0xD8, 0xD9, 0xDA, 0xFF))
                case 2:
                    del file[at : at + length]
                case 3:
                    file[at:at] = file[at : at + length]
                case 4:
                    other = rng.choice(files)
                    start = rng.randrange(len(other))
                    file[at : at + length] = other[start : start + length]
                case 5:
                    del file[max(at, 2) :]
            if not file:
                break
        yield bytes(file)


def originals() -> Iterator[bytes]:
    """Yield every kind of JPEG that the decoder may get, and the other formats; all small, for speed."""
    image = generated(0).resize((120, 96))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    for kind, mode, options in (
        ("JPEG", "RGB", {"quality": 90}),
        ("JPEG", "RGB", {"quality": 60, "progressive": True, "exif": exif}),
        ("JPEG", "RGB", {"quality": 80, "subsampling": 0, "restart_marker_blocks": 4}),
        ("JPEG", "L", {"quality": 75, "progressive": True}),
        ("JPEG", "CMYK", {"quality": 75}),
        ("PNG", "RGB", {}),
        ("WEBP", "RGB", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {"exif": exif}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ):
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, kind, **options)
        yield buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = fuzz(args.count, args.seed)
    print(f"{args.count:,} mutants: {found.decoded:,} decoded, {found.refused:,} refused, {found.grown_mb:+.1f} MB")


if __name__ == "__main__":
    main()
