"""Crops decoded once equal the loader's, bit for bit, in any order."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets.beton import TRAIN, beton_path
from datasets.loading.decoded import DecodedCrops, Ordered, decoded_bytes
from datasets.loading.loader import MultiResolutionLoader
from tests.table_runs import NUM_TRAIN, config_of, loader_of, write_data

SIDES = (24, 32)


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> MultiResolutionLoader:
    return loader_of(config_of(write_data(tmp_path_factory.mktemp("data"))), TRAIN)


def decoded_of(folder: Path, loader: MultiResolutionLoader, **about: Any) -> DecodedCrops:
    return DecodedCrops(folder, loader.beton, about, crop_epochs=(0, 3), sides=SIDES)


def test_decoded_crops_equal_the_loaders(tmp_path: Path, loader: MultiResolutionLoader):
    decoded = decoded_of(tmp_path, loader)
    decoded.fill(loader)
    assert decoded.num_samples == NUM_TRAIN
    batches = [np.array([5, 2, 28]), np.array([], np.int64), np.array([2, 0])]
    for crop_epoch in (0, 3):
        for ours, theirs in zip(
            decoded.read(crop_epoch, batches), loader.read(crop_epoch, batches, sides=SIDES), strict=True
        ):
            assert torch.equal(ours.labels, theirs.labels)
            assert torch.equal(ours.indices, theirs.indices)
            for side in SIDES:
                assert torch.equal(ours.images[side], theirs.images[side])
    files = list(tmp_path.rglob("*.npy"))
    pixels = decoded_bytes(NUM_TRAIN, 2, SIDES)
    assert pixels <= sum(file.stat().st_size for file in files) <= pixels + 128 * len(files)


def test_one_side_alone_can_be_read(tmp_path: Path, loader: MultiResolutionLoader):
    decoded = decoded_of(tmp_path, loader)
    decoded.fill(loader)
    assert set(next(decoded.read(0, [np.arange(4)], sides=[24])).images) == {24}


def test_existing_crops_are_not_decoded_again(tmp_path: Path, loader: MultiResolutionLoader):
    decoded_of(tmp_path, loader).fill(loader)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    next(iter(files)).unlink()
    decoded_of(tmp_path, loader).fill(loader)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert set(after) == set(files)
    assert sum(after[path] != files[path] for path in files) == 1
    decoded_of(tmp_path, loader, seed=2).fill(loader)
    assert len(list(tmp_path.rglob("*.npy"))) == 2 * len(files), "what depends on something else is elsewhere"


def test_too_little_space_is_an_error(tmp_path: Path, loader: MultiResolutionLoader, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=decoded_bytes(NUM_TRAIN, 1, SIDES) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"has 0\.1 MB free, but an epoch of decoded crops needs 0\.\d MB; free"):
        decoded_of(tmp_path, loader).fill(loader)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_failed_decoding_leaves_no_file(tmp_path: Path, loader: MultiResolutionLoader):
    class Failing:
        num_samples = NUM_TRAIN

        def read(self, crop_epoch: int, batches: Sequence[Any], *, sides: Collection[int] | None = None) -> Any:
            yield next(loader.read(crop_epoch, batches, sides=sides))
            raise OSError("the disk is broken")

    decoded = decoded_of(tmp_path, loader)
    with pytest.raises(OSError, match="the disk is broken"):
        decoded.fill(Failing())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    decoded.fill(loader)
    assert len(list(tmp_path.rglob("*.npy"))) == 4


def test_the_loaders_seed_gives_the_loaders_order(tmp_path: Path, loader: MultiResolutionLoader):
    ordered = Ordered(loader, 8, shuffle=True, seed=0)
    assert (ordered.num_batches, ordered.num_samples) == (loader.num_batches, NUM_TRAIN)
    assert [ordered.global_size(step) for step in range(4)] == [loader.global_size(step) for step in range(4)]
    for epoch, start in ((0, 0), (2, 1)):
        pairs = zip(ordered.epoch(epoch, start, crop_epoch=1), loader.epoch(epoch, start, crop_epoch=1), strict=True)
        assert all(
            torch.equal(ours.indices, theirs.indices) and torch.equal(ours.images[24], theirs.images[24])
            for ours, theirs in pairs
        )


def test_another_seed_gives_another_order_of_the_same_crops(loader: MultiResolutionLoader):
    def shown(seed: int) -> dict[int, bytes]:
        epoch = Ordered(loader, 8, shuffle=True, seed=seed).epoch(1)
        return {
            int(index): image.numpy().tobytes()
            for batch in epoch
            for index, image in zip(batch.indices, batch.images[24], strict=True)
        }

    first, second = shown(0), shown(1)
    assert first == second
    assert list(first) != list(second)


def test_a_missing_beton_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"train\.beton"):
        DecodedCrops(tmp_path, beton_path(tmp_path, TRAIN), {}, (0,), SIDES)
