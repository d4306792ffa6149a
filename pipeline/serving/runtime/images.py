"""Turns the bytes of an image file into centered square crops."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

IMAGE_FORMATS = ("JPEG", "PNG")
MAX_PIXELS = 89_478_485
MAX_BYTES = 32 * 1024**2
DCT_FRACTIONS = (8, 4, 2)
OVERSAMPLING = 1.25
"""pixels a side of a decode at a fraction, for each of the crop: it cuts off detail that a resize fades out"""
_KEPT_PIXELS = 500_000

# Pillow warns about odd metadata, which is no reason to refuse an image, and about sizes, which are checked here.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImageError(ValueError):
    """An image cannot be used; the message says why."""


class Picture:
    """One image, whose centred square is asked for at one side after another.

    libjpeg-turbo can decode a JPEG at 1/2, 1/4 or 1/8 of its size, which skips most of the work. Each side is taken
    from the smallest such decode that still has OVERSAMPLING times its pixels; a decode that is fine enough for the
    next side too serves it as well. The file's own size is limited, before anything is allocated for its pixels: a
    progressive JPEG keeps all its coefficients in memory at whichever fraction it is decoded.

    Args:
        image: the bytes of a JPEG or PNG file, or a square crop as uint8 (S, S, 3), RGB, which is taken whole.
        fraction: side of the centred square, as a fraction of the image's shorter side.

    Raises:
        BadImageError: it is neither, or exceeds MAX_BYTES or MAX_PIXELS.
    """

    def __init__(self, image: Any, fraction: float):
        self._fraction = fraction
        self._file: bytes | None = None
        self._kept: tuple[int, Image.Image] | None = None
        if isinstance(image, np.ndarray):
            self._fraction = 1.0
            self._kept = (1, _from_crop(image))
        else:
            self._file = _checked_file(image)

    def crop(self, side: int) -> NDArray[np.uint8]:
        """The centred square, uint8 (side, side, 3), as the validation images are cut.

        Raises:
            BadImageError: the file is no JPEG or PNG, truncated or damaged.
        """
        image = self._decoded(side)
        extent = self._fraction * min(image.size)
        left, top = (image.width - extent) / 2, (image.height - extent) / 2
        box = (left, top, left + extent, top + extent)
        return np.array(image.resize((side, side), Image.Resampling.BILINEAR, box=box))

    def _decoded(self, side: int) -> Image.Image:
        """The whole image upright in RGB, at the fraction that suffices for `side`, or a finer one that is there."""
        if self._kept is not None and (self._file is None or self._kept[0] <= self._needed_fraction(side)):
            return self._kept[1]
        assert self._file is not None
        fraction, image = self._decode(self._file, side)
        self._kept = (fraction, image) if image.width * image.height <= _KEPT_PIXELS else None
        return image

    def _decode(self, file: bytes, side: int) -> tuple[int, Image.Image]:
        try:
            with Image.open(io.BytesIO(file), formats=IMAGE_FORMATS) as image:
                self._size = image.size
                if image.width * image.height > MAX_PIXELS:
                    raise BadImageError(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels")
                fraction = self._needed_fraction(side)
                if fraction > 1 and not image.draft(None, (image.width // fraction, image.height // fraction)):
                    fraction = 1
                image.load()
                return fraction, _rgb(_upright(image))
        except BadImageError:
            raise
        except Image.UnidentifiedImageError:
            raise BadImageError(f"not a {' or '.join(IMAGE_FORMATS)} file") from None
        except Exception as error:  # a parser fed with arbitrary bytes fails in arbitrary ways
            raise BadImageError(str(error) or type(error).__name__) from None

    def _needed_fraction(self, side: int) -> int:
        return dct_fraction(self._fraction * min(self._size), side)


def dct_fraction(extent: float, side: int) -> int:
    """The largest of 8, 4 and 2 by which `extent` pixels may be divided and still be enough for `side`, else 1."""
    return next((fraction for fraction in DCT_FRACTIONS if extent / fraction >= OVERSAMPLING * side), 1)


def _checked_file(image: Any) -> bytes:
    if not isinstance(image, bytes):
        raise BadImageError(
            f"the image is given as {type(image).__name__}; give the bytes of a file, or a uint8 array (S, S, 3)"
        )
    if not image:
        raise BadImageError("the file is empty")
    if len(image) > MAX_BYTES:
        raise BadImageError(f"the file has {len(image):,} bytes, more than {MAX_BYTES:,}")
    return image


def _from_crop(crop: NDArray[Any]) -> Image.Image:
    square = crop.ndim == 3 and crop.shape[0] == crop.shape[1] > 0 and crop.shape[2] == 3
    if not square or crop.dtype != np.uint8:
        raise BadImageError(f"the array is {crop.dtype} {crop.shape}; give a square crop, uint8 (S, S, 3)")
    if crop.size > 3 * MAX_PIXELS:
        raise BadImageError(f"{crop.shape[1]}x{crop.shape[0]} is more than {MAX_PIXELS:,} pixels")
    return Image.fromarray(crop)


def _upright(image: Image.Image) -> Image.Image:
    """Returns the image turned by its EXIF orientation; unchanged if the metadata is damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # another parser of arbitrary bytes
        return image


def _rgb(image: Image.Image) -> Image.Image:
    """Convert gray and CMYK to RGB, 16 bits to 8, and compose alpha over white: as preparation does."""
    if image.mode.startswith("I"):
        pixels_HW = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((pixels_HW + 128) // 257).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        colors = image.convert("RGBA")
        white = Image.new("RGBA", colors.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, colors)
    return image.convert("RGB")
