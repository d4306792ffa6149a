from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from datasets.conversion import channel_statistics
from datasets.images import MAX_JPEG_BYTES, MAX_PIXELS, BadImageError, store_image
from tests.unit.pictures import decoded, encoded, jpeg, png_bomb, smooth_rgb

RGB = smooth_rgb()
GREY = np.asarray(Image.fromarray(RGB).convert("L"))


def with_orientation(value: int, **size: int) -> bytes:
    image = Image.fromarray(smooth_rgb(**size))
    exif = image.getexif()
    exif[0x0112] = value
    return encoded(image, "JPEG", exif=exif, quality=95)


def stored_pixels(data: bytes, max_side: int | None = None) -> np.ndarray:
    return decoded(store_image(data, max_side, 95).jpeg)


def closeness(left: np.ndarray, right: np.ndarray) -> float:
    assert left.shape == right.shape
    return float(np.abs(left.astype(int) - right.astype(int)).mean())


@pytest.mark.parametrize(
    "data",
    [
        jpeg(),
        jpeg(progressive=True),
        jpeg(subsampling=0),
        encoded(Image.fromarray(GREY), quality=95),
        with_orientation(1),
        jpeg() + b"bytes after the end of the image",
    ],
    ids=["baseline", "progressive", "4:4:4", "grey", "upright by EXIF", "trailing bytes"],
)
def test_jpegs_that_fit_are_kept_byte_for_byte(data):
    stored = store_image(data, 48, 1)
    assert stored.jpeg == data
    assert (stored.width, stored.height) == (64, 48)


def test_shorter_side_is_what_max_side_limits():
    assert store_image(jpeg(64, 48), 48, 90).width == 64
    stored = store_image(jpeg(64, 48), 24, 95)
    assert (stored.width, stored.height) == (32, 24)
    assert decoded(stored.jpeg).shape == (24, 32, 3)
    assert closeness(decoded(stored.jpeg), np.asarray(Image.fromarray(RGB).resize((32, 24)))) < 3


def test_resizing_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels = stored_pixels(encoded(Image.fromarray(stripes), "PNG"), max_side=8)
    assert abs(pixels - 127).max() < 25


ODD_KINDS = {
    "png": (encoded(Image.fromarray(RGB), "PNG"), RGB),
    "grey png": (encoded(Image.fromarray(GREY), "PNG"), np.repeat(GREY[..., None], 3, 2)),
    "cmyk jpeg": (encoded(Image.fromarray(RGB).convert("CMYK"), quality=95), RGB),
    "palette": (
        encoded(Image.fromarray(RGB).quantize(256), "PNG"),
        np.asarray(Image.fromarray(RGB).quantize(256).convert("RGB")),
    ),
    "gif": (encoded(Image.fromarray(RGB), "GIF"), RGB),
    "webp": (encoded(Image.fromarray(RGB), "WEBP", lossless=True), RGB),
    "bmp": (encoded(Image.fromarray(RGB), "BMP"), RGB),
    "tiff": (encoded(Image.fromarray(RGB), "TIFF"), RGB),
    "16 bits": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"), np.repeat(GREY[..., None], 3, 2)),
    "16-bit tiff": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"), np.repeat(GREY[..., None], 3, 2)),
    "1 bit": (
        encoded(Image.fromarray(GREY > 127), "PNG"),
        np.repeat(np.where(GREY > 127, 255, 0)[..., None], 3, 2),
    ),
}


@pytest.mark.parametrize("kind", ODD_KINDS)
def test_other_kinds_become_the_rgb_they_mean(kind):
    data, expected = ODD_KINDS[kind]
    stored = store_image(data, None, 98)
    assert stored.jpeg != data
    assert (stored.width, stored.height) == (64, 48)
    assert closeness(decoded(stored.jpeg), expected) < (14 if kind in ("1 bit", "gif") else 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_composed_over_white(mode):
    alpha = np.zeros((48, 64), np.uint8)
    alpha[:, 32:] = 255
    image = Image.fromarray(np.dstack([np.full((48, 64, 3), 40, np.uint8), alpha]))
    pixels = stored_pixels(encoded(image.convert(mode), "TIFF" if mode == "PA" else "PNG"))
    assert pixels[:, :24].min() > 245
    assert abs(pixels[:, 40:] - 40).max() < 10


def test_palette_with_a_transparent_colour_is_composed_over_white():
    image = Image.new("P", (64, 48), 0)
    image.putpalette([10, 20, 30, 200, 50, 50])
    image.paste(1, (32, 0, 64, 48))
    pixels = stored_pixels(encoded(image, "PNG", transparency=0))
    assert pixels[:, :24].min() > 245
    assert closeness(pixels[:, 40:], np.full((48, 24, 3), (200, 50, 50))) < 4


def test_16_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65_535, 64).astype(np.uint16)[None].repeat(48, 0)
    pixels = stored_pixels(encoded(Image.fromarray(ramp), "PNG"))
    assert np.abs(pixels[24, :, 0] - np.linspace(0, 255, 64)).max() < 4


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied_and_not_kept(orientation):
    data = with_orientation(orientation)
    stored = store_image(data, None, 95)
    upright = {
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: RGB.transpose(1, 0, 2)[:, ::-1],
        7: RGB.transpose(1, 0, 2)[::-1, ::-1],
        8: RGB.transpose(1, 0, 2)[::-1],
    }[orientation]
    assert closeness(decoded(stored.jpeg), upright) < 3
    assert (stored.height, stored.width) == upright.shape[:2]
    assert b"Exif" not in stored.jpeg


def test_grey_jpegs_that_are_turned_stay_grey():
    image = Image.fromarray(GREY)
    exif = image.getexif()
    exif[0x0112] = 6
    stored = store_image(encoded(image, exif=exif, quality=95), None, 95)
    assert closeness(decoded(stored.jpeg), np.repeat(GREY.T[:, ::-1, None], 3, 2)) < 3
    assert stored.histogram[0].tolist() == stored.histogram[2].tolist()
    assert Image.open(io.BytesIO(stored.jpeg)).mode == "L"


def test_jpegs_larger_than_a_page_of_a_beton_are_encoded_again():
    stored = store_image(jpeg() + bytes(MAX_JPEG_BYTES), None, 95)
    assert len(stored.jpeg) < 10_000
    assert closeness(decoded(stored.jpeg), RGB) < 3


def test_damaged_exif_is_no_reason_to_refuse_sound_pixels():
    data = with_orientation(6)
    start = data.index(b"Exif\0\0") + 6
    broken = data[:start] + b"\xff" * 8 + data[start + 8 :]
    assert store_image(broken, None, 95).jpeg == broken


def truncated_in_the_middle() -> bytes:
    data = jpeg(256, 256, quality=95)
    return data[: len(data) // 2]


def zeros_in_the_middle() -> bytes:
    data = jpeg(256, 256, quality=95)
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def cut_short_but_ended() -> bytes:
    return truncated_in_the_middle() + b"\xff\xd9"


def truncated_png() -> bytes:
    data = encoded(Image.fromarray(smooth_rgb(256, 256)), "PNG")
    return data[: len(data) // 2]


def bad_checksum_png() -> bytes:
    data = bytearray(encoded(Image.fromarray(smooth_rgb(256, 256)), "PNG"))
    data[data.index(b"IDAT") + 40] ^= 0xFF
    return bytes(data)


def twelve_bit_jpeg() -> bytes:
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    data[frame + 4] = 12
    return bytes(data)


def jpeg_bomb() -> bytes:
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"this is no picture at all\n" * 20, "not an image"),
        (b"\xff\xd8\xff\xe0 and then words" * 9, "JPEG"),
        (truncated_in_the_middle(), "damaged JPEG"),
        (zeros_in_the_middle(), "damaged JPEG"),
        (cut_short_but_ended(), "damaged JPEG"),
        (jpeg()[:-2], "damaged JPEG"),
        (encoded(Image.fromarray(smooth_rgb(256, 256)).convert("CMYK"))[:-2000], "damaged JPEG"),
        (twelve_bit_jpeg(), "precision"),
        (truncated_png(), "truncated"),
        (bad_checksum_png(), "."),
        (png_bomb(), f"more than {MAX_PIXELS:,} pixels"),
        (jpeg_bomb(), f"60000x60000 is more than {MAX_PIXELS:,} pixels"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating point"),
        (encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "do not fit 16 bits"),
    ],
    ids=[
        *("empty", "text", "jpeg start only", "truncated", "zeros", "cut and ended", "no end marker", "cmyk truncated"),
        *("12 bits", "truncated png", "png checksum", "png bomb", "jpeg bomb", "float", "32 bits"),
    ],
)
def test_bad_images_are_refused_with_a_reason(data, reason):
    with pytest.raises(BadImageError, match=reason):
        store_image(data, 500, 90)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_extreme_shapes_survive(size):
    stored = store_image(encoded(Image.new("RGB", size, (9, 200, 30)), "PNG"), 100, 90)
    assert (stored.width, stored.height) == size


def test_sides_that_no_jpeg_can_have_are_refused():
    with pytest.raises(BadImageError, match="at most 65500"):
        store_image(encoded(Image.new("L", (65_501, 1)), "PNG"), None, 90)


def test_histogram_gives_mean_and_deviation_of_the_pixels():
    stored = store_image(jpeg(), None, 90)
    pixels_NC = decoded(stored.jpeg).reshape(-1, 3) / 255
    mean, std = channel_statistics(stored.histogram)
    assert mean == pytest.approx(pixels_NC.mean(0), abs=1e-6)
    assert std == pytest.approx(pixels_NC.std(0), abs=1e-6)
