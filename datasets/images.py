"""Any image file -> a sound JPEG that decodes to proper RGB, or the reason why it cannot be one.

A JPEG that already fits is kept byte for byte; everything else is decoded, converted, resized and encoded once.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from datasets import turbojpeg

MAX_PIXELS = 89_478_485
MAX_JPEG_SIDE = 65_500
MAX_JPEG_BYTES = 8 << 20
ORIENTATION_TAG = 0x0112


class BadImageError(ValueError):
    """A file is not a sound image; the message is the reason."""


@dataclass(frozen=True)
class StoredImage:
    """A JPEG (RGB or grey, upright, 8 bits) with its size in pixels.

    `histogram` int64 (3, 256) counts the decoded pixels by channel and value; mean and deviation follow from it.
    """

    jpeg: bytes
    width: int
    height: int
    histogram: NDArray[np.int64]


def store_image(data: bytes, max_side: int | None, jpeg_quality: int) -> StoredImage:
    """Turn the bytes of an image file into what a beton stores. Every pixel is decoded to find damage.

    A JPEG has no checksum: of damage in its midst, that is found which libjpeg-turbo notices at least with a warning.

    Greyscale stays one channel, which decodes to equal R, G and B. Alpha is composed over white, 16 bits are scaled
    to 8, CMYK and palettes are converted, the EXIF orientation is applied. Colour profiles are not. Of an animation
    the first frame counts.

    Args:
        max_side: images whose shorter side is longer are resized to it (antialiased), pixels.
        jpeg_quality: of images that have to be encoded again.

    Raises:
        BadImageError: empty, not an image, truncated, damaged, too large (more than MAX_PIXELS), or of a pixel
            format that has no defined range.
    """
    if not data:
        raise BadImageError("the file is empty")
    header = _header(data) if data.startswith(b"\xff\xd8\xff") else None
    if header is None:
        image = _open_with_pillow(data)
    else:
        image, orientation = _open_jpeg(data, header), _orientation(data)
        small = max_side is None or min(header.width, header.height) <= max_side
        if small and orientation == 1 and not header.has_four_inks and len(data) <= MAX_JPEG_BYTES:
            return StoredImage(data, header.width, header.height, _histogram(image))
        if header.colour_space is turbojpeg.ColourSpace.GREY:
            image = image.convert("L")
        image = _upright(image, orientation)
    return _encode(_resized(image, max_side), jpeg_quality)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow image to mode RGB, or to L where it has no colour.

    Raises:
        BadImageError: floating point or 32-bit pixels, whose black and white nobody can know.
    """
    if image.mode == "1" or (image.mode == "L" and "transparency" not in image.info):
        return image.convert("L")
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise BadImageError("the pixels are floating point numbers, whose range is not defined; save it with 8 bits")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def _header(data: bytes) -> turbojpeg.JpegHeader | None:
    """The JPEG's header; None for the rare forms, such as odd subsampling, that only Pillow reads."""
    try:
        header = turbojpeg.read_header(data)
    except turbojpeg.JpegError as error:
        try:
            _open_with_pillow(data)
        except BadImageError:
            raise BadImageError(f"not a JPEG that can be read: {error}") from None
        return None
    _check_size(header.width, header.height)
    return header


def _open_jpeg(data: bytes, header: turbojpeg.JpegHeader) -> Image.Image:
    try:
        pixels = turbojpeg.decode(data, header)
    except turbojpeg.JpegError as error:
        raise BadImageError(f"damaged JPEG: {error}") from None
    # How inks are inverted and mixed is Pillow's business; the decoding above has shown that the data is sound.
    return _open_with_pillow(data, upright=False) if header.has_four_inks else Image.fromarray(pixels)


def _open_with_pillow(data: bytes, upright: bool = True) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        try:
            with Image.open(io.BytesIO(data)) as image:
                _check_size(*image.size)
                image.load()
                orientation = _orientation(data) if upright else 1
                return _upright(to_rgb(image), orientation)
        except BadImageError:
            raise
        except Exception as error:  # a parser fed with arbitrary bytes fails in arbitrary ways
            raise BadImageError(_pillow_reason(error)) from None


def _pillow_reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known type"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {MAX_PIXELS:,} pixels"
    return str(error) or type(error).__name__


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImageError(f"{width}x{height} is more than {MAX_PIXELS:,} pixels")


def _orientation(data: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 also where the metadata is damaged, since the pixels may well be sound."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                value = image.getexif().get(ORIENTATION_TAG, 1)
        except Exception:
            return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    if orientation == 1:
        return image
    image.getexif()[ORIENTATION_TAG] = orientation
    return ImageOps.exif_transpose(image)


def _from_16_bit(image: Image.Image) -> Image.Image:
    pixels_HW = np.asarray(image)
    low, high = int(pixels_HW.min()), int(pixels_HW.max())
    if low < 0 or high > 65_535:
        raise BadImageError(f"pixel values from {low} to {high} do not fit 16 bits, so their range is not defined")
    return Image.fromarray(((pixels_HW.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _resized(image: Image.Image, max_side: int | None) -> Image.Image:
    shorter = min(image.size)
    if max_side is None or shorter <= max_side:
        return image
    width, height = (max(1, round(extent * max_side / shorter)) for extent in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _encode(image: Image.Image, jpeg_quality: int) -> StoredImage:
    if max(image.size) > MAX_JPEG_SIDE:
        raise BadImageError(f"{image.width}x{image.height}: a JPEG has at most {MAX_JPEG_SIDE} pixels a side")
    # Without metadata: the orientation is applied, and the rest is of no use.
    clean = Image.frombytes(image.mode, image.size, image.tobytes())
    buffer = io.BytesIO()
    clean.save(buffer, "JPEG", quality=jpeg_quality)
    jpeg = buffer.getvalue()
    if len(jpeg) > MAX_JPEG_BYTES:
        raise BadImageError(f"{len(jpeg):,} bytes as JPEG, at most {MAX_JPEG_BYTES:,} fit; set data.max_side")
    return StoredImage(jpeg, *image.size, _histogram(clean))


def _histogram(image: Image.Image) -> NDArray[np.int64]:
    counts = np.array(image.histogram(), np.int64).reshape(-1, 256)
    return counts if len(counts) == 3 else np.repeat(counts, 3, axis=0)
