from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from concurrent.futures import wait
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from PIL import Image

from datasets.beton import METADATA, METADATA_START, BetonError, checksum, read_jpeg, read_layout
from datasets.loading.loader import CenterCrop, DecodeError, MultiResolutionLoader, RandomResizedCrop
from tests.betons import photograph, write_images

NUM_SAMPLES = 29
SIDES = (48, 32)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Images of many sizes, some decoded at a fraction, one of them gray."""
    made = [photograph(50 + 7 * index, 150 - 3 * index, seed=index) for index in range(NUM_SAMPLES)]
    return [*made[:4], made[4].convert("L"), *made[5:]]


@pytest.fixture(scope="module")
def beton(images, tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "train.beton", images)


@pytest.fixture
def damaged(beton, tmp_path):
    """Return a function that copies the beton and changes the bytes of some JPEGs."""

    def damage(change, samples=(11,), known: bool = True) -> Path:
        """With `known`, the checksums match the changed bytes, as if the beton had been written with them."""
        copy, layout = tmp_path / "damaged.beton", read_layout(beton)
        data = bytearray(beton.read_bytes())
        for index in samples:
            first, size = int(layout.allocations["ptr"][index]), int(layout.allocations["size"][index])
            data[first : first + size] = change(data[first : first + size])
            place = METADATA_START + index * METADATA.itemsize + METADATA.fields["checksum"][1]
            if known:
                data[place : place + 8] = checksum(bytes(data[first : first + size])).to_bytes(8, "little", signed=True)
        copy.write_bytes(data)
        return copy

    return damage


def load(beton: Path, **changes) -> MultiResolutionLoader:
    settings = {"sides": SIDES, "batch_size": 8, "crop": RandomResizedCrop(), "shuffle": True, "seed": 1}
    return MultiResolutionLoader(beton, **{**settings, **changes})


def digests(loader: MultiResolutionLoader, epoch: int, **arguments) -> dict[int, str]:
    """Return sample index -> hash of its pixels at every side, in the order of the epoch."""
    return digests_of(loader.epoch(epoch, **arguments))


def digests_of(batches) -> dict[int, str]:
    found = {}
    for batch in batches:
        for row, index in enumerate(batch.indices.tolist()):
            found[index] = digest_of(batch, row)
    return found


def digest_of(batch, row: int) -> str:
    return hashlib.sha256(b"".join(images[row].numpy().tobytes() for images in batch.images.values())).hexdigest()


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def assert_threads_end() -> None:
    """Wait for threads that are stopping: each finishes its current images."""
    for thread in loader_threads():
        thread.join(timeout=20)
    assert not loader_threads()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_threads": 2},
        {"num_threads": 5, "batches_ahead": 1},
        {"batch_size": 3},
        {"batch_size": 100, "num_threads": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_pixels_depend_on_seed_epoch_and_index_alone(beton, changes, world_size):
    expected = digests(load(beton), epoch=3)
    found = [digests(load(beton, rank=rank, world_size=world_size, **changes), epoch=3) for rank in range(world_size)]
    assert sum(len(part) for part in found) == NUM_SAMPLES
    assert {index: digest for part in found for index, digest in part.items()} == expected


def test_other_epochs_and_seeds_show_other_pixels(beton):
    runs = [digests(load(beton), 0), digests(load(beton), 1), digests(load(beton, seed=2), 0)]
    different = len({digest for run in runs for digest in run.values()})
    assert different > 3 * NUM_SAMPLES - 5  # the narrowest images have one fallback crop and its mirror image


def test_a_resumed_epoch_has_the_same_remaining_batches(beton):
    loader = load(beton)
    whole = [(batch.indices.tolist(), digest(batch)) for batch in loader.epoch(2)]
    resumed = [(batch.indices.tolist(), digest(batch)) for batch in loader.epoch(2, start_step=2)]
    assert resumed == whole[2:]
    assert list(loader.epoch(2, start_step=loader.num_batches)) == []


def digest(batch) -> str:
    return hashlib.sha256(b"".join(images.numpy().tobytes() for images in batch.images.values())).hexdigest()


def test_batches_have_shapes_labels_and_indices(beton):
    loader = load(beton, shuffle=False, crop=CenterCrop())
    batches = [(batch.indices.tolist(), batch.labels.tolist()) for batch in loader.epoch(0)]
    assert [index for indices, _ in batches for index in indices] == list(range(NUM_SAMPLES))
    assert [label for _, labels in batches for label in labels] == [index % 7 for index in range(NUM_SAMPLES)]
    assert loader.num_batches == len(batches) == 4
    assert [loader.global_size(step) for step in range(4)] == [len(indices) for indices, _ in batches] == [8, 7, 7, 7]
    batch = next(loader.epoch(0))
    assert list(batch.images) == [48, 32]
    for side, pixels in batch.images.items():
        assert (pixels.shape, pixels.dtype) == ((8, side, side, 3), torch.uint8)
        assert pixels.is_contiguous()
    assert batch.labels.dtype == batch.indices.dtype == torch.int64


def test_validation_shows_the_center_as_pillow_resizes_it(images, beton, tmp_path):
    for batch in load(beton, sides=[80], shuffle=False, crop=CenterCrop(0.875)).epoch(0):
        for index, pixels in zip(batch.indices.tolist(), batch.images[80], strict=True):
            (tmp_path / "image.jpg").write_bytes(read_jpeg(beton, index))
            image = Image.open(tmp_path / "image.jpg").convert("RGB")
            side = 0.875 * min(image.size)
            left, top = (image.width - side) / 2, (image.height - side) / 2
            expected = image.resize((80, 80), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
            assert np.abs(pixels.numpy().astype(int) - np.asarray(expected)).mean() <= 1.0


def test_ranks_without_a_sample_get_empty_batches(beton):
    loader = load(beton, batch_size=2, rank=4, world_size=5)
    batches = list(loader.epoch(0))
    assert len(batches) == loader.num_batches == 15
    assert {(batch.images[32].shape, batch.labels.shape) for batch in batches} == {((0, 32, 32, 3), (0,))}


def test_labels_and_indices_outlive_their_batch(beton):
    batches = list(load(beton, batches_ahead=1).epoch(0))
    assert sorted(index for batch in batches for index in batch.indices.tolist()) == list(range(NUM_SAMPLES))
    assert all((batch.labels == batch.indices % 7).all() for batch in batches)


@pytest.mark.parametrize("batches_ahead", [1, 2])
def test_a_batch_is_valid_until_the_next_one_is_requested(beton, batches_ahead):
    loader = load(beton, batch_size=4, batches_ahead=batches_ahead)
    expected = [digest(batch) for batch in loader.epoch(0)]
    epoch = loader.epoch(0)
    for step, batch in enumerate(epoch):
        wait(
            [part for job in epoch._jobs for part in job.parts]
        )  # all that is decoded before the next batch is requested
        assert digest(batch) == expected[step]


def test_two_concurrent_passes_are_independent(beton):
    loader = load(beton, num_threads=2)
    expected = [digest(batch) for batch in loader.epoch(0)], [digest(batch) for batch in loader.epoch(1)]
    pairs = [(digest(one), digest(other)) for one, other in zip(loader.epoch(0), loader.epoch(1), strict=True)]
    assert pairs == list(zip(*expected, strict=True))


DAMAGE = {
    "cut short": lambda jpeg: jpeg[: len(jpeg) // 2] + bytes(len(jpeg) - len(jpeg) // 2),
    "zeros": lambda jpeg: bytes(len(jpeg)),
    "text": lambda jpeg: (b"no image " * len(jpeg))[: len(jpeg)],
    "other size in pixels": lambda jpeg: jpeg.replace((117).to_bytes(2), (119).to_bytes(2), 1),
    "a damaged table": lambda jpeg: jpeg.replace(b"\xff\xc4", b"\xff\xc0", 1),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_jpeg_is_an_error_that_names_it(damaged, change):
    path = damaged(change)
    offset = int(read_layout(path).allocations["ptr"][11])
    loader = load(path, shuffle=False, num_threads=2)
    epoch = loader.epoch(0)
    assert next(epoch).indices.tolist() == list(range(8))
    with pytest.raises(DecodeError, match=rf"1 sample is damaged; .*\n  sample 11, .* at offset {offset:,}: ") as error:
        next(epoch)
    assert str(path) in str(error.value)
    assert list(epoch) == []
    assert_threads_end()


def flipped_bit(jpeg: bytearray) -> bytearray:
    """Flip one bit in the middle of the coefficients, which libjpeg-turbo does not notice here."""
    jpeg[len(jpeg) * 2 // 3] ^= 8
    return jpeg


def test_one_flipped_bit_is_an_error_even_if_the_jpeg_decodes(damaged):
    unnoticed = load(damaged(flipped_bit), shuffle=False)
    assert len(list(unnoticed.epoch(0))) == 4
    with pytest.raises(DecodeError, match=r"sample 11, .*: its bytes do not match their checksum"):
        list(load(damaged(flipped_bit, known=False), shuffle=False).epoch(0))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_damaged_samples_are_replaced_up_to_a_limit(beton, damaged, num_threads, caplog):
    path = damaged(DAMAGE["cut short"], samples=(11, 12, NUM_SAMPLES - 1))
    shown = []
    with load(path, shuffle=False, max_damaged=3, num_threads=num_threads).epoch(2) as epoch:
        for batch in epoch:
            pixels = [digest_of(batch, row) for row in range(len(batch.labels))]
            shown += zip(batch.indices.tolist(), batch.labels.tolist(), pixels, strict=True)
    assert caplog.text.count("a damaged sample is replaced by another: sample") == 3
    replaced = {11: 13, 12: 13, NUM_SAMPLES - 1: 0}
    expected = digests(load(beton, shuffle=False), 2)
    indices = [replaced.get(index, index) for index in range(NUM_SAMPLES)]
    assert shown == [(index, index % 7, expected[index]) for index in indices]
    with pytest.raises(DecodeError, match=r"3 samples are damaged, but loader\.max_damaged is 2"):
        list(load(path, shuffle=False, max_damaged=2, num_threads=num_threads).epoch(2))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_beton_without_an_undamaged_sample_is_an_error(damaged, num_threads):
    loader = load(damaged(DAMAGE["cut short"], range(NUM_SAMPLES)), max_damaged=NUM_SAMPLES, num_threads=num_threads)
    with pytest.raises(DecodeError, match=rf"{NUM_SAMPLES} samples are damaged; restore the file"):
        list(loader.epoch(0))
    assert_threads_end()


def test_a_damaged_sample_requested_by_index_is_an_error(damaged):
    loader = load(damaged(DAMAGE["cut short"], samples=(11,)), shuffle=False, max_damaged=3)
    [batch] = loader.read(0, [np.array([12, 10])])
    assert batch.indices.tolist() == [12, 10]
    with pytest.raises(DecodeError, match="sample 11"):
        list(loader.read(0, [np.array([10, 11])]))


def test_batches_before_start_step_are_not_read(damaged):
    path = damaged(DAMAGE["zeros"])
    batches = list(load(path, shuffle=False).epoch(0, start_step=2))
    assert [len(batch.labels) for batch in batches] == [7, 7]


def test_leaving_the_loop_stops_the_threads(beton):
    loader = load(beton, num_threads=3, batch_size=4)
    for _ in range(3):
        for _batch in loader.epoch(0):
            break
        assert_threads_end()
    with pytest.raises(ZeroDivisionError):
        _fail_in_the_loop(loader)
    assert_threads_end()


def _fail_in_the_loop(loader: MultiResolutionLoader) -> None:
    for _batch in loader.epoch(0):
        raise ZeroDivisionError


def test_threads_stop_when_a_pass_is_closed_or_ends(beton):
    loader = load(beton, num_threads=3, batch_size=4)
    with loader.epoch(0) as epoch:
        next(epoch)
    assert not loader_threads()
    assert len(list(loader.epoch(1))) == 8
    assert not loader_threads()
    left_open = loader.epoch(2)
    next(left_open)
    loader.close()
    assert not loader_threads()
    assert list(left_open) == []


def test_thread_counts_of_torch_and_numba_do_not_change(beton):
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(3)
    numba.set_num_threads(2)
    try:
        digests(load(beton, num_threads=2), 0)
        assert (torch.get_num_threads(), numba.get_num_threads()) == (3, 2)
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


FRESH_PROCESS = """
import sys, torch
torch.set_num_threads(3)
from datasets.loading.kernels import decode_boxes
from datasets.loading.loader import CenterCrop, MultiResolutionLoader
assert torch.get_num_threads() == 3, torch.get_num_threads()
assert "ffcv" not in sys.modules
loader = MultiResolutionLoader(sys.argv[1], (48, 32), 8, crop=CenterCrop(), shuffle=False)
epoch = loader.epoch(0)
next(epoch)
assert not decode_boxes.stats.cache_misses, decode_boxes.stats
assert sum(decode_boxes.stats.cache_hits.values()) == 1, decode_boxes.stats
"""


def test_a_new_process_compiles_nothing_and_exits_during_a_pass(beton):
    digests(load(beton, crop=CenterCrop()), 0)
    command = [sys.executable, "-c", FRESH_PROCESS, str(beton)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_all_wrong_arguments_are_reported_together(beton):
    crop = RandomResizedCrop(scale=(0.5, 2.0), ratio=(2.0, 1.0))
    with pytest.raises(ValueError, match="cannot be built") as error:
        load(beton, sides=(32, 32), batch_size=0, num_threads=0, batches_ahead=0, rank=2, world_size=2, crop=crop)
    for name in ("sides", "batch_size", "num_threads", "batches_ahead", "rank", "scale", "ratio"):
        assert name in str(error.value)


@pytest.mark.parametrize("sides", [(), (0,), (-4, 8)])
def test_sides_must_be_positive(beton, sides):
    with pytest.raises(ValueError, match="sides"):
        load(beton, sides=sides)


def test_the_center_fraction_must_be_at_most_one(beton):
    with pytest.raises(ValueError, match=r"fraction is 1\.5"):
        load(beton, crop=CenterCrop(1.5))


@pytest.mark.parametrize(
    ("epoch", "start_step", "crop_epoch"), [(-1, 0, None), (0, -1, None), (0, 5, None), (0, 0, -1), (-1, 0, 0)]
)
def test_epoch_and_step_must_be_in_range(beton, epoch, start_step, crop_epoch):
    with pytest.raises(ValueError, match="start_step"):
        load(beton).epoch(epoch, start_step, crop_epoch=crop_epoch)


def test_an_epoch_can_show_the_crops_of_another(beton):
    loader = load(beton)
    found = digests(loader, 3, crop_epoch=1)
    assert found == digests(loader, 1)
    assert list(found) == list(digests(loader, 3)) != list(digests(loader, 1))


def test_given_samples_are_read_as_an_epoch_shows_them(beton):
    whole = digests(load(beton), 2)
    given = [np.array([7, 3, 28]), np.array([0]), np.array([], int)]
    batches = load(beton, rank=1, world_size=2, num_threads=2).read(2, given)
    found = digests_of(batches)
    assert list(found) == [7, 3, 28, 0]
    assert found == {index: whole[index] for index in found}
    assert [len(batch.indices) for batch in load(beton).read(2, given)] == [3, 1, 0]


@pytest.mark.parametrize(("crop_epoch", "index"), [(-1, 0), (0, NUM_SAMPLES), (0, -1)])
def test_given_samples_and_crop_epoch_must_be_in_range(beton, crop_epoch, index):
    with pytest.raises(ValueError, match=f"crop_epoch {crop_epoch} or samples .* 0 to {NUM_SAMPLES - 1}"):
        load(beton).read(crop_epoch, [np.array([0, index])])


def test_unwanted_sides_cost_nothing_and_change_nothing(beton):
    loader, small = load(beton), load(beton, sides=[32])
    epoch = loader.epoch(0, sides=[32])
    assert all(list(job.slot.memory.images) == [32] for job in epoch._jobs)
    pairs = list(zip(loader.epoch(0), epoch, small.epoch(0), strict=True))
    assert all(list(some.images) == [32] for _, some, _ in pairs)
    assert all(torch.equal(whole.images[32], some.images[32]) for whole, some, _ in pairs)
    assert not all(torch.equal(some.images[32], alone.images[32]) for _, some, alone in pairs), "decoded as finely"


@pytest.mark.parametrize("sides", [[], [48, 40]])
def test_wanted_sides_must_be_the_loaders(beton, sides):
    with pytest.raises(ValueError, match=r"give one or more of \[48, 32\]"):
        load(beton).epoch(0, sides=sides)


def test_an_invalid_beton_is_an_error(tmp_path):
    with pytest.raises(BetonError, match="does not exist"):
        load(tmp_path / "none.beton")
    (tmp_path / "text.beton").write_text("no beton")
    with pytest.raises(BetonError, match="not a beton"):
        load(tmp_path / "text.beton")
