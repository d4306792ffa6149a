from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from functools import partial

import numpy as np
import pytest

from datasets import turbojpeg
from datasets.beton import BetonError, beton_path, load_manifest, read_jpeg, read_layout, verify_betons
from datasets.files import LOCK, DataError
from datasets.parallel import map_ordered
from datasets.prepare import prepare as module
from datasets.prepare.build import BadImagesError
from datasets.prepare.convert import IMAGES_IN_STATISTICS, counted_chunks
from datasets.prepare.prepare import ChangedInputsError, prepare, read_records
from datasets.sources.glyphs import GlyphSettings, glyph_height
from datasets.sources.index import ImageRef, SourceError
from jobs.prepare import main
from tests.unit.pictures import decoded, jpeg, png_bomb, write_class_folders
from tests.unit.test_imagenet import CLASSES, arranged_tree, official_tars

SMALL = GlyphSettings(num_train=30, num_validation=20, image_size=48)


@pytest.fixture
def source(tmp_path):
    return write_class_folders(tmp_path / "source", {"cat": 8, "dog": 10, "eel": 6})


def prepared(folder, source, **options):
    return prepare("imagefolder", folder, source=source, **{"num_processes": 1, **options})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_betons_hold_every_image_with_its_label(tmp_path, source):
    done = prepared(tmp_path / "out", source, validation_fraction=0.25)
    manifest = done.manifest
    assert not done.unchanged
    assert done.num_images == 24
    assert manifest.versions["libjpeg_turbo"] == turbojpeg.library_version()
    assert manifest == load_manifest(tmp_path / "out") == verify_betons(tmp_path / "out", full=True)
    assert manifest.classes == ["cat", "dog", "eel"]
    assert manifest.splits["train"].class_counts == [6, 8, 4]
    assert manifest.splits["validation"].class_counts == [2, 2, 2]
    assert len({sample.read_bytes() for sample in (tmp_path / "out" / "samples").iterdir()}) == 6
    seen = set()
    for record in read_records(tmp_path / "out" / "images.jsonl"):
        path = beton_path(tmp_path / "out", record.split)
        assert record.position is not None
        assert read_jpeg(path, record.position) == (source / record.name).read_bytes()
        label = int(read_layout(path).metadata["label"][record.position])
        assert manifest.classes[label] == record.class_name == record.name.split("/")[0]
        seen.add(record.name)
    assert len(seen) == 24
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("images.jsonl", "manifest.json", "samples", "train.beton", "validation.beton")
    ]


def test_result_does_not_depend_on_the_number_of_processes(tmp_path):
    # More than one chunk per process; one image is bad, and some are encoded again.
    source = write_class_folders(tmp_path / "source", {"a": 150, "b": 150})
    (source / "a" / "bad.jpg").write_bytes(b"no image")
    for folder, processes in (("one", 1), ("three", 3)):
        prepared(tmp_path / folder, source, num_processes=processes, max_side=40, on_bad_image="skip")
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_statistics_are_those_of_the_training_pixels(tmp_path, source):
    manifest = prepared(tmp_path / "out", source).manifest
    path = beton_path(tmp_path / "out", "train")
    pixels = np.concatenate([decoded(read_jpeg(path, n)).reshape(-1, 3) for n in range(manifest.splits["train"].count)])
    assert manifest.mean == pytest.approx(pixels.mean(0) / 255, abs=1e-5)
    assert manifest.std == pytest.approx(pixels.std(0) / 255, abs=1e-5)


@pytest.mark.parametrize("count", [IMAGES_IN_STATISTICS - 1, IMAGES_IN_STATISTICS, 2 * IMAGES_IN_STATISTICS + 1])
def test_an_even_sample_of_many_images_is_counted(count):
    refs = [ImageRef(str(number), 0, "", 0, 0) for number in range(count)]
    parts = [refs[:5], refs[5:70], *(refs[start : start + 64] for start in range(70, count, 64))]
    chunks = counted_chunks(parts, count_pixels=True)
    assert [ref for chunk in chunks for ref in chunk.refs] == refs
    counted = [int(chunk.refs[position].name) for chunk in chunks for position in chunk.counted]
    assert counted == list(range(0, count, -(-count // IMAGES_IN_STATISTICS)))
    assert not any(len(chunk.counted) for chunk in counted_chunks(parts, count_pixels=False))


def test_preparing_again_reads_no_image(tmp_path, source, monkeypatch):
    first = prepared(tmp_path / "out", source)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("datasets.prepare.convert.read_images", lambda refs: pytest.fail("an image was read"))
    again = prepared(tmp_path / "out", source)
    assert again.unchanged
    assert again.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_the_same_images_in_another_folder_are_unchanged(tmp_path, source, monkeypatch):
    prepared(tmp_path / "out", source)
    betons = {name: data for name, data in contents(tmp_path / "out").items() if name != "manifest.json"}
    copy = tmp_path / "copy"
    shutil.copytree(source, copy, copy_function=shutil.copyfile)
    assert prepared(tmp_path / "out", copy).unchanged
    # The new times are stored, so the next check is quick again.
    monkeypatch.setattr("datasets.prepare.prepare.map_ordered", lambda *_: pytest.fail("contents were compared"))
    assert prepared(tmp_path / "out", copy).unchanged
    assert {name: data for name, data in contents(tmp_path / "out").items() if name != "manifest.json"} == betons


def test_changed_settings_are_named_and_force_applies_them(tmp_path, source):
    prepared(tmp_path / "out", source)
    before = contents(tmp_path / "out")
    with pytest.raises(ChangedInputsError) as caught:
        prepared(tmp_path / "out", source, max_side=32, images_per_class=2)
    assert caught.value.differences == ["data.images_per_class: None -> 2", "data.max_side: 500 -> 32"]
    assert "--force" in str(caught.value)
    assert contents(tmp_path / "out") == before
    done = prepared(tmp_path / "out", source, max_side=32, images_per_class=2, force=True)
    assert done.manifest.splits["train"].class_counts == [2, 2, 2]
    assert prepared(tmp_path / "out", source, max_side=32, images_per_class=2).unchanged


def test_changed_images_are_named(tmp_path, source):
    prepared(tmp_path / "out", source)
    (source / "cat" / "new.jpg").write_bytes(jpeg(seed=77))
    (source / "dog" / "003.jpg").unlink()
    with pytest.raises(ChangedInputsError, match=r"1 image added: cat/new\.jpg\n  1 image removed: dog/003\.jpg"):
        prepared(tmp_path / "out", source)
    (source / "cat" / "new.jpg").unlink()
    (source / "dog" / "003.jpg").write_bytes(jpeg(seed=1003))
    assert prepared(tmp_path / "out", source).unchanged


def test_a_changed_image_of_the_same_size_is_found_by_its_content(tmp_path, source):
    prepared(tmp_path / "out", source)
    one = source / "eel" / "002.jpg"
    data = bytearray(one.read_bytes())
    data[-10] ^= 1
    one.write_bytes(data)
    os.utime(one, ns=(5, 5))
    with pytest.raises(ChangedInputsError, match=r"1 image changed: eel/002\.jpg"):
        prepared(tmp_path / "out", source)


def test_bad_images_are_all_listed_and_nothing_is_written(tmp_path, source):
    (source / "cat" / "empty.jpg").write_bytes(b"")
    (source / "dog" / "text.JPEG").write_bytes(b"hello")
    (source / "eel" / "bomb.png").write_bytes(png_bomb())
    (source / "eel" / "short.jpg").write_bytes(jpeg(200, 200)[:-500])
    out = tmp_path / "out"
    with pytest.raises(BadImagesError) as caught:
        prepared(out, source, num_processes=2)
    assert len(caught.value.bad) == 4
    message = str(caught.value)
    for name, reason in (
        ("cat/empty.jpg", "the file is empty"),
        ("dog/text.JPEG", "not an image"),
        ("eel/bomb.png", "pixels"),
        ("eel/short.jpg", "damaged JPEG"),
    ):
        assert any(str(source / name) in line and reason in line for line in message.splitlines())
    assert [path.name for path in out.iterdir()] == [".partial"]


def test_a_preparation_that_found_bad_images_is_resumed_without_them(tmp_path, source, monkeypatch):
    monkeypatch.setattr("datasets.prepare.build.SECONDS_BETWEEN_WRITES", 0.0)
    (source / "cat" / "empty.jpg").write_bytes(b"")
    with pytest.raises(BadImagesError):
        prepared(tmp_path / "out", source)
    done = prepared(tmp_path / "out", source, on_bad_image="skip")
    assert (done.num_adopted, done.num_images, len(done.manifest.skipped)) == (25, 0, 1)
    prepared(tmp_path / "other", source, on_bad_image="skip")
    assert contents(tmp_path / "out") == contents(tmp_path / "other")
    verify_betons(tmp_path / "out", full=True)


@pytest.mark.parametrize("kind", ["file inside", "folder inside", "file", "link"])
def test_a_users_files_in_the_folder_of_samples_are_kept(tmp_path, source, kind):
    out, samples = tmp_path / "out", tmp_path / "out" / "samples"
    prepared(out, source)
    if kind.endswith("inside"):
        mine = samples / ("mine.txt" if kind == "file inside" else "0-cat.jpg")
        if kind == "folder inside":
            shutil.rmtree(samples)
            mine.mkdir(parents=True)
        else:
            mine.write_text("mine")
    else:
        samples.rename(mine := tmp_path / "mine")
        samples.symlink_to(mine) if kind == "link" else samples.write_text("mine")
    before = contents(out)
    with pytest.raises(DataError, match=r"samples is .*; move it, or choose another data\.folder"):
        prepared(out, source, force=True, max_side=40)
    assert mine.exists()
    assert contents(out) == before
    assert prepared(out, source).unchanged


def test_preparing_again_replaces_the_samples(tmp_path, source):
    prepared(tmp_path / "out", source, validation_fraction=0.5)
    assert len(list((tmp_path / "out" / "samples").iterdir())) == 8
    prepared(tmp_path / "out", source, force=True)
    assert len(list((tmp_path / "out" / "samples").iterdir())) == 5


def test_an_unreadable_file_is_a_bad_image(tmp_path, source):
    (source / "cat" / "gone.jpg").symlink_to(source / "cat" / "000.jpg")
    index = module.find_dataset("imagefolder").scan(module.SourceOptions(folder=tmp_path, source=source)).read_index()
    lost = next(ref for ref in index.splits["train"] if ref.name.startswith("dog/"))
    (source / lost.name).unlink()
    from datasets.prepare.build import build_betons

    with pytest.raises(BadImagesError, match=rf"{lost.path}: .*No such file"):
        build_betons(
            index,
            tmp_path,
            module.Conversion(None, 90),
            seed=0,
            made_from={},
            map_chunks=partial(map_ordered, num_processes=1),
            skip_bad=False,
            advance=lambda count: None,
        )


def test_bad_images_may_be_skipped_and_are_recorded(tmp_path, source):
    (source / "cat" / "empty.jpg").write_bytes(b"")
    done = prepared(tmp_path / "out", source, on_bad_image="skip")
    assert done.manifest.skipped == [{"path": "cat/empty.jpg", "reason": "the file is empty"}]
    assert sum(split.count for split in done.manifest.splits.values()) == 24
    verify_betons(tmp_path / "out", full=True)
    assert prepared(tmp_path / "out", source, on_bad_image="skip").unchanged
    with pytest.raises(ChangedInputsError, match=r"data\.on_bad_image: 'skip' \(images left out: 1\) -> 'error'"):
        prepared(tmp_path / "out", source, on_bad_image="error")


def test_damage_that_the_header_check_misses_is_a_bad_image_if_statistics_read_it(tmp_path, source):
    for path in sorted((source / "dog").iterdir())[:8]:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] + b"\xff\xd9" + data[len(data) // 2 :])
    with pytest.raises(BadImagesError, match=r"source/dog/00\d\.jpg: damaged JPEG"):
        prepared(tmp_path / "out", source, check_images="header")
    done = prepared(tmp_path / "out", source, check_images="header", on_bad_image="skip")
    assert all("damaged JPEG" in one["reason"] for one in done.manifest.skipped)
    # Validation images are not counted, so their damage is found only when they are loaded.
    assert done.manifest.splits["train"].count + len(done.manifest.skipped) == 19


def test_skipping_must_not_empty_a_class(tmp_path, source):
    for path in (source / "eel").iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(SourceError, match=r"without its bad images \(6\), train has no images of eel; the first"):
        prepared(tmp_path / "out", source, on_bad_image="skip")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_too_large_for_an_image_is_not_read(tmp_path, source):
    (source / "cat" / "disk.img").touch()
    os.truncate(source / "cat" / "disk.img", 3 << 30)
    with pytest.raises(BadImagesError, match=r"disk\.img: it has 3,221,225,472 bytes; an image may have at most"):
        prepared(tmp_path / "out", source)


def test_a_failed_force_leaves_what_was_there(tmp_path, source):
    prepared(tmp_path / "out", source)
    before = contents(tmp_path / "out")
    (source / "cat" / "empty.jpg").write_bytes(b"")
    with pytest.raises(BadImagesError):
        prepared(tmp_path / "out", source, force=True)
    assert contents(tmp_path / "out") == before


def test_incomplete_folders_are_explained_and_leftovers_removed(tmp_path, source):
    out = tmp_path / "out"
    prepared(out, source)
    (out / "manifest.json").unlink()
    with pytest.raises(BetonError, match="was interrupted"):
        prepared(out, source)
    (out / ".partial").mkdir()
    (out / ".partial" / "train.beton").write_bytes(b"half")
    prepared(out, source, force=True)
    assert not (out / ".partial").exists()


def test_a_changed_beton_is_not_accepted(tmp_path, source):
    prepared(tmp_path / "out", source)
    path = beton_path(tmp_path / "out", "train")
    path.write_bytes(path.read_bytes()[:-24])
    with pytest.raises(BetonError, match=r"train\.beton"):
        prepared(tmp_path / "out", source)


def test_a_second_preparation_of_a_folder_is_refused(tmp_path, source):
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out" / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="is being prepared by another process"):
            prepared(tmp_path / "out", source)
    finally:
        os.close(descriptor)
    assert not prepared(tmp_path / "out", source).unchanged


def test_too_little_space_is_an_error_before_writing(tmp_path, source, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"0\.0 MB free, but about .* are needed"):
        prepared(tmp_path / "out", source)
    assert list((tmp_path / "out").iterdir()) == []


def test_imagenet_from_tars_and_from_a_tree_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.sources.catalog.imagenet100_ids", lambda: CLASSES)
    for name, layout in (("tars", official_tars), ("tree", arranged_tree)):
        (tmp_path / name).mkdir()
        layout(tmp_path / name)
        out = tmp_path / f"{name}-out"
        prepare("imagenet100", out, source=tmp_path / name, images_per_class=3, num_processes=1)
    first, second = contents(tmp_path / "tars-out"), contents(tmp_path / "tree-out")
    assert {name: data for name, data in first.items() if name != "manifest.json"} == {
        name: data for name, data in second.items() if name != "manifest.json"
    }
    manifests = [load_manifest(tmp_path / f"{name}-out") for name in ("tars", "tree")]
    assert manifests[0] == manifests[1]
    assert manifests[0].splits["train"].class_counts == [3, 3, 3]
    assert prepare("imagenet100", tmp_path / "tars-out", source=tmp_path / "tree", images_per_class=3).unchanged


def test_bad_members_of_tars_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.sources.catalog.imagenet100_ids", lambda: CLASSES)
    source = tmp_path / "source"
    source.mkdir()
    official_tars(source)
    tar = source / "ILSVRC2012_img_val.tar"
    data = tar.read_bytes()
    # The first image has a class that is not requested.
    start = data.index(b"\xff\xd8\xff", data.index(b"ILSVRC2012_val_00000002"))
    tar.write_bytes(data[: start + 400] + bytes(100) + data[start + 500 :])
    with pytest.raises(BadImagesError, match=r"ILSVRC2012_img_val\.tar \(member val/n\d+/ILSVRC2012_val_\d+\.JPEG\)"):
        prepare("imagenet100", tmp_path / "out", source=source, num_processes=1)


def test_glyphs_are_drawn_and_their_heights_kept_in_beton_order(tmp_path):
    manifest = prepare("glyphs", tmp_path, glyphs=SMALL, num_processes=1).manifest
    for split, count in (("train", 30), ("validation", 20)):
        heights = manifest.splits[split].attributes["height"]
        assert len(heights) == count
        records = [record for record in read_records(tmp_path / "images.jsonl") if record.split == split]
        for record in records:
            index = int(record.name[-9:-4])
            assert record.position is not None
            assert heights[record.position] == glyph_height(SMALL, split, index)
    shutil.rmtree(tmp_path / "images")
    assert prepare("glyphs", tmp_path, glyphs=SMALL, num_processes=1).unchanged
    with pytest.raises(ChangedInputsError, match=r"data\.glyphs\.seed: 0 -> 1"):
        prepare("glyphs", tmp_path, glyphs=GlyphSettings(30, 20, 48, seed=1), num_processes=1)


@pytest.fixture
def run(tmp_path, source, monkeypatch, capsys):
    """Return a function that runs `python -m jobs.prepare` on an image folder and returns its output."""
    config = tmp_path / "config.yaml"
    data = {"dataset": "imagefolder", "source": str(source), "folder": str(tmp_path / "out"), "num_processes": 1}
    config.write_text(json.dumps({"name": "test", "data": data, "stages": {"backbone": {"epochs": 1}}}))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare", "--config", str(config), *arguments])
        main()
        return capsys.readouterr().out

    return run


def test_job_prints_what_it_did(run, tmp_path):
    first = run("data.max_side=40")
    assert "24 images in" in first
    assert "images/s" in first
    assert "cat, dog, eel" in first
    assert "license: that of your images" in first
    assert "nothing to do" in run("data.max_side=40")
    with pytest.raises(ChangedInputsError, match=r"data\.max_side: 40 -> 30"):
        run("data.max_side=30")
    assert "24 images in" in run("data.max_side=30", "--force")


def test_job_verifies_every_byte(run, tmp_path):
    run()
    assert "every byte matches the manifest" in run("--verify")
    path = beton_path(tmp_path / "out", "train")
    data = bytearray(path.read_bytes())
    data[int(read_layout(path).allocations["ptr"][0]) - 300] ^= 1  # where no image is
    path.write_bytes(data)
    assert "nothing to do" in run()
    with pytest.raises(BetonError, match=r"train\.beton is damaged: its SHA-256"):
        run("--verify")


@pytest.mark.parametrize("other", [["--force"], ["--download"], ["--upload", "file:///elsewhere"]])
def test_job_verifies_and_does_nothing_else(run, other, capsys):
    with pytest.raises(SystemExit):
        run("--verify", *other)
    assert "--verify only compares; do not combine it" in capsys.readouterr().err


def test_job_resumes_after_ctrl_c(run, source, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.prepare.build.SECONDS_BETWEEN_WRITES", 0.0)
    for number in range(100):
        (source / "cat" / f"more-{number}.jpg").write_bytes(jpeg(seed=5_000 + number))

    def interrupted(function, work, num_processes):
        yield function(next(iter(work)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "map_ordered", interrupted)
        with pytest.raises(KeyboardInterrupt, match="rerun the same command to resume"):
            run()
    assert "60 images in" in (printed := run())
    assert "after 64 that were done before" in printed
    verify_betons(tmp_path / "out", full=True)
