"""A binding of libjpeg-turbo that checks its return codes, so that a corrupt JPEG is an error instead of noise.

FFCV's own binding ignores the library's return code, and Pillow ignores the library's warnings. This binding also
decodes a JPEG to its color planes, without converting them to RGB, and encodes planes.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import NamedTuple

PIXELS_RGB, PIXELS_GRAY, PIXELS_CMYK = 0, 6, 11
ACCURATE_DCT, STOP_ON_WARNING = 4096, 8192
"""Flags of libjpeg-turbo: use the accurate cosine transform, and stop when it warns about damaged data."""
SMALLEST_SCALE = 8


class JpegError(ValueError):
    """libjpeg-turbo could not decode a JPEG, or decoded it with a warning."""


class ColorSpace(IntEnum):
    """The color spaces of a JPEG, by the library's numbers (TJCS)."""

    RGB = 0
    YCBCR = 1
    GRAY = 2
    CMYK = 3
    YCCK = 4


class Subsampling(IntEnum):
    """The number of luma samples, across and down, that share one chroma sample."""

    YUV_444 = 0
    YUV_422 = 1
    YUV_420 = 2
    GRAY = 3
    YUV_440 = 4
    YUV_411 = 5

    @property
    def factors(self) -> tuple[int, int]:
        """Luma samples per chroma sample, across and down."""
        return {1: (2, 1), 2: (2, 2), 4: (1, 2), 5: (4, 1)}.get(self, (1, 1))


@dataclass(frozen=True)
class JpegHeader:
    """The header of a JPEG: size in pixels, subsampling and color space."""

    width: int
    height: int
    subsampling: Subsampling
    color_space: ColorSpace

    @property
    def has_four_inks(self) -> bool:
        """Whether the JPEG is CMYK or YCCK."""
        return self.color_space in (ColorSpace.CMYK, ColorSpace.YCCK)


class Plane(NamedTuple):
    """One color component: uint8 `samples`, row by row, possibly a little larger than the visible image."""

    width: int
    height: int
    samples: bytearray


def read_header(jpeg: bytes) -> JpegHeader:
    """Read a JPEG's header. Raise JpegError if this library cannot decode the file.

    Subsamplings that only newer versions of the library know are refused too.
    """
    width, height, subsampling, color_space = (ctypes.c_int() for _ in range(4))
    fields = map(ctypes.byref, (width, height, subsampling, color_space))
    with _decoder() as decoder:
        _require(decoder, _library().tjDecompressHeader3(decoder, jpeg, len(jpeg), *fields))
        if width.value < 1 or height.value < 1:
            raise JpegError("it has no image")
        if subsampling.value not in list(Subsampling):
            raise JpegError(f"unsupported chroma subsampling ({subsampling.value})")
    return JpegHeader(width.value, height.value, Subsampling(subsampling.value), ColorSpace(color_space.value))


def verify(jpeg: bytes, header: JpegHeader) -> None:
    """Find the damage that decoding every pixel would find, in less than half the time.

    Damaged data causes warnings only in the entropy decoding, because the later steps accept any number. Decoding at
    1/8 of the size and without color does little more than the entropy decoding.

    Raises:
        JpegError: as in `decode`.
    """
    gray = header.color_space in (ColorSpace.YCBCR, ColorSpace.GRAY)
    _decode(jpeg, header, PIXELS_GRAY if gray else _pixel_format(header), SMALLEST_SCALE)


def decode(jpeg: bytes, header: JpegHeader) -> bytearray:
    """Decode every pixel: uint8 (height, width, 3) RGB, or (height, width, 4) as stored for CMYK and YCCK.

    Raises:
        JpegError: with the library's message, even if the library only warns (truncated or damaged data).
    """
    return _decode(jpeg, header, _pixel_format(header), 1)


def decode_planes(jpeg: bytes, header: JpegHeader, scale: int) -> list[Plane]:
    """Decode a YCbCr or gray JPEG at 1/`scale` (1, 2, 4 or 8) of its size, rounded up, without color conversion.

    Raises:
        JpegError: as in `decode`.
    """
    width, height = (-(-extent // scale) for extent in (header.width, header.height))
    planes = [Plane(*size, bytearray(size[0] * size[1])) for size in _plane_sizes(width, height, header.subsampling)]
    arguments = (_addresses(planes), width, None, height, STOP_ON_WARNING)
    with _decoder() as decoder:
        _require(decoder, _library().tjDecompressToYUVPlanes(decoder, jpeg, len(jpeg), *arguments))
    return planes


def encode_planes(planes: Sequence[Plane], width: int, height: int, quality: int) -> bytes:
    """Encode a JPEG of `width` x `height` pixels from one plane (gray) or three planes (4:2:0).

    With three planes, the sides of the luma plane are padded to even numbers.
    """
    subsampling = Subsampling.GRAY if len(planes) == 1 else Subsampling.YUV_420
    assert [plane[:2] for plane in planes] == _plane_sizes(width, height, subsampling)
    buffer, size = ctypes.c_void_p(), ctypes.c_ulong()
    arguments = (subsampling, ctypes.byref(buffer), ctypes.byref(size), quality, ACCURATE_DCT)
    with _encoder() as encoder:
        try:
            status = _library().tjCompressFromYUVPlanes(encoder, _addresses(planes), width, None, height, *arguments)
            _require(encoder, status)
            return ctypes.string_at(buffer, size.value)
        finally:
            _library().tjFree(buffer)


def library_version() -> str:
    """Return the version of the loaded library, such as 2.1.5, or "unknown".

    It is read from the library's file, because versions before 3 have no function that returns it.
    """
    address = ctypes.cast(_library().tjInitCompress, ctypes.c_void_p).value
    assert address is not None
    for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < end:
            found = re.search(rb"libjpeg-turbo version ([0-9.]+)", Path(line.split(maxsplit=5)[5]).read_bytes())
            return found[1].decode() if found else "unknown"
    return "unknown"


def _plane_sizes(width: int, height: int, subsampling: Subsampling) -> list[tuple[int, int]]:
    """Return width and height of each plane of an image. Luma is padded to whole chroma samples."""
    across, down = subsampling.factors
    columns, rows = -(-width // across), -(-height // down)
    luma = (columns * across, rows * down)
    return [luma] if subsampling == Subsampling.GRAY else [luma, (columns, rows), (columns, rows)]


def _addresses(planes: Sequence[Plane]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * 3)(*(_address(plane.samples) for plane in planes))


def _address(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _pixel_format(header: JpegHeader) -> int:
    return PIXELS_CMYK if header.has_four_inks else PIXELS_RGB


def _decode(jpeg: bytes, header: JpegHeader, pixel_format: int, scale: int) -> bytearray:
    width, height = (-(-extent // scale) for extent in (header.width, header.height))
    channels = {PIXELS_RGB: 3, PIXELS_GRAY: 1, PIXELS_CMYK: 4}[pixel_format]
    pixels = bytearray(width * height * channels)
    arguments = (_address(pixels), width, 0, height, pixel_format, STOP_ON_WARNING)
    with _decoder() as decoder:
        _require(decoder, _library().tjDecompress2(decoder, jpeg, len(jpeg), *arguments))
    return pixels


class _Kept(threading.local):
    """The library's decoder of each thread, reused for its next JPEG."""

    decoder: ctypes.c_void_p | None = None


_kept = _Kept()


@contextmanager
def _decoder() -> Iterator[ctypes.c_void_p]:
    """Yield the decoder of this thread. After an error it is destroyed, because it would refuse the next JPEG too."""
    decoder = _kept.decoder or ctypes.c_void_p(_library().tjInitDecompress())
    _kept.decoder = None
    try:
        yield decoder
    except BaseException:
        _library().tjDestroy(decoder)
        raise
    _kept.decoder = decoder


@contextmanager
def _encoder() -> Iterator[ctypes.c_void_p]:
    encoder = ctypes.c_void_p(_library().tjInitCompress())
    try:
        yield encoder
    finally:
        _library().tjDestroy(encoder)


def _require(handle: ctypes.c_void_p, status: int) -> None:
    if status != 0:
        raise JpegError(_library().tjGetErrorStr2(handle).decode(errors="replace"))


@cache
def _library() -> ctypes.CDLL:
    try:
        library = _loaded()
    except OSError as error:
        raise OSError(f"libturbojpeg is missing ({error}); install the package libturbojpeg0 (`make setup`)") from None
    handle, jpeg, number = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_ulong), ctypes.c_int
    numbers, planes = ctypes.POINTER(number), ctypes.POINTER(ctypes.c_void_p)
    library.tjInitDecompress.restype = library.tjInitCompress.restype = handle
    library.tjDestroy.argtypes = [handle]
    library.tjGetErrorStr2.argtypes, library.tjGetErrorStr2.restype = [handle], ctypes.c_char_p
    library.tjFree.argtypes = [ctypes.c_void_p]
    library.tjDecompressHeader3.argtypes = [handle, *jpeg, *(4 * [numbers])]
    library.tjDecompress2.argtypes = [handle, *jpeg, ctypes.c_void_p, *(5 * [number])]
    library.tjDecompressToYUVPlanes.argtypes = [handle, *jpeg, planes, number, numbers, number, number]
    library.tjCompressFromYUVPlanes.argtypes = [
        *(handle, planes, number, numbers, number, number),
        *(ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_ulong), number, number),
    ]
    return library


def _loaded() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libturbojpeg.so.0")
    except OSError:
        # The library may have another name. This search runs other programs, so it comes second.
        name = ctypes.util.find_library("turbojpeg")
        if name is None:
            raise
        return ctypes.CDLL(name)
