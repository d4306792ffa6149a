"""Parquet files in Hugging Face's layout, and WebDataset tars, as sources."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from datasets.beton import beton_path, read_jpeg
from datasets.prepare.build import BadImagesError
from datasets.prepare.prepare import ChangedInputsError, prepare, read_records
from datasets.sources.catalog import SourceOptions, find_dataset, imagenet100_ids
from datasets.sources.index import ROWS_PER_CHUNK, ImageRef, SourceError, read_bytes, stored_chunks
from datasets.sources.listing import ilsvrc_wnids
from datasets.sources.shards import split_in_name
from tests.unit.pictures import jpeg, write_class_folders

NAMES = ["chat", "chien", "été"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def hub_schema(names=NAMES, **more):
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    return pa.schema([("image", IMAGE), ("label", pa.int64()), *more.items()], metadata)


def rows(count, start=0, **more):
    """Rows with three classes in turn; all images are different, but names repeat from shard to shard."""
    return [
        {"image": {"bytes": jpeg(seed=start + n), "path": f"photo é{n}.jpg"}, "label": n % 3, **more}
        for n in range(count)
    ]


def write_shard(path: Path, data, schema=None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(data, schema or hub_schema())
    parquet.write_table(table, path, **{"row_group_size": 5, **options})
    return path


def write_tar(path: Path, files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(count, start=0):
    return [
        (f"é/{n:03d}.{kind}", content)
        for n in range(count)
        for kind, content in (("jpg", jpeg(seed=start + n)), ("cls", b"%d\n" % (n % 3)))
    ]


def scan(source, dataset="imagefolder", **options):
    return find_dataset(dataset).scan(SourceOptions(folder=Path("out"), source=Path(source), **options))


def index_of(source, dataset="imagefolder", **options):
    return scan(source, dataset, **options).read_index()


def prepared(folder, source, **options):
    return prepare("imagefolder", folder, source=source, **{"num_processes": 1, **options})


def counts(index):
    return {
        split: [sum(ref.label == n for ref in refs) for n in range(len(index.classes))]
        for split, refs in index.splits.items()
    }


@pytest.fixture
def hub(tmp_path):
    """Two shards of training images and one of validation images, as a Hugging Face repository has them."""
    for shard in range(2):
        write_shard(tmp_path / f"hub/data/train-{shard:05d}-of-00002.parquet", rows(12, 100 * shard))
    write_shard(tmp_path / "hub/data/validation-00000-of-00001.parquet", rows(6, 1000))
    write_shard(tmp_path / "hub/data/test-00000-of-00001.parquet", [{**row, "label": -1} for row in rows(3)])
    (tmp_path / "hub/README.md").write_text("about")
    return tmp_path / "hub"


def test_betons_hold_every_row_with_the_class_that_the_metadata_names(tmp_path, hub):
    done = prepared(tmp_path / "out", hub)
    assert done.manifest.classes == NAMES
    assert done.not_images == {"test shard": 1}
    write_shard(tmp_path / "held out/0.parquet", rows(6, 2000))
    assert scan(hub, validation_source=tmp_path / "held out").skipped == {"test shard": 1, "validation shard": 1}
    assert {name: split.class_counts for name, split in done.manifest.splits.items()} == {
        "train": [8, 8, 8],
        "validation": [2, 2, 2],
    }
    contents = {"train": {jpeg(seed=100 * s + n): n % 3 for s in range(2) for n in range(12)}}
    contents["validation"] = {jpeg(seed=1000 + n): n % 3 for n in range(6)}
    seen = set()
    for record in read_records(tmp_path / "out" / "images.jsonl"):
        assert record.position is not None
        stored = read_jpeg(beton_path(tmp_path / "out", record.split), record.position)
        assert NAMES[contents[record.split][stored]] == record.class_name
        seen.add(stored)
    assert len(seen) == 30
    assert prepared(tmp_path / "out", hub).unchanged


@pytest.mark.parametrize("options", [{"compression": "none", "use_dictionary": False}, {"data_page_size": 1000}, {}])
def test_every_encoding_gives_the_same_bytes(tmp_path, options):
    data = rows(12)
    index = index_of(write_shard(tmp_path / "a.parquet", data, **options).parent)
    for ref in [ref for refs in index.splits.values() for ref in refs]:
        assert read_bytes(ref) == data[ref.offset]["image"]["bytes"]


def test_plain_bytes_and_text_labels_need_no_metadata(tmp_path):
    data = [{"photo": jpeg(seed=n), "label": ("10", "9")[n % 2]} for n in range(8)]
    write_shard(tmp_path / "a.parquet", data, pa.schema([("photo", pa.large_binary()), ("label", pa.string())]))
    index = index_of(tmp_path)
    assert index.classes == ["9", "10"]
    assert counts(index) == {"train": [3, 3], "validation": [1, 1]}


def test_a_chunk_has_whole_row_groups_in_random_order():
    refs = [ImageRef(f"{n:04d}", 0, "a.parquet", n, 1, row_group=n // 100) for n in range(2000)]
    chunks = stored_chunks(refs, 0)
    assert sorted(ref for chunk in chunks for ref in chunk) == refs
    for chunk in chunks[:-1]:
        assert ROWS_PER_CHUNK <= len(chunk) < ROWS_PER_CHUNK + 100
        assert len(chunk) == 100 * len({ref.row_group for ref in chunk})
        assert len({ref.row_group for ref in chunk[:20]}) > 1
    assert stored_chunks(refs[::-1], 0) == chunks
    assert stored_chunks(refs, 1) != chunks
    large = [ref._replace(size=1 << 20) for ref in refs]
    assert max(map(len, stored_chunks(large, 0))) == 100


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path, hub):
    one = prepared(tmp_path / "one", hub, max_side=40).manifest
    assert prepared(tmp_path / "two", hub, max_side=40, num_processes=2).manifest == one


def test_without_validation_shards_rows_are_held_out_or_come_from_validation_source(tmp_path):
    write_shard(tmp_path / "a/part-0.parquet", rows(12))
    write_shard(tmp_path / "a/part-1.parquet", rows(0))
    write_shard(tmp_path / "b/other.parquet", rows(6, 500))
    assert counts(index_of(tmp_path / "a", validation_fraction=0.25)) == {"train": [3, 3, 3], "validation": [1, 1, 1]}
    index = index_of(tmp_path / "a", validation_source=tmp_path / "b")
    assert counts(index) == {"train": [4, 4, 4], "validation": [2, 2, 2]}
    (tmp_path / "c").mkdir()
    with pytest.raises(SourceError, match="has no shards"):
        index_of(tmp_path / "a", validation_source=tmp_path / "c")


def test_test_shards_are_for_validation_if_there_are_no_others(tmp_path):
    write_shard(tmp_path / "train/0000.parquet", rows(12))
    write_shard(tmp_path / "test/0000.parquet", rows(6, 500))
    assert counts(index_of(tmp_path)) == {"train": [4, 4, 4], "validation": [2, 2, 2]}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00294.parquet", "train"),
        ("default/validation/0000.parquet", "validation"),
        ("imagenet1k-val-00.tar", "validation"),
        ("test_a.tar", "test"),
        ("training/evaluated.tar", "train"),
        ("trains-0.tar", ""),
    ],
)
def test_the_split_is_a_word_of_the_name(name, split):
    assert split_in_name(name) == split


def test_damaged_shards_and_rows_are_all_listed_before_anything_is_written(tmp_path, hub):
    data = rows(9, 2000)
    data[1]["label"], data[2]["label"], data[4]["label"] = 3, None, -1
    write_shard(hub / "data/train-00002-of-00002.parquet", data)
    cut = hub / "data/train-00003-of-00002.parquet"
    cut.write_bytes(write_shard(tmp_path / "whole.parquet", rows(9)).read_bytes()[:-20])
    (hub / "data/train-00004-of-00002.parquet").write_bytes(b"")
    with pytest.raises(BadImagesError) as caught:
        prepared(tmp_path / "out", hub)
    shard = hub / "data/train-00002-of-00002.parquet"
    bad = dict(caught.value.bad)
    assert bad[f"{shard} (row 1)"] == "its label is 3, but the class names allow 0 to 2"
    assert bad[f"{shard} (row 2)"] == bad[f"{shard} (row 4)"] == "it has no label"
    assert "the Parquet file cannot be read" in bad[str(cut)]
    assert len(bad) == 5
    assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = prepared(tmp_path / "out", hub, on_bad_image="skip").manifest
    assert manifest.splits["train"].class_counts == [11, 9, 10]
    assert {one["path"] for one in manifest.skipped} == set(bad)


def test_damaged_images_are_listed_with_their_row(tmp_path):
    data = rows(15)
    data[3]["image"]["bytes"] = data[3]["image"]["bytes"][:-100]
    data[7]["image"] = {"bytes": None, "path": "somewhere.jpg"}
    data[8]["image"] = None
    shard = write_shard(tmp_path / "in/a.parquet", data, compression="none")
    with pytest.raises(BadImagesError) as caught:
        prepared(tmp_path / "out", shard.parent)
    bad = dict(caught.value.bad)
    assert set(bad) == {f"{shard} (row {n})" for n in (3, 7, 8)}
    assert "damaged JPEG" in bad[f"{shard} (row 3)"]
    assert "the path of a file instead of its bytes" in bad[f"{shard} (row 7)"]
    # A damaged page loses its whole row group.
    content = bytearray(write_shard(shard, rows(15), use_dictionary=False).read_bytes())
    first = parquet.ParquetFile(shard).metadata.row_group(1).column(0).data_page_offset
    content[first : first + 400] = bytes(400)
    shard.write_bytes(content)
    with pytest.raises(BadImagesError) as caught:
        prepared(tmp_path / "out", shard.parent)
    assert {place for place, _ in caught.value.bad} == {f"{shard} (row {n})" for n in range(5, 10)}
    assert all("row group 1 of a.parquet cannot be read" in reason for _, reason in caught.value.bad)


def test_all_mistakes_of_a_layout_are_reported_together(tmp_path, monkeypatch):
    write_shard(tmp_path / "1.parquet", [{"label": 1}], pa.schema([("label", pa.float32())]))
    two = pa.schema([("image", IMAGE), ("fine", pa.int64()), ("coarse", pa.int64())])
    write_shard(tmp_path / "2.parquet", [{"image": {"bytes": jpeg()}, "fine": 1, "coarse": 0}], two)
    write_shard(tmp_path / "3.parquet", rows(3))
    write_shard(tmp_path / "4.parquet", rows(3), hub_schema(["a", "b", "c"]))
    monkeypatch.setattr("datasets.sources.shards.MAX_ROW_GROUP_BYTES", 10_000)
    write_shard(tmp_path / "5.parquet", rows(30), row_group_size=30)
    with pytest.raises(SourceError) as caught:
        index_of(tmp_path)
    lines = str(caught.value).splitlines()[1:]
    for number, problem in [
        (1, "it has no column of images; its columns are label"),
        (1, "the label column label has the type float"),
        (2, "it has no column label; set data.label_column to one of image, fine, coarse"),
        (4, "its class names differ"),
        (5, "at most 1 GiB is allowed; write it with smaller ones"),
    ]:
        assert any(f"{number}.parquet" in line and problem in line for line in lines), problem
    assert len(lines) == 5


def test_a_label_column_can_be_named(tmp_path):
    features = {name: {"_type": "ClassLabel", "names": [f"{name}{n}" for n in range(2)]} for name in ("fine", "coarse")}
    schema = pa.schema(
        [("image", IMAGE), ("fine", pa.int64()), ("coarse", pa.int64())],
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    data = [{"image": {"bytes": jpeg(seed=n), "path": None}, "fine": n % 2, "coarse": n // 4} for n in range(8)]
    write_shard(tmp_path / "a.parquet", data, schema)
    with pytest.raises(SourceError, match=r"several label columns, fine and coarse; set data\.label_column"):
        index_of(tmp_path)
    assert index_of(tmp_path, label_column="coarse").classes == ["coarse0", "coarse1"]
    with pytest.raises(SourceError, match=r"no column medium \(data.label_column\)"):
        index_of(tmp_path, label_column="medium")


def test_changes_of_a_shard_are_found(tmp_path, hub):
    prepared(tmp_path / "out", hub)
    shard = hub / "data/train-00000-of-00002.parquet"
    os.utime(shard, ns=(1, 1))
    assert prepared(tmp_path / "out", hub).unchanged
    data = rows(12)
    data[5]["image"]["bytes"] = jpeg(seed=9999)
    write_shard(shard, data)
    with pytest.raises(ChangedInputsError, match=r"changed: .*train-00000-of-00002\.parquet/5/photo é5\.jpg"):
        prepared(tmp_path / "out", hub)


def test_a_shard_that_changes_while_it_is_prepared_is_an_error(tmp_path, hub, monkeypatch):
    from datasets.prepare import build

    def rewriting(refs):
        shard = write_shard(hub / "data/train-00000-of-00002.parquet", rows(12, 7))
        os.utime(shard, ns=(1, 1))
        return read_images(refs)

    read_images = build.read_images
    monkeypatch.setattr(build, "read_images", rewriting)
    with pytest.raises(SourceError, match="changed while it was prepared"):
        prepared(tmp_path / "out", hub)


def test_shards_of_two_kinds_or_with_some_splits_are_refused(tmp_path):
    write_shard(tmp_path / "a/0.parquet", rows(3))
    write_tar(tmp_path / "a/0.tar", samples(3))
    with pytest.raises(SourceError, match=r"\.parquet and \.tar files"):
        scan(tmp_path / "a")
    for names, problem in [
        (("train-0", "part-1"), r"such as train-0.parquet, but these have none: part-1.parquet"),
        (("validation-0", "test-0"), "no shard has train in its name: test-0.parquet, validation-0.parquet"),
    ]:
        for name in names:
            write_shard(tmp_path / names[0] / f"{name}.parquet", rows(3))
        with pytest.raises(SourceError, match=problem):
            scan(tmp_path / names[0])


def test_archives_beside_class_folders_are_no_shards(tmp_path):
    write_class_folders(tmp_path, {"cat": 3, "dog": 3})
    write_tar(tmp_path / "all.tar", samples(3))
    source = scan(tmp_path)
    assert source.read_index().classes == ["cat", "dog"]
    assert source.skipped == {".tar file beside the class folders": 1}


@pytest.mark.parametrize("level", ["", "a/", "a/train.parquet/"])
@pytest.mark.parametrize("companion", ["0000.idx", "_SUCCESS", "all.parquet.crc"])
def test_other_files_beside_shards_are_left_out(tmp_path, level, companion):
    shard = write_shard(tmp_path / f"{level}0000.parquet", rows(6))
    (shard.parent / companion).write_bytes(b"0 1")
    assert counts(index_of(tmp_path)) == {"train": [1, 1, 1], "validation": [1, 1, 1]}


@pytest.mark.parametrize("suffix", ["jpg", "gif"])
def test_class_folders_of_any_image_type_are_no_shards(tmp_path, suffix):
    write_class_folders(tmp_path, {"cat": 3, "dog": 3})
    for path in list(tmp_path.rglob("*.jpg")):
        path.rename(path.with_suffix(f".{suffix}"))
    write_tar(tmp_path / "all.tar", samples(3))
    assert scan(tmp_path).read_index().classes == ["cat", "dog"]
    if suffix == "jpg":  # images decide even if a shard is beside them
        write_tar(tmp_path / "cat/all.tar", samples(3))
        assert scan(tmp_path).read_index().classes == ["cat", "dog"]


def test_tars_are_read_in_place(tmp_path):
    write_tar(tmp_path / "in/a-0.tar", samples(12))
    fields = [{"label": n % 3, "caption": "é"} for n in range(6)]
    others = [("0.txt", b"text"), ("notes/", b""), ("sub.folder/.hidden.jpg", b"x")]
    pairs = [
        (f"{n}.{kind}", data)
        for n in range(6)
        for kind, data in (("JPG", jpeg(seed=500 + n)), ("json", json.dumps(fields[n]).encode()))
    ]
    write_tar(tmp_path / "in/a-1.tar", pairs + others)
    manifest = prepared(tmp_path / "out", tmp_path / "in").manifest
    assert manifest.classes == ["0", "1", "2"]
    assert [manifest.splits[name].class_counts for name in ("train", "validation")] == [[5, 5, 5], [1, 1, 1]]
    expected = {jpeg(seed=n): str(n % 3) for n in range(12)} | {jpeg(seed=500 + n): str(n % 3) for n in range(6)}
    for record in read_records(tmp_path / "out" / "images.jsonl"):
        stored = read_jpeg(beton_path(tmp_path / "out", record.split), record.position)
        assert expected[stored] == record.class_name


def test_samples_of_tars_that_cannot_be_used_are_all_listed(tmp_path):
    image = jpeg()
    tar = write_tar(
        tmp_path / "in/a.tar",
        [
            *samples(12),
            *[("two.left.jpg", image), ("two.right.jpg", image), ("two.cls", b"0")],
            *[("blind.cls", b"0"), ("bare.jpg", image), ("empty.jpg", image), ("empty.cls", b" ")],
            *[("twice.jpg", image), ("twice.cls", b"0"), ("twice.cls", b"1")],
            *[("odd.jpg", image), ("odd.json", b"{"), ("list.jpg", image), ("list.json", b"[1]")],
            *[("half.jpg", image), ("half.json", b'{"label": 3.5}')],
            *[("below.jpg", image), ("below.json", b'{"label": -2}'), ("none.jpg", image), ("none.json", b"{}")],
            *[("broken.jpg", image[:-100]), ("broken.cls", b"1")],
        ],
    )
    unlabeled = write_tar(tmp_path / "in/b.tar", [(f"{n}.jpg", image) for n in range(5)])
    cut = tmp_path / "in/c.tar"
    cut.write_bytes(write_tar(tmp_path / "whole.tar", samples(6, 50)).read_bytes()[:3000])
    damaged = write_tar(tmp_path / "in/e.tar", samples(6, 60))
    # The names are not ASCII, so the header has `?`. Changing it makes the header's checksum wrong.
    damaged.write_bytes(damaged.read_bytes().replace(b"?/002.cls", b"!/002.cls"))
    packed = tmp_path / "in/d.tar"
    with tarfile.open(packed, "w:gz"):
        pass
    options = {"on_bad_image": "skip", "validation_fraction": 0.3}
    skipped = {
        one["path"]: one["reason"] for one in prepared(tmp_path / "out", tmp_path / "in", **options).manifest.skipped
    }
    with pytest.raises(BadImagesError) as caught:
        prepared(tmp_path / "other", tmp_path / "in")
    assert [place for place, _ in caught.value.bad] == list(skipped)[:-1]
    assert skipped.pop("a.tar/broken.jpg").startswith("damaged JPEG")
    assert skipped.pop(str(unlabeled)) == "none of its 5 samples has a .cls or .json with a label"
    assert all("not a complete, uncompressed tar file" in skipped.pop(str(one)) for one in (cut, packed, damaged))
    names = {record.name for record in read_records(tmp_path / "out" / "images.jsonl")}
    assert {name for name in names if name.startswith("e.tar")} == {"e.tar/é/000.jpg", "e.tar/é/001.jpg"}
    assert {
        name.removeprefix(f"{tar} "): reason.partition(":")[0] for name, reason in skipped.items() if str(tar) in name
    } == {
        "(sample two)": "it has 2 images; one is allowed",
        "(sample blind)": "it has no image",
        "(sample bare)": "it has no label in .cls and no label in .json",
        "(sample empty)": "it has no label in .cls and no label in .json",
        "(sample twice)": "it has two .cls files",
        "(sample odd)": "its .json cannot be read",
        "(sample list)": "its .json is not an object",
        "(sample half)": "its label is 3.5; a label is text, or an integer of 0 or more",
        "(sample below)": "its label is -2; a label is text, or an integer of 0 or more",
        "(sample none)": "it has no label in .cls and no label in .json",
    }


@pytest.mark.parametrize("kind", ["names", "numbers", "ordered names", "image names"])
def test_imagenet100_is_filtered_from_shards(tmp_path, kind):
    order, wanted = ilsvrc_wnids(), imagenet100_ids()
    assert len(order) == 1000
    assert order == sorted(order)
    used = [*wanted, *[wnid for wnid in order if wnid not in wanted][:5]]
    names = {"names": order, "ordered names": [f"name {n}" for n in range(1000)], "image names": ["a", "b"]}.get(kind)
    for split in ("train", "validation"):
        data = [
            {
                "image": {"bytes": b"x", "path": f"{wnid}_1.JPEG" if kind == "image names" else None},
                "label": n % 2 if kind == "image names" else order.index(wnid),
            }
            for n, wnid in enumerate(used)
        ]
        write_shard(tmp_path / f"{split}-0.parquet", data, hub_schema(names))
    index = index_of(tmp_path, "imagenet100")
    assert index.classes == wanted
    assert counts(index) == {"train": [1] * 100, "validation": [1] * 100}
    assert [used[ref.offset] for ref in index.splits["train"]] == [wanted[ref.label] for ref in index.splits["train"]]


def test_imagenet100_needs_to_know_the_ids(tmp_path):
    write_shard(tmp_path / "train-0.parquet", rows(6))
    with pytest.raises(SourceError, match="the WordNet ids of these classes are unknown: chat, chien, été"):
        index_of(tmp_path, "imagenet100")
    data = [{"image": {"bytes": b"x", "path": "n01440764_3.JPEG"}, "label": 7}]
    write_shard(tmp_path / "train-0.parquet", data, hub_schema(None))
    with pytest.raises(SourceError, match="classes have no train images"):
        index_of(tmp_path, "imagenet100")


def test_columns_and_keys_group_images(tmp_path):
    data = [row for n in range(60) for row in rows(2, 10 * n, scene=f"scène {n}")]
    write_shard(
        tmp_path / "p/a.parquet",
        [{**row, "label": n % 2} for n, row in enumerate(data)],
        hub_schema(NAMES[:2], scene=pa.string()),
    )
    pairs = [(f"{n}.jpg", jpeg(seed=n)) for n in range(120)]
    pairs += [(f"{n}.json", json.dumps({"label": n % 2, "scene": n // 2}).encode()) for n in range(120)]
    write_tar(tmp_path / "t/a.tar", pairs)
    for folder in ("p", "t"):
        index = index_of(tmp_path / folder, group_by="scene", validation_fraction=0.25)
        groups = [{ref.group for ref in refs} for refs in index.splits.values()]
        assert list(map(len, groups)) == [45, 15]
        assert not set.intersection(*groups)
    pairs[-1] = ("119.json", json.dumps({"label": 1}).encode())
    write_tar(tmp_path / "t/a.tar", pairs)
    with pytest.raises(SourceError, match=r"1 images have no value for data.group_by 'scene': a.tar/119.jpg"):
        index_of(tmp_path / "t", group_by="scene")
