from __future__ import annotations

import dataclasses
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from PIL import Image

from datasets.beton import (
    ALLOCATION,
    FIELD,
    FORMAT,
    HEADER,
    METADATA,
    METADATA_START,
    PAGE_SIZE,
    VERSION,
    BetonError,
    Manifest,
    Sample,
    Split,
    beton_path,
    file_sha256,
    load_manifest,
    read_jpeg,
    read_layout,
    verify_betons,
)
from tests.betons import write_beton
from tests.unit.pictures import decoded, encoded, jpeg, smooth_rgb

SAMPLES = [Sample(jpeg(seed=number), 64, 48, number % 3) for number in range(7)]


def blob(size: int, value: int) -> Sample:
    return Sample(bytes([value]) * size, 10, 10, 0)


@pytest.fixture
def prepared(tmp_path):
    """A folder with two betons and their manifest."""
    splits = {}
    for name in ("train", "validation"):
        path = beton_path(tmp_path, name)
        write_beton(path, SAMPLES, len(SAMPLES))
        heights = [0.1 * number for number in range(7)]
        splits[name] = Split(path.name, 7, [3, 2, 2], path.stat().st_size, file_sha256(path), {"height": heights})
    manifest = Manifest(
        format=FORMAT,
        dataset="imagefolder",
        classes=["a", "b", "c"],
        settings={"max_side": None},
        mean=(0.5, 0.25, 0.125),
        std=(0.1, 0.2, 0.3),
        source_digest="0" * 64,
        skipped=[],
        versions={"ffcv": "1"},
        splits=splits,
        licence="none",
    )
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    return tmp_path, manifest


def offsets(record):
    """Return (dtype, offset) of every field of a record layout, in order."""
    return [record.fields[name] for name in record.names]


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_record_layouts_are_those_of_ffcv():
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField

    assert (types.HeaderType, types.FieldDescType, types.ALLOC_TABLE_TYPE) == (HEADER, FIELD, ALLOCATION)
    assert types.CURRENT_VERSION == VERSION
    theirs = types.get_metadata_type([RGBImageField(), IntField(), IntField()])
    assert METADATA.itemsize == theirs.itemsize
    assert offsets(METADATA) == offsets(theirs)
    assert {types.TYPE_ID_HANDLER[2], types.TYPE_ID_HANDLER[1]} == {RGBImageField, IntField}


def read_by_stock_ffcv(path, os_cache):
    """Return images and labels of a beton's only batch."""
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    loader = Loader(
        str(path),
        batch_size=4,
        num_workers=1,
        os_cache=os_cache,
        order=OrderOption.SEQUENTIAL,
        pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()], "checksum": None},
    )
    [(images, labels)] = [(np.array(images), labels.ravel().tolist()) for images, labels in loader]
    return images, labels


@pytest.mark.parametrize("os_cache", [True, False])
def test_stock_ffcv_iterates_a_beton(tmp_path, os_cache):
    gray = encoded(Image.fromarray(smooth_rgb()).convert("L"), quality=95)
    jpegs = [jpeg(), jpeg(progressive=True, seed=1), gray, jpeg(subsampling=0, seed=2)]
    path = tmp_path / "some.beton"
    write_beton(path, [Sample(data, 64, 48, 5 - number) for number, data in enumerate(jpegs)], capacity=9)
    # In a separate process: stock FFCV makes numba treat arrays of bytes as read-only in everything compiled later.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        images, labels = process.submit(read_by_stock_ffcv, path, os_cache).result()
    assert labels == [5, 4, 3, 2]
    for found, data in zip(images, jpegs, strict=True):
        assert np.abs(found - decoded(data)).mean() < 2
    assert np.ptp(images[2].astype(int), axis=-1).max() == 0


def test_samples_come_back_in_order(tmp_path):
    path = tmp_path / "some.beton"
    assert write_beton(path, iter(SAMPLES), capacity=7) == 7
    assert [read_jpeg(path, index) for index in range(7)] == [sample.jpeg for sample in SAMPLES]
    layout = read_layout(path)
    assert layout.metadata["label"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert set(layout.metadata["image"]["width"]) == {64}
    for index in (-1, 7):
        with pytest.raises(IndexError, match=f"no sample {index}; give 0 to 6"):
            read_jpeg(path, index)


def test_samples_fill_pages_and_never_straddle_two(tmp_path):
    path = tmp_path / "some.beton"
    sizes = [PAGE_SIZE // 2, PAGE_SIZE // 2, 1, PAGE_SIZE, PAGE_SIZE - 1, 2, 5]
    write_beton(path, [blob(size, number + 1) for number, size in enumerate(sizes)], capacity=7)
    pages = read_layout(path).allocations["ptr"] // PAGE_SIZE
    assert pages.tolist() == [1, 1, 2, 3, 4, 5, 5]
    for number, size in enumerate(sizes):
        assert read_jpeg(path, number) == bytes([number + 1]) * size
    assert int(read_layout(path).allocations["ptr"][0]) % PAGE_SIZE == 0


def test_oversized_jpegs_and_extra_samples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="larger than a page"):
        write_beton(tmp_path / "a.beton", [blob(PAGE_SIZE + 1, 1)], capacity=1)
    with pytest.raises(ValueError, match="room for 6 samples"):
        write_beton(tmp_path / "b.beton", SAMPLES, capacity=6)


def test_manifest_survives_writing_and_reading(prepared):
    folder, manifest = prepared
    assert load_manifest(folder) == manifest
    assert verify_betons(folder) == verify_betons(folder, full=True) == manifest


def test_digest_depends_on_the_data_alone(prepared):
    _, manifest = prepared
    assert len(manifest.digest) <= 36
    elsewhere = dataclasses.replace(manifest, source_state="moved", versions={"ffcv": "2"}, licence="other")
    assert elsewhere.digest == manifest.digest
    changed = {**manifest.splits, "train": dataclasses.replace(manifest.splits["train"], sha256="f" * 64)}
    assert dataclasses.replace(manifest, splits=changed).digest != manifest.digest
    assert dataclasses.replace(manifest, classes=["a", "b", "d"]).digest != manifest.digest


def test_missing_manifest_is_explained(tmp_path, prepared):
    folder, _ = prepared
    with pytest.raises(BetonError, match=r"has no prepared data .* run `python -m jobs.prepare"):
        load_manifest(folder / "elsewhere")
    (folder / "manifest.json").unlink()
    with pytest.raises(BetonError, match="was interrupted"):
        load_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(format=99), "format 99, but this version reads format 2"),
        (lambda tree: tree.pop("classes"), "damaged.*classes"),
        (lambda tree: tree.update(surprise=1), "damaged.*surprise"),
        (lambda tree: tree["splits"].pop("validation"), "lacks the split validation"),
        (lambda tree: tree["splits"]["train"].pop("count"), "damaged.*count"),
    ],
)
def test_damaged_manifests_are_explained(prepared, change, message):
    folder, _ = prepared
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(BetonError, match=message):
        load_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 2}', '{"format": 2, "splits": []}', "\0\0\0"])
def test_invalid_manifests_are_explained(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BetonError, match="is damaged"):
        load_manifest(tmp_path)


LABEL = METADATA_START + offsets(METADATA)[1][1]
TABLE = -7 * ALLOCATION.itemsize
HEADER_DAMAGE = {"version": 0, "number of fields": 2, "page size": 6, "samples": 8, "table": 16}
DAMAGE = {
    **{name: (position, 1) for name, position in HEADER_DAMAGE.items()},
    "field type": (HEADER.itemsize, 0),
    "field name": (HEADER.itemsize + 3, 0),
    "field arguments": (HEADER.itemsize + FIELD.itemsize + 500, 0),
    "image mode": (METADATA_START, 0),
    "image width": (METADATA_START + 1, 6),
    "image pointer": (METADATA_START + 6, 0),
    "label": (LABEL, 0),
    "label sign": (LABEL + 7, 7),
    "allocation id": (TABLE, 0),
    "allocation pointer": (TABLE + 8, 0),
    "allocation size": (TABLE + 16, 0),
}


@pytest.mark.parametrize("part", DAMAGE)
def test_one_flipped_bit_in_header_or_tables_is_detected_quickly(prepared, part):
    folder, _ = prepared
    flip(beton_path(folder, "train"), *DAMAGE[part])
    with pytest.raises(BetonError, match=r"train\.beton.*(\n.*)*prepare the data again"):
        verify_betons(folder)


@pytest.mark.parametrize("position", [*(place for place, _ in DAMAGE.values()), 5000, PAGE_SIZE + 700])
def test_one_flipped_bit_anywhere_is_detected_by_the_full_check(prepared, position):
    folder, _ = prepared
    flip(beton_path(folder, "validation"), position)
    with pytest.raises(BetonError, match=r"validation\.beton"):
        verify_betons(folder, full=True)


@pytest.mark.parametrize("size", [0, 10, METADATA_START - 1, METADATA_START + 20, PAGE_SIZE + 100])
def test_a_truncated_beton_is_detected(prepared, size):
    folder, _ = prepared
    path = beton_path(folder, "train")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BetonError, match=r"train\.beton"):
        verify_betons(folder)
    with pytest.raises(BetonError, match=r"train\.beton"):
        read_layout(path)
    with pytest.raises(BetonError, match=r"train\.beton"):
        read_jpeg(path, 0)


def test_an_overwritten_image_is_detected(prepared):
    folder, _ = prepared
    path = beton_path(folder, "train")
    data = bytearray(path.read_bytes())
    data[PAGE_SIZE + 700] ^= 1
    path.write_bytes(data)
    with pytest.raises(BetonError, match="sample 0 does not match its checksum"):
        verify_betons(folder)


def test_all_wrong_betons_are_reported_together(prepared):
    folder, _ = prepared
    beton_path(folder, "train").unlink()
    write_beton(beton_path(folder, "validation"), SAMPLES[:6], 6)
    with pytest.raises(BetonError, match=r"train\.beton does not exist\n.*validation\.beton has .* bytes"):
        verify_betons(folder)


def test_a_beton_from_another_preparation_is_detected(prepared):
    folder, _ = prepared
    path = beton_path(folder, "train")
    write_beton(path, [sample._replace(label=(sample.label + 1) % 3) for sample in SAMPLES], 7)
    with pytest.raises(BetonError, match="another preparation"):
        verify_betons(folder)
