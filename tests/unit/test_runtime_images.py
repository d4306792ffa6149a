from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from datasets.loading.loader import CenterCrop, MultiResolutionLoader
from pipeline.serving.runtime import images as runtime_images
from pipeline.serving.runtime.images import MAX_BYTES, BadImageError, Picture, dct_fraction
from tests.betons import jpeg_bytes, photograph, write_images
from tests.unit.pictures import encoded, jpeg, png_bomb, smooth_rgb

BAD = {
    "empty": (b"", "empty"),
    "text": (b"hello", "not a JPEG or PNG file"),
    "truncated": (jpeg(64, 64)[:500], "truncated|."),
    "a gif": (encoded(Image.fromarray(smooth_rgb()), "GIF"), "not a JPEG or PNG file"),
    "bomb": (png_bomb(), "pixels"),
    "no bytes": ("text", "given as str"),
    "nothing": (None, "given as NoneType"),
    "floats": (np.zeros((8, 8, 3), np.float32), r"float32 \(8, 8, 3\); give a square crop, uint8"),
    "oblong": (np.zeros((8, 9, 3), np.uint8), "give a square crop"),
    "one channel": (np.zeros((8, 8), np.uint8), "give a square crop"),
    "no pixels": (np.zeros((0, 0, 3), np.uint8), "give a square crop"),
}


def decode(file: bytes) -> Image.Image:
    """Returns the whole image, decoded at full size."""
    return Picture(file, 1.0)._decoded(100_000)


def center_crops(image: object, sides: tuple[int, ...], fraction: float) -> dict[int, NDArray[np.uint8]]:
    """Returns the crop at each side."""
    return {side: Picture(image, fraction).crop(side) for side in sides}


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
            # The loader interpolates chroma once, Pillow twice, and each may decode at a fraction of the size.
            assert np.abs(crops[side].astype(int) - loaded[side][index].numpy()).mean() < 5, (index, side)


@pytest.mark.parametrize(
    ("extent", "side", "fraction"), [(224, 224, 1), (559.9, 224, 1), (560, 224, 2), (9000, 112, 8)]
)
def test_the_smallest_decode_that_suffices_is_taken(extent, side, fraction):
    assert dct_fraction(extent, side) == fraction


def test_a_decode_serves_every_side_that_it_is_fine_enough_for():
    picture = Picture(jpeg_bytes(photograph(400, 300, seed=4)), 1.0)
    picture.crop(60)
    assert picture._kept
    quarter = picture._kept[1]
    assert quarter.size == (100, 75)
    picture.crop(32)
    assert picture._kept[1] is quarter, "a finer decode than needed is there already"
    picture.crop(120)
    assert picture._kept[1].size == (200, 150)
    picture.crop(300)
    assert picture._kept[1].size == (400, 300)
    assert Picture(encoded(photograph(400, 300, seed=4), "PNG"), 1.0)._decoded(32).size == (400, 300)


def test_a_large_decode_is_not_kept(monkeypatch):
    monkeypatch.setattr(runtime_images, "_KEPT_PIXELS", 1000)
    file = jpeg_bytes(photograph(400, 300, seed=4))
    picture = Picture(file, 0.875)
    again = [picture.crop(side) for side in (64, 200)]
    assert picture._kept is None
    monkeypatch.undo()
    for crop, side in zip(again, (64, 200), strict=True):
        assert np.array_equal(crop, Picture(file, 0.875).crop(side))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright_at_any_decode(orientation):
    upright = photograph(160, 160, seed=6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)
    stored = upright if turned is None else upright.transpose(Image.Transpose(turned))
    file = encoded(stored, "JPEG", quality=95, exif=exif)
    for side in (160, 40):
        expected = Picture(encoded(upright, "JPEG", quality=95), 1.0).crop(side)
        assert np.abs(Picture(file, 1.0).crop(side).astype(int) - expected).mean() < 3


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


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_metadata_is_no_reason_to_refuse():
    file = jpeg(64, 48, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(file).size == (64, 48)


@pytest.mark.parametrize(("image", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_images_have_a_reason(image, reason):
    with pytest.raises(BadImageError, match=reason):
        Picture(image, 0.875).crop(32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_thirty_thousand_pixels_are_refused_before_they_are_decoded(kind):
    # One colour and progressive, so that the file itself is quick to write; 30,000 x 4,000 is over the limit.
    file = encoded(Image.new("L", (30_000, 4_000)), kind)
    with pytest.raises(BadImageError, match=r"30000x4000 is more than 89,478,485 pixels|decompression bomb"):
        Picture(file, 0.875).crop(32)
    within = encoded(Image.new("L", (30_000, 200)), kind)
    assert Picture(within, 0.875).crop(32).shape == (32, 32, 3)


def test_a_file_of_too_many_bytes_is_refused():
    with pytest.raises(BadImageError, match="33,554,433 bytes, more than 33,554,432"):
        Picture(b"\xff" * (MAX_BYTES + 1), 0.875)


def test_an_array_is_a_crop_and_is_used_whole():
    crop = smooth_rgb(48, 48)
    assert np.array_equal(Picture(crop, 0.875).crop(48), crop)
    smaller = Image.fromarray(crop).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(Picture(crop, 0.875).crop(32), smaller)


def test_a_grey_progressive_image_is_decoded_at_a_fraction():
    grey = photograph(400, 300, seed=4).convert("L")
    plain, progressive = (Picture(encoded(grey, "JPEG", progressive=is_so), 0.875) for is_so in (False, True))
    assert np.array_equal(plain.crop(50), progressive.crop(50))
    assert progressive._kept
    assert progressive._kept[0] == 4
