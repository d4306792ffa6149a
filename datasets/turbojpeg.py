"""libjpeg-turbo's decoder with its verdict: a corrupt JPEG is an error here, where other readers return noise.

FFCV's own binding drops the library's return code, and Pillow ignores the library's warnings.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import numpy as np
from numpy.typing import NDArray

PIXELS_RGB, PIXELS_CMYK = 0, 11
STOP_ON_WARNING = 8192


class JpegError(ValueError):
    """libjpeg-turbo could not decode a JPEG, or decoded it with a warning."""


class ColourSpace(IntEnum):
    RGB = 0
    YCBCR = 1
    GREY = 2
    CMYK = 3
    YCCK = 4


@dataclass(frozen=True)
class JpegHeader:
    """Size in pixels and colour space of a JPEG."""

    width: int
    height: int
    colour_space: ColourSpace

    @property
    def has_four_inks(self) -> bool:
        return self.colour_space in (ColourSpace.CMYK, ColourSpace.YCCK)


def read_header(jpeg: bytes) -> JpegHeader:
    """Raises JpegError when `jpeg` does not start like a JPEG that this library can decode."""
    width, height, subsampling, colour_space = (ctypes.c_int() for _ in range(4))
    with _decoder() as decoder:
        status = _library().tjDecompressHeader3(
            decoder, jpeg, len(jpeg), *map(ctypes.byref, (width, height, subsampling, colour_space))
        )
        if status != 0:
            raise JpegError(_message(decoder))
    return JpegHeader(width.value, height.value, ColourSpace(colour_space.value))


def decode(jpeg: bytes, header: JpegHeader) -> NDArray[np.uint8]:
    """Decode every pixel: uint8 (height, width, 3) RGB, or (height, width, 4) as stored for CMYK and YCCK.

    Raises:
        JpegError: with the library's words, also where it only warns (truncated or damaged data).
    """
    pixel_format, channels = (PIXELS_CMYK, 4) if header.has_four_inks else (PIXELS_RGB, 3)
    pixels = np.empty((header.height, header.width, channels), np.uint8)
    with _decoder() as decoder:
        status = _library().tjDecompress2(
            decoder,
            jpeg,
            len(jpeg),
            pixels.ctypes.data,
            header.width,
            0,
            header.height,
            pixel_format,
            STOP_ON_WARNING,
        )
        if status != 0:
            raise JpegError(_message(decoder))
    return pixels


@cache
def _library() -> ctypes.CDLL:
    name = ctypes.util.find_library("turbojpeg") or "libturbojpeg.so.0"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise OSError(f"libturbojpeg is missing ({error}); install the package libturbojpeg0 (`make setup`)") from None
    ints = ctypes.POINTER(ctypes.c_int)
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjDestroy.argtypes = [ctypes.c_void_p]
    library.tjGetErrorStr2.argtypes = [ctypes.c_void_p]
    library.tjGetErrorStr2.restype = ctypes.c_char_p
    library.tjDecompressHeader3.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ulong, ints, ints, ints, ints]
    library.tjDecompress2.argtypes = [
        *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ]
    return library


@contextmanager
def _decoder() -> Iterator[ctypes.c_void_p]:
    decoder = ctypes.c_void_p(_library().tjInitDecompress())
    try:
        yield decoder
    finally:
        _library().tjDestroy(decoder)


def _message(decoder: ctypes.c_void_p) -> str:
    return _library().tjGetErrorStr2(decoder).decode(errors="replace")
