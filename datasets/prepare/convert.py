"""Convert any image file to a valid JPEG that decodes to RGB, or give the reason why that is impossible; in chunks."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

from PIL import Image, ImageOps, ImageStat

from datasets import turbojpeg
from datasets.files import valid_text
from datasets.sources.index import ImageRef, read_images
from datasets.turbojpeg import ColorSpace, JpegHeader, Plane

Channels = tuple[float, float, float]
ChannelSums = tuple[int, int, int]


@dataclass(frozen=True)
class PixelSums:
    """The number of pixels, and the sums of their values (0 to 255) and squared values by channel."""

    count: int = 0
    values: ChannelSums = (0, 0, 0)
    squares: ChannelSums = (0, 0, 0)

    def __add__(self, other: PixelSums) -> PixelSums:
        return PixelSums(
            self.count + other.count, _added(self.values, other.values), _added(self.squares, other.squares)
        )


def pixel_sums(jpeg: bytes) -> PixelSums:
    """Return the sums over all pixels of a JPEG, as RGB. Raise BadImageError if it is damaged."""
    try:
        header = turbojpeg.read_header(jpeg)
        pixels = turbojpeg.decode(jpeg, header)
    except turbojpeg.JpegError as error:
        raise BadImageError(f"damaged JPEG: {error}") from None
    size = (header.width, header.height)
    statistics = ImageStat.Stat(Image.frombuffer("RGB", size, pixels, "raw", "RGB", 0, 1))
    return PixelSums(statistics.count[0], _whole(statistics.sum), _whole(statistics.sum2))


def channel_statistics(sums: PixelSums) -> tuple[Channels, Channels]:
    """Return mean and standard deviation by channel, on a scale of 0 to 1. There must be at least one pixel."""
    mean, std = [], []
    for values, squares in zip(sums.values, sums.squares, strict=True):
        mean.append(round(values / sums.count / 255, 6))
        std.append(round((max(sums.count * squares - values**2, 0) ** 0.5) / sums.count / 255, 6))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _added(left: ChannelSums, right: ChannelSums) -> ChannelSums:
    return left[0] + right[0], left[1] + right[1], left[2] + right[2]


def _whole(sums: Sequence[float]) -> ChannelSums:
    return int(sums[0]), int(sums[1]), int(sums[2])


MAX_PIXELS = 89_478_485
MAX_JPEG_SIDE = 65_500
MAX_JPEG_BYTES = 8 << 20
TIFF_STARTS = (b"II", b"MM")
JPEG_START, JPEG_END, START_OF_SCAN = b"\xff\xd8\xff", b"\xff\xd9", 0xDA
MAX_TRAILER = 4096  # bytes that some programs write after the end
ORIENTATION_TAG = 0x0112
ORIENTATION_MARKS = (b"Exif\0\0", b"tiff:Orientation")
RESIZE_FILTER = Image.Resampling.BILINEAR
COLOR_FILTER = Image.Resampling.HAMMING  # sharper, because chroma has half the resolution of the image


Check = Literal["data", "header"]


class BadImageError(ValueError):
    """A file is not a valid image. The message is the reason."""


@dataclass(frozen=True)
class StoredImage:
    """A JPEG as a beton stores it (RGB or gray, upright, 8 bits), with its size in pixels."""

    jpeg: bytes
    width: int
    height: int


def store_image(data: bytes, max_side: int | None, jpeg_quality: int, check: Check = "data") -> StoredImage:
    """Convert the bytes of an image file to the JPEG that a beton stores.

    All data is decoded to find damage, even of a JPEG that is kept as it is. With `check` "header", only the header and
    the end of such a JPEG are checked. A JPEG has no checksum, so damage in its middle is found only if libjpeg-turbo
    warns about it.

    Grayscale stays one channel, which decodes to equal R, G and B. Alpha is composed over white, 16 bits are scaled to
    8, CMYK and palettes are converted, and the EXIF orientation is applied. Color profiles are ignored. If a file has
    several frames, the first one is used.

    Args:
        max_side: images whose shorter side is longer are resized to it (antialiased), in pixels.
        jpeg_quality: quality of images that are encoded again.

    Raises:
        BadImageError: the file is empty, not an image, truncated, damaged or too large (more than MAX_PIXELS), or has a
            pixel format without a defined range.
    """
    if not data:
        raise BadImageError("the file is empty")
    header = _header(data) if data.startswith(JPEG_START) else None
    if header is None:
        return _encode(_resized(_open_with_pillow(data), max_side), jpeg_quality)
    try:
        return _store_jpeg(data, header, max_side, jpeg_quality, check)
    except turbojpeg.JpegError as error:
        raise BadImageError(f"damaged JPEG: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow image to mode RGB, or to L if it has no color.

    Raises:
        BadImageError: the pixels are floating point or 32-bit numbers, whose black and white are not defined.
    """
    if image.mode == "1" or (image.mode == "L" and "transparency" not in image.info):
        return image.convert("L")
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise BadImageError("the pixels are floating point numbers, whose range is not defined; save it with 8 bits")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        colors = image.convert("RGBA")
        white = Image.new("RGBA", colors.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, colors).convert("RGB")
    return image.convert("RGB")


def _header(data: bytes) -> turbojpeg.JpegHeader | None:
    """Return the JPEG's header, or None for the rare kinds, such as odd subsampling, that only Pillow reads."""
    try:
        header = turbojpeg.read_header(data)
    except turbojpeg.JpegError as error:
        try:
            _open_with_pillow(data)
        except BadImageError:
            raise BadImageError(f"the JPEG cannot be read: {error}") from None
        return None
    _check_size(header.width, header.height)
    return header


def _store_jpeg(data: bytes, header: JpegHeader, max_side: int | None, jpeg_quality: int, check: Check) -> StoredImage:
    size, orientation = _size_within(header.width, header.height, max_side), _orientation(data)
    if orientation == 1 and not header.has_four_inks:
        if size == (header.width, header.height) and len(data) <= MAX_JPEG_BYTES:
            if check == "data":
                turbojpeg.verify(data, header)
            elif data.rfind(JPEG_END, -MAX_TRAILER) < 0:
                raise BadImageError("the JPEG is cut short: it has no end")
            return StoredImage(data, *size)
        if header.color_space in (ColorSpace.YCBCR, ColorSpace.GRAY):
            return _resize_planes(data, header, size, jpeg_quality)
    image = _open_jpeg(data, header)
    return _encode(_resized(_upright(image, orientation), max_side), jpeg_quality)


def _open_jpeg(data: bytes, header: JpegHeader) -> Image.Image:
    if header.has_four_inks:
        # Pillow converts inverted and mixed inks correctly, but does not find all damage.
        turbojpeg.verify(data, header)
        return _open_with_pillow(data, upright=False)
    size = (header.width, header.height)
    image = Image.frombuffer("RGB", size, turbojpeg.decode(data, header), "raw", "RGB", 0, 1)
    return image.convert("L") if header.color_space is ColorSpace.GRAY else image


def _resize_planes(data: bytes, header: JpegHeader, size: tuple[int, int], jpeg_quality: int) -> StoredImage:
    """Resize the luma and chroma planes of a JPEG, into 4:2:0 or gray.

    Converting to RGB and back would gain nothing. Neither would scaling chroma, which usually has a quarter of the
    pixels, to full size and back. An image that shrinks to a quarter or less is partly reduced by the cosine transform.
    """
    width, height = size
    shrink = min(header.width, header.height) / min(size)
    scale = max(scale for scale in (1, 2, 4, 8) if scale == 1 or shrink >= 2 * scale)
    luma, *colors = turbojpeg.decode_planes(data, header, scale)
    across, down = header.subsampling.factors
    # The visible part of a plane, and the part that the new plane covers. Its last sample may extend beyond the image.
    seen = header.width / scale, header.height / scale
    planes = [_padded(_plane_image(luma).resize(size, RESIZE_FILTER, box=(0, 0, *seen)), even=bool(colors))]
    columns, rows = (width + 1) // 2, (height + 1) // 2
    for plane in colors:
        right = min(2 * columns * seen[0] / width / across, plane.width)
        bottom = min(2 * rows * seen[1] / height / down, plane.height)
        planes.append(_plane_image(plane).resize((columns, rows), COLOR_FILTER, box=(0, 0, right, bottom)))
    encodable = [Plane(*plane.size, bytearray(plane.tobytes())) for plane in planes]
    return _checked(StoredImage(turbojpeg.encode_planes(encodable, width, height, jpeg_quality), width, height))


def _plane_image(plane: Plane) -> Image.Image:
    return Image.frombuffer("L", (plane.width, plane.height), plane.samples, "raw", "L", 0, 1)


def _padded(image: Image.Image, even: bool) -> Image.Image:
    """Repeat the last column and row if their numbers must be `even` and are not."""
    width, height = image.size
    if not even or (width % 2 == 0 and height % 2 == 0):
        return image
    padded = Image.new(image.mode, (width + width % 2, height + height % 2))
    for left, top in ((width % 2, height % 2), (width % 2, 0), (0, height % 2), (0, 0)):
        padded.paste(image, (left, top))
    return padded


def _open_with_pillow(data: bytes, upright: bool = True) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # unusual metadata
        warnings.simplefilter("error", RuntimeWarning)
        if data.startswith(TIFF_STARTS):
            warnings.filterwarnings("error", "Tag |Truncated")  # a tag that cannot be read may describe the pixels
        try:
            with Image.open(io.BytesIO(data)) as image:
                _check_size(*image.size)
                image.load()
                # Pillow makes a TIFF upright while it loads it, and removes the tag.
                orientation = _tagged_orientation(image) if upright else 1
                return _upright(to_rgb(image), orientation)
        except BadImageError:
            raise
        except Exception as error:  # a parser of arbitrary bytes can fail in any way
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


def _orientation(jpeg: bytes) -> int:
    """Return the EXIF orientation of a JPEG, 1 to 8, or 1 if the metadata is damaged."""
    end = _metadata_end(jpeg)
    if all(jpeg.find(mark, 0, end) < 0 for mark in ORIENTATION_MARKS):
        return 1  # the usual case in data sets; asking Pillow would take a tenth of the time of decoding
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(jpeg)) as image:
                return _tagged_orientation(image)
        except Exception:  # the pixels may still be valid
            return 1


def _tagged_orientation(image: Image.Image) -> int:
    """Return the orientation that an opened image still needs, 1 to 8, or 1 if the metadata is damaged."""
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # a parser of arbitrary bytes can fail in any way
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _metadata_end(jpeg: bytes) -> int:
    """Return where the segments before a JPEG's image data end, or the file's length if they cannot be parsed."""
    position = 2
    while jpeg[position : position + 1] == b"\xff" and len(jpeg) >= position + 4:
        if jpeg[position + 1] == START_OF_SCAN:
            return position
        position += 2 + int.from_bytes(jpeg[position + 2 : position + 4])
    return len(jpeg)


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    if orientation == 1:
        return image
    image.getexif()[ORIENTATION_TAG] = orientation
    return ImageOps.exif_transpose(image)


def _from_16_bit(image: Image.Image) -> Image.Image:
    import numpy as np  # half of the time that a preparation's process takes to start

    pixels_HW = np.asarray(image)
    low, high = int(pixels_HW.min()), int(pixels_HW.max())
    if low < 0 or high > 65_535:
        raise BadImageError(f"pixel values from {low} to {high} do not fit into 16 bits, so their range is not defined")
    return Image.fromarray(((pixels_HW.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _size_within(width: int, height: int, max_side: int | None) -> tuple[int, int]:
    shorter = min(width, height)
    if max_side is None or shorter <= max_side:
        return width, height
    return max(1, round(width * max_side / shorter)), max(1, round(height * max_side / shorter))


def _resized(image: Image.Image, max_side: int | None) -> Image.Image:
    size = _size_within(*image.size, max_side)
    return image if size == image.size else image.resize(size, RESIZE_FILTER)


def _encode(image: Image.Image, jpeg_quality: int) -> StoredImage:
    if max(image.size) > MAX_JPEG_SIDE:
        raise BadImageError(f"{image.width}x{image.height}: a JPEG has at most {MAX_JPEG_SIDE} pixels a side")
    # Drop the metadata: the orientation has been applied, and nothing reads the rest.
    clean = Image.frombytes(image.mode, image.size, image.tobytes())
    buffer = io.BytesIO()
    clean.save(buffer, "JPEG", quality=jpeg_quality)
    return _checked(StoredImage(buffer.getvalue(), *image.size))


def _checked(stored: StoredImage) -> StoredImage:
    if len(stored.jpeg) > MAX_JPEG_BYTES:
        raise BadImageError(
            f"the JPEG has {len(stored.jpeg):,} bytes; at most {MAX_JPEG_BYTES:,} are allowed; set data.max_side"
        )
    return stored


IMAGES_IN_STATISTICS = 256


@dataclass(frozen=True)
class Conversion:
    """The settings of `store_image`: `max_side` in pixels, the quality of new JPEGs, and the check of kept ones."""

    max_side: int | None
    jpeg_quality: int
    check_images: Check = "data"


@dataclass(frozen=True)
class Chunk:
    """The images that a process converts together. `counted` are the positions of images whose pixels are counted."""

    refs: Sequence[ImageRef]
    counted: range = range(0)


class Outcome(NamedTuple):
    """The result for one image: a JPEG of `size` bytes with its width and height in pixels.

    If `size` is 0, there is no JPEG, and `reason` says why. `content` is the digest of the source file, empty if it
    could not be read. `stored` is the digest of the JPEG.
    """

    width: int
    height: int
    size: int
    content: str
    stored: str
    reason: str = ""


@dataclass(frozen=True)
class ConvertedChunk:
    """The outcomes of a chunk, in its order.

    Attributes:
        encoded: by position, the JPEGs that differ from their source file. The writer reads the others from the
            source, which is much faster than sending them between processes.
        modified: by position, the modification time of the source file (ns), if it could be read.
        pixels: sums over the counted images, as they are stored.
        node: the machine that did the work.
    """

    outcomes: list[Outcome]
    encoded: dict[int, bytes]
    modified: dict[int, int]
    pixels: PixelSums
    node: str


def counted_chunks(chunks: Sequence[Sequence[ImageRef]], count_pixels: bool) -> list[Chunk]:
    """Return the chunks to convert. Pixels of IMAGES_IN_STATISTICS evenly spread images, or of all, are counted."""
    step = -(-sum(map(len, chunks)) // IMAGES_IN_STATISTICS)
    starts = accumulate(map(len, chunks), initial=0)
    return [
        Chunk(some, range(-start % step, len(some), step) if count_pixels else range(0))
        for start, some in zip(starts, chunks, strict=False)
    ]


def convert_chunk(conversion: Conversion, chunk: Chunk) -> ConvertedChunk:
    """Read, check and convert images. A bad image gives an outcome with a reason, not an exception."""
    outcomes, encoded, modified, pixels = [], {}, {}, PixelSums()
    for position, read in enumerate(read_images(chunk.refs)):
        content = ""
        try:
            if isinstance(read, OSError):
                raise read
            data, modified[position] = read
            content = content_digest(data)
            image = store_image(data, conversion.max_side, conversion.jpeg_quality, conversion.check_images)
            counted = pixel_sums(image.jpeg) if position in chunk.counted else PixelSums()
        except (BadImageError, OSError) as error:
            outcomes.append(Outcome(0, 0, 0, content, "", valid_text(str(error))))
            continue
        stored = content
        if image.jpeg is not data:
            encoded[position], stored = image.jpeg, content_digest(image.jpeg)
        pixels += counted
        outcomes.append(Outcome(image.width, image.height, len(image.jpeg), content, stored))
    return ConvertedChunk(outcomes, encoded, modified, pixels, os.uname().nodename)


def digest_chunk(refs: Sequence[ImageRef]) -> list[str]:
    """Return the content digest of every image, empty if it cannot be read."""
    return ["" if isinstance(read, OSError) else content_digest(read.data) for read in read_images(refs)]


def content_digest(data: bytes) -> str:
    """Return the SHA-256, cut to 32 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:32]
