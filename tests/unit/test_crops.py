from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop as PeerCrop

from datasets import kernels
from datasets.crops import CenterCrop, RandomResizedCrop
from datasets.order import pack_views
from tests.betons import jpeg_bytes, photograph

WHOLE = CenterCrop(1.0).parameters()


def resized(
    image: Image.Image, box: tuple[float, float, float, float], side: int, mirrored: bool = False
) -> np.ndarray:
    """The kernel's resize of a box (left, top, right, bottom)."""
    left, top, right, bottom = box
    pixels = np.array(image.convert("RGBA")).reshape(image.height, -1)
    out = np.zeros((side, side, 3), np.uint8)
    kernels.resize(pixels, float(top), float(left), float(bottom - top), float(right - left), mirrored, out)
    return out


def decoded(jpegs: list[bytes], shapes: list[tuple[int, int]], sides: tuple[int, ...], crop=WHOLE, views=None):
    """Images by side, and the status, of JPEGs that lie one after another."""
    sizes = np.array([len(jpeg) for jpeg in jpegs])
    images = tuple(np.zeros((len(jpegs), side, side, 3), np.uint8) for side in sides)
    status = np.full(len(jpegs), 255, np.uint8)
    storage = np.frombuffer(b"".join(jpegs), np.uint8)
    views = np.arange(len(jpegs), dtype=np.uint64) if views is None else views
    addresses = np.array([image.ctypes.data for image in images], np.uintp)
    offsets = np.cumsum(sizes) - sizes
    kernels.decode_views(views, storage, offsets, sizes, np.array(shapes), crop, np.array(sides), addresses, status)
    return images, status


def boxes(views: np.ndarray, height: int, width: int, crop: RandomResizedCrop) -> np.ndarray:
    """(top, left, height, width, mirrored) of every view, float64 (N, 5)."""
    return np.array([kernels.crop_box(view, height, width, crop.parameters()) for view in views], np.float64)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


BOXES = {
    "whole": (0, 0, 200, 150),
    "part": (31, 12, 187, 121),
    "corner": (150, 100, 200, 150),
    "fractional": (20.25, 13.5, 151.75, 145),
    "thin": (90, 0, 97, 150),
    "one pixel": (7, 9, 8, 10),
}


@pytest.mark.parametrize("side", [16, 64, 131])
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES.keys())
def test_resize_is_pillows_antialiased_bilinear(box, side):
    image = photograph(200, 150, seed=1)
    expected = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=box))
    out = resized(image, box, side)
    assert difference(out, expected) < 0.4
    assert np.abs(out.astype(int) - expected).max() <= 2


def test_resize_of_a_tiny_image():
    image = photograph(2, 3, seed=2)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    assert difference(resized(image, (0, 0, 2, 3), 32), expected) < 0.5


def test_mirrored_resize_is_the_mirror_image():
    image = photograph(120, 90, seed=3)
    box = (11, 5, 98, 71)
    assert np.array_equal(resized(image, box, 40, mirrored=True), resized(image, box, 40)[:, ::-1])


@pytest.mark.parametrize(("size", "side"), [((173, 91), 37), ((1601, 1201), 9)])
@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
def test_resize_keeps_a_flat_image(level, size, side):
    image = Image.new("RGB", size, (level, level, level))
    assert (resized(image, (3, 1, size[0] - 3, size[1] - 2), side) == level).all()


def test_sides_show_the_same_crop():
    views = pack_views(np.arange(6), seed=0, epoch=0)
    jpegs = [jpeg_bytes(photograph(150, 110, seed)) for seed in range(6)]
    (large, small), _ = decoded(jpegs, [(110, 150)] * 6, (96, 48), RandomResizedCrop().parameters(), views)
    for big, little in zip(large, small, strict=True):
        assert difference(little, np.asarray(Image.fromarray(big).resize((48, 48), Image.Resampling.BILINEAR))) < 4


@pytest.mark.parametrize(
    ("fraction", "height", "width"), [(1, 127, 400), (2, 128, 400), (2, 255, 256), (4, 256, 256), (8, 512, 513)]
)
def test_dct_scale_leaves_enough_pixels_for_the_largest_side(fraction, height, width):
    assert kernels.dct_fraction(height, width, 64) == fraction


@pytest.mark.parametrize("fraction", [2, 4, 8])
def test_decoding_at_a_fraction_shows_the_same_picture(fraction):
    image = photograph(64 * fraction + 5, 64 * fraction + 3, seed=4)
    jpeg = jpeg_bytes(image, quality=95)
    shape = (image.height, image.width)
    ((out,),), _ = decoded([jpeg], [shape], (64,))
    side = min(shape)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    full = Image.open(io.BytesIO(jpeg)).convert("RGB")
    expected = full.resize((64, 64), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    shifted = full.resize((64, 64), Image.Resampling.BILINEAR, box=(left + 2, top + 2, left + side, top + side))
    assert difference(out, np.asarray(expected)) < 5
    assert difference(out, np.asarray(expected)) < 0.6 * difference(out, np.asarray(shifted))


def test_decoding_at_full_size_is_pillows_within_a_grey_level():
    jpegs = [jpeg_bytes(photograph(160, 120, seed)) for seed in range(4)]
    views = pack_views(np.arange(4), seed=1, epoch=2)
    crop = RandomResizedCrop(scale=(0.3, 0.9))
    (images,), _ = decoded(jpegs, [(120, 160)] * 4, (96,), crop.parameters(), views)
    for jpeg, out, (top, left, height, width, mirrored) in zip(
        jpegs, images, boxes(views, 120, 160, crop), strict=True
    ):
        box = (left, top, left + width, top + height)
        expected = Image.open(io.BytesIO(jpeg)).convert("RGB").resize((96, 96), Image.Resampling.BILINEAR, box=box)
        expected = ImageOps.mirror(expected) if mirrored else expected
        assert difference(out, np.asarray(expected)) <= 1.0


def test_greyscale_jpeg_comes_out_as_rgb():
    jpeg = jpeg_bytes(photograph(80, 60, seed=5).convert("L"))
    ((out,),), status = decoded([jpeg], [(60, 80)], (32,))
    assert status.tolist() == [kernels.DECODED]
    assert (out == out[..., :1]).all()
    assert out.std() > 5


def test_each_sample_has_its_own_status():
    good = jpeg_bytes(photograph(80, 60, seed=6))
    damaged = good[: len(good) // 2] + bytes(len(good) - len(good) // 2)
    images, status = decoded(
        [good, b"not a JPEG", damaged, good[: len(good) // 2], good, good], [(60, 80)] * 5 + [(80, 60)], (32,)
    )
    assert status.tolist() == [
        kernels.DECODED,
        kernels.NOT_A_JPEG,
        kernels.DAMAGED,
        kernels.DAMAGED,
        kernels.DECODED,
        kernels.OTHER_SIZE,
    ]
    assert np.array_equal(images[0][0], images[0][4])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 64), (9, 11)])
def test_random_crop_is_torchvisions_in_distribution(height, width):
    crop = RandomResizedCrop(scale=(0.2, 0.8), ratio=(0.5, 1.5))
    ours = boxes(pack_views(np.arange(4000), seed=5, epoch=1), height, width, crop)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    peers = np.array([PeerCrop.get_params(image, list(crop.scale), list(crop.ratio)) for _ in range(4000)], np.float64)
    assert (ours[:, 0] + ours[:, 2]).max() <= height
    assert (ours[:, 1] + ours[:, 3]).max() <= width
    assert ours.min() >= 0
    for column in range(4):
        spread = peers[:, column].std() / np.sqrt(4000)
        assert abs(ours[:, column].mean() - peers[:, column].mean()) < 5 * spread
        deciles = np.abs(np.quantile(ours[:, column], [0.1, 0.9]) - np.quantile(peers[:, column], [0.1, 0.9]))
        assert deciles.max() < 1 + 0.06 * peers[:, column].max()


def test_random_crop_stays_within_its_ranges():
    tops, lefts, heights, widths, mirrored = boxes(
        pack_views(np.arange(2000), seed=9, epoch=0), 1000, 1000, RandomResizedCrop(scale=(0.1, 0.5), ratio=(0.8, 1.25))
    ).T
    areas, ratios = heights * widths / 1e6, widths / heights
    assert areas.min() >= 0.0995
    assert areas.max() <= 0.5005
    assert ratios.min() >= 0.797
    assert ratios.max() <= 1.255
    assert abs(np.log(ratios).mean()) < 0.02
    assert tops.min() >= 0
    assert lefts.min() >= 0
    assert abs(mirrored.mean() - 0.5) < 0.05


def test_random_crop_falls_back_to_the_centre():
    wide = boxes(pack_views(np.arange(3), 0, 0), 10, 1000, RandomResizedCrop(scale=(1.0, 1.0)))
    tall = boxes(pack_views(np.arange(3), 0, 0), 1000, 10, RandomResizedCrop(scale=(1.0, 1.0)))
    assert wide[:, :4].tolist() == [[0, 493, 10, 13]] * 3
    assert tall[:, :4].tolist() == [[493, 0, 13, 10]] * 3


def test_flip_can_be_left_out():
    assert not boxes(pack_views(np.arange(50), 0, 0), 50, 50, RandomResizedCrop(flip=False))[:, 4].any()


def test_centre_crop_is_a_central_square_of_the_shorter_side():
    view = pack_views(np.arange(1), 0, 0)[0]
    assert kernels.crop_box(view, 256, 301, CenterCrop(0.875).parameters()) == (16.0, 38.5, 224.0, 224.0, False)


def test_draws_are_the_same_on_every_machine_and_version():
    view = pack_views(np.arange(1), seed=7, epoch=3)[0]
    assert [float(kernels.uniform(view, draw)).hex() for draw in range(3)] == [
        "0x1.77fb23a3deb58p-4",
        "0x1.fba04b555beb8p-4",
        "0x1.e7be24e57ecefp-1",
    ]
    assert kernels.crop_box(view, 375, 500, RandomResizedCrop().parameters()) == (171.0, 41.0, 196.0, 158.0, True)


def test_draws_of_neighbouring_samples_and_epochs_are_unrelated():
    samples = pack_views(np.arange(2000), 0, 0)
    epochs = np.concatenate([pack_views(np.arange(1), 0, epoch) for epoch in range(2000)])
    for views in (samples, epochs):
        draws = np.array([[kernels.uniform(view, draw) for draw in range(4)] for view in views])
        assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.03
        related = np.corrcoef(np.concatenate([draws[:-1], draws[1:]], axis=1).T) - np.eye(8)
        assert np.abs(related).max() < 0.1
