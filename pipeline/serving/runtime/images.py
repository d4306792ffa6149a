"""Decode image files into centered square crops."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import math
import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
MAX_PIXELS = 89_478_485
"""Pillow's own limit (Image.MAX_IMAGE_PIXELS): a decoded image takes at most 268 MB."""
MAX_BYTES = 32 * 1024**2
"""The largest file that is decoded."""
DCT_FRACTIONS = (8, 4, 2)
LARGE_PIXELS = 2_000_000
_KEPT_PIXELS = 500_000
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Maps an EXIF orientation other than 1 to the operation that makes the image upright."""

# Pillow warns about unusual metadata, which does not make an image unusable, and about sizes, which are checked here.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImageError(ValueError):
    """An image cannot be used; the message says why."""


class _Decoded(NamedTuple):
    """A decoded RGB image, its centered square (left, top, right, bottom) in pixels, and its EXIF orientation."""

    image: Image.Image
    box: tuple[float, float, float, float]
    orientation: int


class Picture:
    """One image, from which centered square crops of several sizes are taken.

    libjpeg-turbo can decode a JPEG at 1/2, 1/4 or 1/8 of its size, which skips most of the work. As in the loader, the
    largest side decides this scale, so a crop's pixels do not depend on which other crops are taken. The image size in
    the file's header is checked before pixels are allocated, because a progressive JPEG keeps all its coefficients in
    memory at any scale. If a file has several frames, the first one is used.

    Args:
        image: the bytes of an image file, the same bytes as base64 text, or a square RGB crop, uint8 (S, S, 3), which
            is used as a whole.
        fraction: side of the centered square, as a fraction of the image's shorter side.
        largest: largest side that the network uses, in pixels.
        large: context manager that is entered while a file of more than LARGE_PIXELS pixels is decoded and cropped. A
            semaphore limits how many such images are in memory at the same time. Each can take 1.5 GB.

    Attributes:
        extent: side of the crop before it is resized, in pixels of the file; known after the first crop.

    Raises:
        BadImageError: the image has another type, or exceeds MAX_BYTES or MAX_PIXELS.
    """

    extent: float

    def __init__(
        self,
        image: Any,
        fraction: float,
        largest: int,
        large: contextlib.AbstractContextManager = contextlib.nullcontext(),  # noqa: B008
    ):
        self._fraction, self._largest, self._large = fraction, largest, large
        self._file = b""
        self._kept: _Decoded | None = None
        if isinstance(image, np.ndarray):
            crop = _from_crop(image)
            self._kept = _Decoded(crop, (0, 0, *crop.size), 1)
            self.extent = crop.width
        else:
            self._file = _checked_file(image)

    def crop(self, side: int) -> NDArray[np.uint8]:
        """Return the centered square, uint8 (side, side, 3), cropped in the same way as validation images.

        Raises:
            BadImageError: the file is not an image, is truncated, or is damaged.
        """
        with contextlib.ExitStack() as held:
            decoded = self._kept or self._decode(held)
            square = decoded.image.resize((side, side), Image.Resampling.BILINEAR, box=decoded.box)
            turn = _TURNS.get(decoded.orientation)
            del decoded  # before another thread may decode a large image
        return np.array(square if turn is None else square.transpose(turn))

    def _decode(self, held: contextlib.ExitStack) -> _Decoded:
        """Decode the whole image in RGB, at the smallest scale that suffices. Keep the result if it is small.

        Args:
            held: enters `large` if this image is large. The caller leaves it when the image is no longer in memory.
        """
        try:
            with Image.open(io.BytesIO(self._file), formats=IMAGE_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BadImageError(f"{width}x{height} is more than {MAX_PIXELS:,} pixels")
                if width * height > LARGE_PIXELS:
                    held.enter_context(self._large)
                fraction = dct_fraction(self._fraction * min(width, height), self._largest)
                if fraction > 1 and not image.draft(None, (width // fraction, height // fraction)):
                    fraction = 1
                image.load()
                if fraction == 1:
                    width, height = image.size  # Pillow has rotated a TIFF while loading it
                orientation, rgb = _orientation(image), _rgb(image)
        except BadImageError:
            raise
        except Image.UnidentifiedImageError:
            raise BadImageError("not a JPEG, PNG, WebP, BMP, TIFF, PPM or AVIF file") from None
        except Exception as error:  # a parser of arbitrary bytes can fail in any way
            raise BadImageError(str(error) or type(error).__name__) from None
        self.extent = extent = self._fraction * min(width, height)
        left, top = (width - extent) / 2, (height - extent) / 2
        box = left / fraction, top / fraction, (left + extent) / fraction, (top + extent) / fraction
        decoded = _Decoded(rgb, box, orientation)
        self._kept = decoded if rgb.width * rgb.height <= _KEPT_PIXELS else None
        return decoded


def dct_fraction(extent: float, largest: int) -> int:
    """Return the largest of 8, 4 and 2 by which `extent` can be divided and stay at least `largest` pixels, or 1."""
    return next((fraction for fraction in DCT_FRACTIONS if extent >= fraction * largest), 1)


def _checked_file(image: Any) -> bytes:
    # MLflow's server turns null into the text None in the formats `instances` and `inputs`.
    if (
        image is None
        or (isinstance(image, float) and math.isnan(image))
        or (isinstance(image, str) and image == "None")
    ):
        raise BadImageError("the image is missing")
    if isinstance(image, str):
        image = _from_base64(image)
    if not isinstance(image, bytes | bytearray | memoryview):
        raise BadImageError(
            f"the image is given as {type(image).__name__}; give the bytes of a file (over HTTP as base64 text), or a "
            "uint8 array (S, S, 3)"
        )
    if not len(image):
        raise BadImageError("the file is empty")
    if len(image) > MAX_BYTES:
        raise BadImageError(f"the file has {len(image):,} bytes; at most {MAX_BYTES:,} are allowed")
    return bytes(image)


def _from_base64(text: str) -> bytes:
    """Decode base64 text, which may contain line breaks."""
    if len(text) > 2 * MAX_BYTES:
        raise BadImageError(
            f"the base64 text has {len(text):,} characters; a file may have at most {MAX_BYTES:,} bytes"
        )
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise BadImageError("the image is text that is not base64; encode the bytes of the file as base64") from None


def _from_crop(crop: NDArray[Any]) -> Image.Image:
    square = crop.ndim == 3 and crop.shape[0] == crop.shape[1] > 0 and crop.shape[2] == 3
    if not square or crop.dtype != np.uint8:
        raise BadImageError(f"the array is {crop.dtype} {crop.shape}; give a square crop, uint8 (S, S, 3)")
    if crop.size > 3 * MAX_PIXELS:
        raise BadImageError(f"{crop.shape[1]}x{crop.shape[0]} is more than {MAX_PIXELS:,} pixels")
    return Image.fromarray(crop)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, or 1 if the metadata is damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return value if isinstance(value, int) else 1
    except Exception:  # a parser of arbitrary bytes can fail in any way
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB as data preparation does: from gray, CMYK or 16 bits, with alpha over white."""
    if image.mode.startswith("I"):
        pixels_HW = np.asarray(image)
        low, high = int(pixels_HW.min()), int(pixels_HW.max())
        if low < 0 or high > 65_535:
            raise BadImageError(f"pixel values from {low} to {high} do not fit 16 bits, so their range is not defined")
        image = Image.fromarray(((pixels_HW.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise BadImageError("the pixels are floating-point numbers, whose range is not defined; save it with 8 bits")
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        colors = image.convert("RGBA")
        white = Image.new("RGBA", colors.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, colors)
    return image.convert("RGB")
