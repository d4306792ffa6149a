from __future__ import annotations

import io
import re
import struct
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from datasets import turbojpeg
from datasets.prepare.convert import (
    MAX_JPEG_BYTES,
    MAX_PIXELS,
    BadImageError,
    channel_statistics,
    pixel_sums,
    store_image,
)
from tests.betons import photograph
from tests.unit.pictures import decoded, encoded, jpeg, png_bomb, smooth_rgb

RGB = smooth_rgb()
GRAY = np.asarray(Image.fromarray(RGB).convert("L"))


def with_orientation(value: int, kind: str = "JPEG", **options: object) -> bytes:
    image = Image.fromarray(RGB)
    exif = image.getexif()
    exif[0x0112] = value
    return encoded(image, kind, exif=exif, **(options or {"quality": 95}))


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
        encoded(Image.fromarray(GRAY), quality=95),
        with_orientation(1),
        jpeg() + b"bytes after the end of the image",
    ],
    ids=["baseline", "progressive", "4:4:4", "gray", "upright by EXIF", "trailing bytes"],
)
def test_jpegs_that_fit_are_kept_byte_for_byte(data):
    stored = store_image(data, 48, 1)
    assert stored.jpeg == data
    assert (stored.width, stored.height) == (64, 48)


def test_the_header_check_finds_truncation_only():
    data = jpeg()
    damaged = data[: len(data) // 2] + b"\xff\xd9" + data[len(data) // 2 :]
    with pytest.raises(BadImageError, match="damaged JPEG"):
        store_image(damaged, 48, 90)
    assert store_image(damaged, 48, 90, "header").jpeg == damaged
    with pytest.raises(BadImageError, match="cut short: it has no end"):
        store_image(data[:-2], 48, 90, "header")
    with pytest.raises(BadImageError, match="damaged JPEG"):
        store_image(damaged, 24, 90, "header")  # has to be decoded, for it is resized


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
    "gray png": (encoded(Image.fromarray(GRAY), "PNG"), np.repeat(GRAY[..., None], 3, 2)),
    "cmyk jpeg": (encoded(Image.fromarray(RGB).convert("CMYK"), quality=95), RGB),
    "palette": (
        encoded(Image.fromarray(RGB).quantize(256), "PNG"),
        np.asarray(Image.fromarray(RGB).quantize(256).convert("RGB")),
    ),
    "gif": (encoded(Image.fromarray(RGB), "GIF"), RGB),
    "webp": (encoded(Image.fromarray(RGB), "WEBP", lossless=True), RGB),
    "bmp": (encoded(Image.fromarray(RGB), "BMP"), RGB),
    "tiff": (encoded(Image.fromarray(RGB), "TIFF"), RGB),
    "16 bits": (encoded(Image.fromarray(GRAY.astype(np.uint16) * 257), "PNG"), np.repeat(GRAY[..., None], 3, 2)),
    "16-bit tiff": (encoded(Image.fromarray(GRAY.astype(np.uint16) * 257), "TIFF"), np.repeat(GRAY[..., None], 3, 2)),
    "1 bit": (
        encoded(Image.fromarray(GRAY > 127), "PNG"),
        np.repeat(np.where(GRAY > 127, 255, 0)[..., None], 3, 2),
    ),
}


@pytest.mark.parametrize("kind", ODD_KINDS)
def test_other_formats_are_converted_to_rgb(kind):
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


def test_palette_with_a_transparent_color_is_composed_over_white():
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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("PNG", {}), ("TIFF", {"compression": "raw"}), ("TIFF", {"compression": "tiff_lzw"})],
    ids=["jpeg", "png", "raw tiff", "lzw tiff"],
)
def test_the_orientation_is_applied_once_and_not_kept(kind, options, orientation):
    data = with_orientation(orientation, kind, **options)
    stored = store_image(data, None, 95)
    upright = {
        1: RGB,
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
    assert stored.jpeg == data or b"Exif" not in stored.jpeg


def test_rotated_gray_jpegs_stay_gray():
    image = Image.fromarray(GRAY)
    exif = image.getexif()
    exif[0x0112] = 6
    stored = store_image(encoded(image, exif=exif, quality=95), None, 95)
    assert closeness(decoded(stored.jpeg), np.repeat(GRAY.T[:, ::-1, None], 3, 2)) < 3
    assert Image.open(io.BytesIO(stored.jpeg)).mode == "L"


def test_jpegs_larger_than_a_page_of_a_beton_are_encoded_again():
    stored = store_image(jpeg() + bytes(MAX_JPEG_BYTES), None, 95)
    assert len(stored.jpeg) < 10_000
    assert closeness(decoded(stored.jpeg), RGB) < 3


def test_damaged_exif_is_ignored():
    data = with_orientation(6)
    start = data.index(b"Exif\0\0") + 6
    broken = data[:start] + b"\xff" * 8 + data[start + 8 :]
    assert store_image(broken, None, 95).jpeg == broken


def tiff_with_two_numbers_of_rows() -> bytes:
    data = encoded(Image.fromarray(RGB), "TIFF")
    return data.replace(struct.pack("<HHI", 278, 4, 1), struct.pack("<HHI", 278, 3, 2))


def png_with_invalid_animation() -> bytes:
    data = encoded(Image.fromarray(RGB), "PNG")
    chunk = b"acTL" + bytes(8)
    return data[:33] + struct.pack(">I", 8) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def cmyk_jpeg_with_damaged_exif() -> bytes:
    exif = b"Exif\0\0MM\0*\xff\xff\xff\xff"
    return encoded(Image.fromarray(RGB).convert("CMYK"), quality=95, exif=exif)


@pytest.mark.parametrize(
    "make", [tiff_with_two_numbers_of_rows, png_with_invalid_animation, cmyk_jpeg_with_damaged_exif]
)
def test_unusual_metadata_is_ignored(make):
    with pytest.warns(UserWarning, match=r"too many entries|Invalid APNG|Corrupt EXIF"):
        Image.open(io.BytesIO(make())).load()
    assert closeness(stored_pixels(make()), RGB) < 4


def tiff_without_readable_colors() -> bytes:
    """Return a TIFF that Pillow would read with black as white, because it skips the damaged tag."""
    data = encoded(Image.fromarray(GRAY), "TIFF")
    return data.replace(struct.pack("<HHI", 262, 3, 1), struct.pack("<HHI", 262, 3, 1 << 24))


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
        (tiff_without_readable_colors(), "Tag data larger than file"),
        (png_bomb(), f"more than {MAX_PIXELS:,} pixels"),
        (jpeg_bomb(), f"60000x60000 is more than {MAX_PIXELS:,} pixels"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating point"),
        (encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "do not fit into 16 bits"),
    ],
    ids=[
        *("empty", "text", "jpeg start only", "truncated", "zeros", "cut and ended", "no end marker", "cmyk truncated"),
        *("12 bits", "truncated png", "png checksum", "tiff tag", "png bomb", "jpeg bomb", "float"),
        "32 bits",
    ],
)
def test_bad_images_are_refused_with_a_reason(data, reason):
    with pytest.raises(BadImageError, match=reason):
        store_image(data, 500, 90)


@pytest.mark.parametrize("bad", [twelve_bit_jpeg(), truncated_in_the_middle(), b"\xff\xd8\xff\xe0 and then words" * 9])
@pytest.mark.parametrize("max_side", [None, 24])
def test_a_bad_image_does_not_affect_the_next(bad, max_side):
    good = store_image(jpeg(), max_side, 95)
    with pytest.raises(BadImageError):
        store_image(bad, max_side, 95)
    assert store_image(jpeg(), max_side, 95) == good


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_extreme_shapes_survive(size):
    stored = store_image(encoded(Image.new("RGB", size, (9, 200, 30)), "PNG"), 100, 90)
    assert (stored.width, stored.height) == size


def test_sides_too_long_for_a_jpeg_are_refused():
    with pytest.raises(BadImageError, match="at most 65500"):
        store_image(encoded(Image.new("L", (65_501, 1)), "PNG"), None, 90)


def test_sums_give_mean_and_deviation_of_the_pixels():
    images = [jpeg(), jpeg(40, 30, seed=1), encoded(Image.fromarray(GRAY))]
    pixels_NC = np.concatenate([decoded(image).reshape(-1, 3) for image in images]) / 255
    mean, std = channel_statistics(pixel_sums(images[0]) + pixel_sums(images[1]) + pixel_sums(images[2]))
    assert mean == pytest.approx(pixels_NC.mean(0), abs=1e-6)
    assert std == pytest.approx(pixels_NC.std(0), abs=1e-6)


def verdict(read, data: bytes) -> str:
    try:
        read(data, turbojpeg.read_header(data))
    except turbojpeg.JpegError as error:
        return str(error)
    return "sound"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 0},
        {"progressive": True},
        {"optimize": True},
        {"restart_marker_rows": 1},
        {"kind": "L"},
        {"kind": "CMYK"},
    ],
    ids=["4:2:0", "4:4:4", "progressive", "own tables", "restart markers", "gray", "cmyk"],
)
def test_verify_finds_the_damage_that_decoding_finds(options):
    kind = options.pop("kind", "RGB")
    data = encoded(photograph(120, 90, 1).convert(kind), "JPEG", **{"quality": 90, **options})
    rng = np.random.default_rng(0)
    damaged = [data, *(data[:end] for end in rng.integers(200, len(data), 40))]
    for start in rng.integers(len(data) // 5, len(data) - 40, 80):
        flipped, zeroed = bytearray(data), bytearray(data)
        flipped[start] ^= 1 << int(rng.integers(8))
        zeroed[start : start + 30] = bytes(30)
        damaged += [bytes(flipped), bytes(zeroed)]
    verdicts = [verdict(turbojpeg.decode, one) for one in damaged]
    assert [verdict(turbojpeg.verify, one) for one in damaged] == verdicts
    assert verdicts[0] == "sound"
    assert sum(reason != "sound" for reason in verdicts) > 40


def muted_photograph(width: int, height: int) -> Image.Image:
    """Make a photograph whose colors have as little fine detail as real ones."""
    image = photograph(width, height, 3)
    return Image.blend(image.convert("L").convert("RGB"), image, 0.2)


def luma(data: bytes | Image.Image) -> np.ndarray:
    return np.asarray((data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data))).convert("L"))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("size", [(400, 300), (333, 401)])
def test_resizing_planes_gives_pillows_pixels(size, subsampling):
    for image, max_side in product((muted_photograph(*size), Image.fromarray(smooth_rgb(*size))), (299, 200, 151)):
        original = encoded(image, "JPEG", quality=95, subsampling=subsampling)
        stored = store_image(original, max_side, 100)
        expected = Image.open(io.BytesIO(original)).resize((stored.width, stored.height), Image.Resampling.BILINEAR)
        assert min(stored.width, stored.height) == max_side
        assert closeness(decoded(stored.jpeg), np.asarray(expected)) < 1
        assert closeness(luma(stored.jpeg), luma(expected)) < 0.5


@pytest.mark.parametrize(("max_side", "num_pixels"), [(75, 4), (74, 4), (37, 16), (18, 64)])
def test_strong_downscaling_decodes_at_a_fraction(max_side, num_pixels, monkeypatch):
    original, scales = encoded(photograph(400, 300, 5), "JPEG", quality=95), []
    decode_planes = turbojpeg.decode_planes
    monkeypatch.setattr(
        turbojpeg, "decode_planes", lambda *arguments: scales.append(arguments[2]) or decode_planes(*arguments)
    )
    stored = store_image(original, max_side, 100)
    assert scales[0] ** 2 == num_pixels
    expected = Image.open(io.BytesIO(original)).resize((stored.width, stored.height), Image.Resampling.BILINEAR)
    assert closeness(luma(stored.jpeg), luma(expected)) < 1


def test_resized_gray_jpegs_stay_gray():
    stored = store_image(encoded(photograph(133, 99, 2).convert("L"), quality=98), 51, 98)
    assert (stored.width, stored.height) == (69, 51)
    assert Image.open(io.BytesIO(stored.jpeg)).mode == "L"
    expected = photograph(133, 99, 2).convert("L").resize((69, 51), Image.Resampling.BILINEAR)
    assert closeness(luma(stored.jpeg), np.asarray(expected)) < 1


def test_orientation_is_found_after_other_metadata():
    turned = with_orientation(6)
    icc = encoded(Image.fromarray(RGB), icc_profile=b"Exif" * 9_000, quality=95)
    start = icc.index(b"\xff\xe2")
    end = start + 2 + int.from_bytes(icc[start + 2 : start + 4])
    moved = turned[:2] + icc[start:end] + turned[2:]
    assert store_image(moved, None, 95).width == 48
    xmp = b'http://ns.adobe.com/xap/1.0/\0<rdf tiff:Orientation="6"/>'
    data = jpeg()
    by_xmp = data[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + data[2:]
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(by_xmp))).size == (48, 64)
    assert store_image(by_xmp, None, 95).width == 48


def test_the_version_is_that_of_the_library_that_encodes():
    version = turbojpeg.library_version()
    assert re.fullmatch(r"\d+\.\d+(\.\d+)*", version)
    lines = Path("/proc/self/maps").read_text().splitlines()
    files = {Path(line.split(maxsplit=5)[5]) for line in lines if "libturbojpeg" in line}
    assert any(f"libjpeg-turbo version {version} ".encode() in file.read_bytes() for file in files)
