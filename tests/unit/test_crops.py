from __future__ import annotations

import ctypes
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop as PeerCrop

from datasets.loading import kernels
from datasets.loading.kernels import LIBRARY, crop_box, crop_boxes, uniform
from datasets.loading.loader import CenterCrop, Memory, RandomResizedCrop
from datasets.loading.order import pack_keys
from tests.betons import jpeg_bytes, photograph
from tests.unit.test_sources import PERMISSIONS_HOLD

WHOLE = CenterCrop(1.0).parameters()


def resized(
    image: Image.Image, box: tuple[float, float, float, float], side: int, mirrored: bool = False
) -> np.ndarray:
    """Resize a box (left, top, right, bottom) with the kernel, to the nearest gray levels."""
    left, top, right, bottom = box
    planes = np.moveaxis(np.asarray(image), 2, 0).copy()
    levels = np.zeros((3, side, side), np.int16)
    kernels.resize(planes, float(top), float(left), float(bottom - top), float(right - left), mirrored, levels)
    return np.moveaxis(np.round(levels / 2.0**kernels.LEVEL_BITS), 0, 2).astype(np.uint8)


def decoded(jpegs: list[bytes], shapes: list[tuple[int, int]], sides: tuple[int, ...], crop=WHOLE, keys=None):
    """Decode JPEGs that are stored one after another; return images by side, and the status."""
    sizes = np.array([len(jpeg) for jpeg in jpegs])
    memory = Memory(sides, sides, len(jpegs))
    memory.status_N[:] = kernels.DECODED
    storage = np.frombuffer(b"".join(jpegs), np.uint8)
    keys = np.arange(len(jpegs), dtype=np.uint64) if keys is None else keys
    offsets, shapes_N2 = np.cumsum(sizes) - sizes, np.array(shapes)
    boxes_N5 = crop_boxes(keys, shapes_N2, crop)
    blocks = memory.pixels, memory.starts_R, memory.status_N
    kernels.decode_boxes(storage, offsets, sizes, shapes_N2, boxes_N5, np.array(sides), *blocks)
    return tuple(memory.images.values()), memory.status_N


def boxes(keys: np.ndarray, height: int, width: int, crop: RandomResizedCrop) -> np.ndarray:
    """Return (top, left, height, width, mirrored) of every key, float64 (N, 5)."""
    return crop_boxes(keys, np.array([[height, width]] * len(keys)), crop.parameters())


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
    keys = pack_keys(np.arange(6), seed=0, epoch=0)
    jpegs = [jpeg_bytes(photograph(150, 110, seed)) for seed in range(6)]
    (large, small), _ = decoded(jpegs, [(110, 150)] * 6, (96, 48), RandomResizedCrop().parameters(), keys)
    for big, little in zip(large, small, strict=True):
        assert difference(little, np.asarray(Image.fromarray(big).resize((48, 48), Image.Resampling.BILINEAR))) < 4


@pytest.mark.parametrize(
    ("fraction", "height", "width"), [(1, 127, 400), (2, 128, 400), (2, 255, 256), (4, 256, 256), (8, 512, 513)]
)
def test_dct_fraction_leaves_enough_pixels_for_the_largest_side(fraction, height, width):
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
    assert difference(out, np.asarray(expected)) < 7  # of chroma, a fraction leaves half as many pixels
    gray = np.asarray(Image.fromarray(out).convert("L"))
    assert difference(gray, np.asarray(expected.convert("L"))) < 0.6 * difference(
        gray, np.asarray(shifted.convert("L"))
    )


def test_full_size_decoding_is_within_a_gray_level_of_pillows():
    jpegs = [jpeg_bytes(photograph(160, 120, seed)) for seed in range(4)]
    keys = pack_keys(np.arange(4), seed=1, epoch=2)
    crop = RandomResizedCrop(scale=(0.3, 0.9))
    (images,), _ = decoded(jpegs, [(120, 160)] * 4, (96,), crop.parameters(), keys)
    for jpeg, out, (top, left, height, width, mirrored) in zip(jpegs, images, boxes(keys, 120, 160, crop), strict=True):
        box = (left, top, left + width, top + height)
        expected = Image.open(io.BytesIO(jpeg)).convert("RGB").resize((96, 96), Image.Resampling.BILINEAR, box=box)
        expected = ImageOps.mirror(expected) if mirrored else expected
        assert difference(out, np.asarray(expected)) <= 1.0


def test_a_grayscale_jpeg_is_decoded_to_rgb():
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


def save(image: Image.Image, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **settings)
    return buffer.getvalue()


QUARTER_WIDTH = 5


def subsampled(image: Image.Image, subsampling: int) -> bytes:
    """Encode a JPEG with any of libjpeg-turbo's subsamplings (TJSAMP); Pillow writes only some of them."""
    LIBRARY.tjInitCompress.restype = ctypes.c_void_p
    compressor = ctypes.c_void_p(LIBRARY.tjInitCompress())
    jpeg, size = ctypes.POINTER(ctypes.c_ubyte)(), ctypes.c_ulong()
    pixels = np.ascontiguousarray(np.asarray(image))
    target = ctypes.byref(jpeg), ctypes.byref(size)
    failed = LIBRARY.tjCompress2(
        compressor, ctypes.c_void_p(pixels.ctypes.data), image.width, 0, image.height, 0, *target, subsampling, 90, 0
    )
    assert not failed
    content = ctypes.string_at(jpeg, size.value)
    LIBRARY.tjFree(jpeg)
    LIBRARY.tjDestroy(compressor)
    return content


@pytest.mark.parametrize("size", [(160, 120), (161, 119)])
@pytest.mark.parametrize(
    "settings",
    [
        *range(6),
        {"keep_rgb": True},
        {"progressive": True},
        {"restart_marker_rows": 1},
    ],
    ids=str,
)
def test_every_kind_of_jpeg_is_within_a_gray_level_of_pillows(settings, size):
    width, height = size
    image = photograph(width, height, seed=7)
    jpeg = save(image, **settings) if isinstance(settings, dict) else subsampled(image, settings)
    keys = pack_keys(np.arange(5), seed=1, epoch=2)
    crop = RandomResizedCrop(scale=(0.3, 0.9))
    (images,), status = decoded([jpeg] * 5, [(height, width)] * 5, (96,), crop.parameters(), keys)
    assert status.tolist() == [kernels.DECODED] * 5
    whole = Image.open(io.BytesIO(jpeg)).convert("RGB")
    for out, (top, left, box_height, box_width, mirrored) in zip(images, boxes(keys, height, width, crop), strict=True):
        box = (left, top, left + box_width, top + box_height)
        expected = whole.resize((96, 96), Image.Resampling.BILINEAR, box=box)
        expected = ImageOps.mirror(expected) if mirrored else expected
        # Pillow repeats each pixel of chroma that is stored at a quarter of the width; here it is interpolated.
        assert difference(out, np.asarray(expected)) <= (2.0 if settings == QUARTER_WIDTH else 1.0)


def above_the_middle(height: int) -> tuple[np.ndarray, tuple]:
    """Return keys whose crops end well above the lower quarter of an image, and their crop."""
    crop = RandomResizedCrop(scale=(0.1, 0.3)).parameters()
    keys = pack_keys(np.arange(200), seed=3, epoch=0)
    found = crop_boxes(keys, np.array([[height, height]] * 200), crop)
    return keys[found[:, 0] + found[:, 2] < 0.6 * height][:8], crop


def test_rows_below_the_crop_are_skipped_without_changing_pixels():
    image = photograph(320, 320, seed=8)
    # With restart markers every row is decoded: the same coefficients, and so the same pixels.
    left_out, complete = save(image), save(image, restart_marker_rows=1)
    keys, crop = above_the_middle(320)
    outs = []
    for jpeg in (left_out, complete):
        images, status = decoded([jpeg] * 8, [(320, 320)] * 8, (96, 33), crop, keys)
        assert status.tolist() == [kernels.DECODED] * 8
        outs.append(images)
    assert all(np.array_equal(one, other) for one, other in zip(*outs, strict=True))


def test_damage_in_visible_rows_is_detected():
    good = save(photograph(320, 320, seed=9))
    keys, crop = above_the_middle(320)
    early, late = bytearray(good), bytearray(good)
    for jpeg, place in ((early, 0.25), (late, 0.9)):
        start = int(len(good) * place)
        jpeg[start : start + 4] = b"\xff\xd9\xff\xd9"  # the end of the image, too soon
    _, status = decoded([bytes(early)] * 8, [(320, 320)] * 8, (96,), crop, keys)
    assert status.tolist() == [kernels.DAMAGED] * 8
    (images,), status = decoded([good] * 8 + [bytes(late)] * 8, [(320, 320)] * 16, (96,), crop, np.tile(keys, 2))
    assert status.tolist() == [kernels.DECODED] * 16
    assert np.array_equal(images[:8], images[8:])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 64), (9, 11)])
def test_random_crop_is_torchvisions_in_distribution(height, width):
    crop = RandomResizedCrop(scale=(0.2, 0.8), ratio=(0.5, 1.5))
    ours = boxes(pack_keys(np.arange(4000), seed=5, epoch=1), height, width, crop)
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
        pack_keys(np.arange(2000), seed=9, epoch=0), 1000, 1000, RandomResizedCrop(scale=(0.1, 0.5), ratio=(0.8, 1.25))
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


def test_random_crop_falls_back_to_the_center():
    wide = boxes(pack_keys(np.arange(3), 0, 0), 10, 1000, RandomResizedCrop(scale=(1.0, 1.0)))
    tall = boxes(pack_keys(np.arange(3), 0, 0), 1000, 10, RandomResizedCrop(scale=(1.0, 1.0)))
    assert wide[:, :4].tolist() == [[0, 493, 10, 13]] * 3
    assert tall[:, :4].tolist() == [[493, 0, 13, 10]] * 3


def test_flipping_can_be_switched_off():
    assert not boxes(pack_keys(np.arange(50), 0, 0), 50, 50, RandomResizedCrop(flip=False))[:, 4].any()


def test_center_crop_is_a_central_square_of_the_shorter_side():
    key = pack_keys(np.arange(1), 0, 0)[0]
    assert crop_box(key, 256, 301, CenterCrop(0.875).parameters()) == (16.0, 38.5, 224.0, 224.0, False)


def test_draws_are_the_same_on_every_machine_and_version():
    key = pack_keys(np.arange(1), seed=7, epoch=3)[0]
    assert [float(uniform(key, draw)).hex() for draw in range(3)] == [
        "0x1.77fb23a3deb58p-4",
        "0x1.fba04b555beb8p-4",
        "0x1.e7be24e57ecefp-1",
    ]
    assert crop_box(key, 375, 500, RandomResizedCrop().parameters()) == (171.0, 41.0, 196.0, 158.0, True)


def test_draws_of_neighboring_samples_and_epochs_are_unrelated():
    samples = pack_keys(np.arange(2000), 0, 0)
    epochs = np.concatenate([pack_keys(np.arange(1), 0, epoch) for epoch in range(2000)])
    for keys in (samples, epochs):
        draws = np.array([[uniform(key, draw) for draw in range(4)] for key in keys])
        assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.03
        related = np.corrcoef(np.concatenate([draws[:-1], draws[1:]], axis=1).T) - np.eye(8)
        assert np.abs(related).max() < 0.1


IMPORT_KERNELS = """
import os
from datasets.loading import kernels
import numpy as np
assert kernels.crop_boxes(np.zeros(1, np.uint64), np.full((1, 2), 8), (0.0,) * 5 + (1.0,)).tolist() == [[0, 0, 8, 8, 0]]
print(os.environ["NUMBA_CACHE_DIR"])
"""


def test_compiled_code_is_kept_in_a_temporary_folder_if_nothing_else_can_be_written(tmp_path):
    project, home, temporary = tmp_path / "project", tmp_path / "home", tmp_path / "tmp"
    shutil.copytree(Path(kernels.__file__).parents[1], project / "datasets", ignore=shutil.ignore_patterns("*.pyc"))
    for folder in (project / "datasets" / "loading" / "__pycache__", home, temporary):
        folder.mkdir(exist_ok=True)
    for folder in (project, home, *(path for path in project.rglob("*") if path.is_dir())):
        folder.chmod(0o555)
    command = [*PERMISSIONS_HOLD, sys.executable, "-c", IMPORT_KERNELS]
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    environment = {**kept, "HOME": str(home), "TMPDIR": str(temporary)}
    for _ in range(2):
        child = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=True)
        assert child.stderr == ""
        assert child.stdout.strip() == str(temporary / f"numba-cache-{os.getuid()}")
    assert [path.suffix for path in temporary.rglob("*crop_boxes*.nbc")] == [".nbc"]
    (temporary / f"numba-cache-{os.getuid()}").chmod(0o777)  # another user could have put code there
    child = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.strip() != str(temporary / f"numba-cache-{os.getuid()}")
