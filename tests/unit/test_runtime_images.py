from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from datasets.loading import kernels
from datasets.loading.loader import CenterCrop, MultiResolutionLoader
from datasets.prepare import convert
from pipeline.serving.runtime import images as runtime_images
from pipeline.serving.runtime.images import MAX_BYTES, BadImageError, Picture, dct_fraction
from tests.betons import jpeg_bytes, photograph, write_images
from tests.unit.pictures import encoded, jpeg, png_bomb, smooth_rgb

BAD = {
    "empty": (b"", "empty"),
    "text": (b"hello", "not a JPEG, PNG, WebP, BMP, TIFF, PPM or AVIF file"),
    "truncated": (jpeg(64, 64)[:500], "truncated|."),
    "a gif": (encoded(Image.fromarray(smooth_rgb()), "GIF"), "not a JPEG, PNG, WebP, BMP, TIFF, PPM or AVIF file"),
    "bomb": (png_bomb(), "pixels"),
    "text that is not base64": ("text!", "not base64"),
    "base64 of a text": (base64.b64encode(b"hello").decode(), "not a JPEG, PNG, WebP, BMP, TIFF, PPM or AVIF file"),
    "empty text": ("", "empty"),
    "half a character": ("\udcff", "not base64"),
    "a number": (3, "given as int"),
    "a list": ([1, 2], "given as list"),
    "nothing": (None, "the image is missing"),
    "not a number": (float("nan"), "the image is missing"),
    "null as MLflow writes it": ("None", "the image is missing"),
    "a truncated WebP": (encoded(Image.fromarray(smooth_rgb()), "WEBP")[:200], "."),
    "a truncated BMP": (encoded(Image.fromarray(smooth_rgb()), "BMP")[:2000], "truncated"),
    "a truncated TIFF": (encoded(Image.fromarray(smooth_rgb()), "TIFF")[:2000], "."),
    "floating-point pixels": (encoded(Image.new("F", (8, 8)), "TIFF"), "floating-point"),
    "32-bit pixels": (encoded(Image.new("I", (8, 8), 70_000), "TIFF"), "do not fit 16 bits"),
    "floats": (np.zeros((8, 8, 3), np.float32), r"float32 \(8, 8, 3\); give a square crop, uint8"),
    "oblong": (np.zeros((8, 9, 3), np.uint8), "give a square crop"),
    "one channel": (np.zeros((8, 8), np.uint8), "give a square crop"),
    "no pixels": (np.zeros((0, 0, 3), np.uint8), "give a square crop"),
}


def decode(file: bytes) -> Image.Image:
    """Return the whole image, decoded at full size."""
    return Picture(file, 1.0, 100_000)._decode(ExitStack()).image


def center_crops(image: object, sides: tuple[int, ...], fraction: float) -> dict[int, NDArray[np.uint8]]:
    """Return the crop at each side."""
    return {side: Picture(image, fraction, max(sides)).crop(side) for side in sides}


def test_the_crops_are_the_loaders(tmp_path):
    images = [photograph(120, 90, seed=1), photograph(333, 500, seed=2), photograph(64, 64, seed=3)]
    sides, fraction = (64, 48, 32), 0.875
    beton = write_images(tmp_path / "validation.beton", images)
    with closing(MultiResolutionLoader(beton, sides, 3, crop=CenterCrop(fraction), shuffle=False)) as loader:
        (loaded,) = [{side: batch.images[side].clone() for side in sides} for batch in loader.epoch(0)]
    for index, image in enumerate(images):
        crops = center_crops(jpeg_bytes(image), sides, fraction)
        for side in sides:
            assert crops[side].shape == (side, side, 3)
            # The loader interpolates chroma once, Pillow twice.
            difference = np.abs(crops[side].astype(int) - loaded[side][index].numpy()).mean()
            assert difference < 3, (index, side)


@pytest.mark.parametrize(
    ("extent", "side", "fraction"), [(224, 224, 1), (447.9, 224, 1), (448, 224, 2), (9000, 112, 8)]
)
def test_the_fraction_is_the_loaders(extent, side, fraction):
    assert dct_fraction(extent, side) == fraction == kernels.dct_fraction.py_func(extent, extent, side)


def test_the_largest_side_decides_how_finely_every_crop_is_decoded():
    file = jpeg_bytes(photograph(400, 300, seed=4))
    for largest, size in ((300, (400, 300)), (150, (200, 150)), (60, (100, 75)), (37, (50, 38))):
        picture = Picture(file, 1.0, largest)
        first = picture.crop(32)
        assert picture._kept
        decoded = picture._kept.image
        assert decoded.size == size
        picture.crop(largest)
        assert picture._kept.image is decoded, "one decode serves every side"
        assert np.array_equal(picture.crop(32), first)
    assert Picture(encoded(photograph(400, 300, seed=4), "PNG"), 1.0, 32)._decode(ExitStack()).image.size == (400, 300)


def test_a_large_decode_is_not_kept(monkeypatch):
    monkeypatch.setattr(runtime_images, "_KEPT_PIXELS", 1000)
    file = jpeg_bytes(photograph(400, 300, seed=4))
    picture = Picture(file, 0.875, 200)
    again = [picture.crop(side) for side in (64, 200)]
    assert picture._kept is None
    monkeypatch.undo()
    for crop, side in zip(again, (64, 200), strict=True):
        assert np.array_equal(crop, Picture(file, 0.875, 200).crop(side))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright_at_any_decode(orientation):
    upright = photograph(170, 160, seed=6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)
    stored = upright if turned is None else upright.transpose(Image.Transpose(turned))
    file = encoded(stored, "JPEG", quality=95, exif=exif)
    for side in (160, 40):
        expected = Picture(encoded(upright, "JPEG", quality=95), 1.0, side).crop(side)
        assert np.abs(Picture(file, 1.0, side).crop(side).astype(int) - expected).mean() < 3


def test_unusual_files_become_upright_rgb():
    rgb = Image.fromarray(smooth_rgb(40, 20))
    pixels = np.asarray(rgb).astype(int)
    grey = Image.fromarray(np.linspace(0, 255, 800).astype(np.uint8).reshape(20, 40))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert np.array_equal(decode(encoded(rgb, "PNG")), pixels)
    assert np.array_equal(decode(encoded(grey, "PNG")), np.stack([grey] * 3, axis=2))
    assert np.array_equal(decode(encoded(deep, "PNG")), np.stack([grey] * 3, axis=2))
    assert decode(encoded(grey, "JPEG")).mode == "RGB"
    assert np.abs(np.asarray(decode(encoded(rgb.convert("CMYK"), "JPEG", quality=95))) - pixels).mean() < 8
    clear = Image.merge("RGBA", (*rgb.split(), Image.new("L", rgb.size, 0)))
    assert np.asarray(decode(encoded(clear, "PNG"))).min() == 255
    palette = rgb.quantize(16)
    palette.info["transparency"] = 0
    assert decode(encoded(palette, "PNG")).mode == "RGB"


def test_serving_and_preparation_convert_every_mode_alike():
    rgb = Image.fromarray(smooth_rgb(40, 20))
    grey_HW = np.asarray(rgb.convert("L"))
    alpha = Image.fromarray(np.linspace(0, 255, 800).astype(np.uint8).reshape(20, 40))
    clear = Image.merge("RGBA", (*rgb.split(), alpha))
    images = [rgb.convert(mode) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV")]
    images += [clear.convert(mode) for mode in ("RGBA", "RGBa", "LA", "PA")]
    images += [Image.fromarray(grey_HW.astype(np.uint16) * 257)]
    images += [Image.fromarray(grey_HW.astype(np.int32) * 200)]
    for mode, transparency in (("L", 100), ("P", 3), ("RGB", tuple(smooth_rgb(40, 20)[0, 0].tolist()))):
        images.append(rgb.convert(mode))
        images[-1].info["transparency"] = transparency
    for image in images:
        served = runtime_images._rgb(image.copy())
        assert np.array_equal(served, convert.to_rgb(image.copy()).convert("RGB")), (image.mode, image.info)
    for image in (Image.new("F", (4, 4)), Image.new("I", (4, 4), 70_000), Image.new("I", (4, 4), -1)):
        with pytest.raises(BadImageError):
            runtime_images._rgb(image)
        with pytest.raises(convert.BadImageError):
            convert.to_rgb(image)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_metadata_is_no_reason_to_refuse():
    file = jpeg(64, 48, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(file).size == (64, 48)


@pytest.mark.parametrize(("image", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_images_have_a_reason(image, reason):
    with pytest.raises(BadImageError, match=reason):
        Picture(image, 0.875, 32).crop(32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_thirty_thousand_pixels_are_refused_before_they_are_decoded(kind):
    # One colour and progressive, so that the file itself is quick to write; 30,000 x 4,000 is over the limit.
    file = encoded(Image.new("L", (30_000, 4_000)), kind)
    with pytest.raises(BadImageError, match=r"30000x4000 is more than 89,478,485 pixels|decompression bomb"):
        Picture(file, 0.875, 32).crop(32)
    within = encoded(Image.new("L", (30_000, 200)), kind)
    assert Picture(within, 0.875, 32).crop(32).shape == (32, 32, 3)


def test_a_file_of_too_many_bytes_is_refused():
    with pytest.raises(BadImageError, match="33,554,433 bytes; at most 33,554,432 are allowed"):
        Picture(b"\xff" * (MAX_BYTES + 1), 0.875, 32)


def test_only_large_files_enter_the_limit_and_damaged_ones_leave_it():
    entered = []

    @contextmanager
    def limit() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    large, small = (encoded(Image.new("L", size), "PNG") for size in ((2000, 1001), (2000, 1000)))
    Picture(small, 0.875, 32, limit()).crop(32)
    assert entered == []
    Picture(large, 0.875, 32, limit()).crop(32)
    assert entered == ["in", "out"]
    semaphore = threading.Semaphore(1)
    with pytest.raises(BadImageError, match="truncated"):
        Picture(large[:-100], 0.875, 32, semaphore).crop(32)
    assert semaphore.acquire(blocking=False)


def test_an_array_is_a_crop_and_is_used_whole():
    crop = smooth_rgb(48, 48)
    assert np.array_equal(Picture(crop, 0.875, 48).crop(48), crop)
    smaller = Image.fromarray(crop).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(Picture(crop, 0.875, 48).crop(32), smaller)


def test_a_grey_progressive_image_is_decoded_at_a_fraction():
    grey = photograph(400, 300, seed=4).convert("L")
    plain, progressive = (Picture(encoded(grey, "JPEG", progressive=is_so), 0.875, 50) for is_so in (False, True))
    assert np.array_equal(plain.crop(50), progressive.crop(50))
    assert progressive._kept
    assert progressive._kept.image.size == (100, 75)


def test_base64_text_is_decoded_with_and_without_line_breaks():
    file = jpeg()
    expected = Picture(file, 0.875, 32).crop(32)
    for text in (base64.b64encode(file).decode(), base64.encodebytes(file).decode()):
        assert np.array_equal(Picture(text, 0.875, 32).crop(32), expected)
    assert np.array_equal(Picture(bytearray(file), 0.875, 32).crop(32), expected)


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "TIFF", "PPM"])
def test_other_formats_are_decoded_and_only_their_first_frame(kind):
    first, second = Image.fromarray(smooth_rgb(seed=1)), Image.fromarray(smooth_rgb(seed=2))
    options = {"WEBP": {"lossless": True}, "TIFF": {"compression": "tiff_lzw"}}.get(kind, {})
    frames = {} if kind in ("BMP", "PPM") else {"save_all": True, "append_images": [second]}
    assert np.array_equal(decode(encoded(first, kind, **options, **frames)), first)


def test_avif_is_decoded():
    image = Image.fromarray(smooth_rgb(seed=1))
    decoded = np.asarray(decode(encoded(image, "AVIF", quality=100, subsampling="4:4:4")), int)
    assert np.abs(decoded - np.asarray(image)).max() <= 4


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM"])
def test_the_pixel_limit_holds_for_every_format(kind):
    file = bytearray(encoded(Image.new("1", (9_600, 9_600)), kind))
    with pytest.raises(BadImageError, match=r"9600x9600 is more than 89,478,485 pixels|decompression bomb"):
        Picture(bytes(file), 0.875, 32).crop(32)


def test_a_turned_tiff_is_cropped_in_the_middle():
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.fromarray(smooth_rgb(40, 64, seed=3))
    stored = encoded(upright.transpose(Image.Transpose.ROTATE_90), "TIFF", exif=exif)
    assert np.array_equal(Picture(stored, 0.8, 32).crop(32), Picture(encoded(upright, "TIFF"), 0.8, 32).crop(32))
