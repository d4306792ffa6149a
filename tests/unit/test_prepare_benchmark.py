"""Both sides of bench prepare can be measured repeatedly and leave no files."""

from __future__ import annotations

import math

import pytest

from benchmarks.harness import Side
from benchmarks.prepare import elongation
from tests.unit.pictures import jpeg, write_class_folders


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp("images"), {"a": 7, "b": 6})


@pytest.mark.parametrize("max_side", [None, 24])
@pytest.mark.parametrize("name", ["ours", "ffcv"])
def test_a_side_prepares_all_images(name, max_side, images, tmp_path):
    arguments = {"images": str(images), "scratch": str(tmp_path), "max_side": max_side, "threads": 2}
    with Side(f"benchmarks.prepare:{name}", arguments, 2) as side:
        assert 0 < side.measure() < math.inf
        assert list(tmp_path.iterdir()) == []


def test_elongation_is_the_median(images, tmp_path):
    assert elongation(images) == 64 / 48
    for number, (width, height) in enumerate([(40, 20), (20, 40), (90, 30)]):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{number}.jpg").write_bytes(jpeg(width, height))
    assert elongation(tmp_path) == 2
