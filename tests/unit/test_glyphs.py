from __future__ import annotations

import numpy as np
import pytest

from datasets.sources.glyphs import (
    LETTERS,
    GlyphSettings,
    generate,
    glyph_height,
    glyph_label,
    is_generated,
    render,
    scan_glyphs,
)
from datasets.sources.index import SourceError
from tests.unit.pictures import decoded

SMALL = GlyphSettings(num_train=40, num_validation=20, image_size=48)


def files_below(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_image_depends_on_settings_split_and_index_alone():
    image = render(SMALL, "train", 7)
    assert image.shape == (48, 48, 3)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, render(SMALL, "train", 7))
    others = [
        render(SMALL, "validation", 7),
        render(SMALL, "train", 17),
        render(GlyphSettings(image_size=48, seed=1), "train", 7),
        render(GlyphSettings(image_size=48, seed=-1), "train", 7),
    ]
    assert all((image != other).any() for other in others)
    # The number of images is no part of what one image looks like, so a larger set contains a smaller one.
    np.testing.assert_array_equal(image, render(GlyphSettings(num_train=999, image_size=48), "train", 7))


def test_heights_are_log_uniform_over_the_given_range_and_alike_in_every_class():
    settings = GlyphSettings(image_size=256)
    heights = np.array([glyph_height(settings, "train", index) for index in range(2000)])
    half_pixel = 0.5 / 256
    assert heights.min() >= settings.min_height - half_pixel
    assert heights.max() <= settings.max_height + half_pixel
    position = np.log(heights / 0.09) / np.log(0.7 / 0.09)
    assert np.quantile(position, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.04)
    by_class = [position[label::10].mean() for label in range(10)]
    assert np.ptp(by_class) < 0.15


def test_height_is_that_of_the_ink():
    measured, true = [], []
    for index in range(60):
        gray = render(GlyphSettings(), "train", index).astype(float).mean(2)
        # The letter has by far the strongest edges, so they are in its rows and in no others.
        rows = np.flatnonzero(np.abs(np.diff(gray, axis=1)).max(1) > 40)
        if len(rows) > 1:
            measured.append((np.ptp(rows) + 1) / 128)
            true.append(glyph_height(GlyphSettings(), "train", index))
    assert len(measured) > 40
    assert np.all(np.array(measured) <= np.array(true) + 1 / 128)
    assert np.median(np.array(measured) / np.array(true)) > 0.85


def test_classes_take_turns():
    assert [glyph_label(index) for index in range(12)] == [*range(10), 0, 1]


def test_generated_files_do_not_depend_on_the_number_of_processes(tmp_path):
    counted = []
    generate(tmp_path / "one", SMALL, 1, counted.append)
    generate(tmp_path / "two", SMALL, 2)
    assert sum(counted) == 60
    files = files_below(tmp_path / "one")
    assert files == files_below(tmp_path / "two")
    assert sum(name.endswith(".jpg") for name in files) == 60
    pixels = decoded(files["train/H/00006.jpg"])
    assert np.abs(pixels - render(SMALL, "train", 6)).mean() < 4


def test_generating_again_leaves_complete_images_and_replaces_others(tmp_path):
    generate(tmp_path, SMALL, 1)
    one = tmp_path / "train" / "B" / "00000.jpg"
    before = one.stat().st_mtime_ns
    generate(tmp_path, SMALL, 1)
    assert one.stat().st_mtime_ns == before
    one.unlink()
    assert not is_generated(tmp_path, SMALL)
    generate(tmp_path, SMALL, 1)
    assert one.exists()
    fewer = GlyphSettings(num_train=10, num_validation=10, image_size=48)
    generate(tmp_path, fewer, 1)
    assert len(list(tmp_path.rglob("*.jpg"))) == 20
    assert is_generated(tmp_path, fewer)


def test_files_that_were_not_generated_are_never_removed(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(SourceError, match="not generated"):
        generate(tmp_path, SMALL, 1)
    assert (tmp_path / "holiday.jpg").read_bytes() == b"precious"


def test_index_names_class_and_height_of_every_image(tmp_path):
    generate(tmp_path, SMALL, 1)
    index = scan_glyphs(tmp_path, SMALL, images_per_class=2, seed=0).read_index()
    assert index.classes == list(LETTERS)
    assert index.attribute_names == ("height",)
    assert {split: len(refs) for split, refs in index.splits.items()} == {"train": 20, "validation": 20}
    ref = next(ref for ref in index.splits["validation"] if ref.name == "validation/K/00017.jpg")
    assert ref.label == LETTERS.index("K")
    assert ref.attributes == (glyph_height(SMALL, "validation", 17),)
    assert ref.size == (tmp_path / ref.name).stat().st_size


def test_state_follows_from_the_settings_before_any_image_exists(tmp_path):
    state = scan_glyphs(tmp_path, SMALL, None, 0).state
    assert state == scan_glyphs(tmp_path / "elsewhere", SMALL, None, 0).state
    assert state != scan_glyphs(tmp_path, GlyphSettings(seed=1), None, 0).state
