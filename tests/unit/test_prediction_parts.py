"""The output folder of a large prediction: the list, its parts, and refused resumes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from datasets.sources.folders import walk_images
from pipeline.cluster.predict_folder import OutputFolder, Plan, rows_table, summarize

COLUMNS = {"label": "string", "resolution": "Int64", "gflops": "Float64", "error": "string"}
ROW = {"file": "a.jpg", "label": "cat", "resolution": 48, "gflops": 0.5, "error": None}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name in ("b.jpg", "a/2.JPEG", "a/1.png", "a.jpg", "c/deep/est/x.jpg", "notes.txt", "a/readme"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "c" / "loop").symlink_to(folder)
    (folder / "link.jpg").symlink_to(folder / "b.jpg")
    (folder / "gone.jpg").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe.jpg")
    return folder


@pytest.fixture
def output(tmp_path: Path) -> OutputFolder:
    (tmp_path / "out").mkdir()
    return OutputFolder(tmp_path / "out")


LISTED = ["a/1.png", "a/2.JPEG", "a.jpg", "b.jpg", "c/deep/est/x.jpg", "gone.jpg", "link.jpg"]


def plan_of(digest: str, **changed) -> Plan:
    plan = Plan("models:/drnet/1", "uuid", budget_bias=0.0, files_per_part=4, num_files=7, files_sha256=digest)
    return replace(plan, **changed)


def test_images_are_found_in_a_fixed_order_without_hanging_or_looping(images):
    assert list(walk_images(images).files) == LISTED
    found = sorted(path for path in images.rglob("*") if path.suffix in (".png", ".JPEG", ".jpg"))
    assert [str(path.relative_to(images)) for path in found if not path.is_fifo()] == LISTED


def test_parts_are_cut_from_the_list_and_read_back_from_it(images, output):
    parts, digest = output.list_files(images, 4)
    output.start_or_resume(plan_of(digest))
    assert [part.num_files for part in parts] == [4, 3]
    assert [output.files_of(part) for part in parts] == [LISTED[:4], LISTED[4:]]
    exact, same = output.list_files(images, 3)
    assert [part.num_files for part in exact] == [3, 3, 1]
    assert same == digest, "the digest does not depend on the parts"


def test_an_empty_folder_has_no_parts(tmp_path, output):
    (tmp_path / "empty").mkdir()
    assert output.list_files(tmp_path / "empty", 4)[0] == []


def test_a_written_part_is_no_longer_missing_and_leaves_no_partial_file(images, output):
    parts, digest = output.list_files(images, 4)
    output.start_or_resume(plan_of(digest))
    assert output.missing(parts) == parts
    output.write_part(1, rows_table([ROW], COLUMNS))
    assert output.missing(parts) == parts[:1]
    assert sorted(path.name for path in output.path.iterdir()) == ["_files.list", "_plan.json", "part-000001.parquet"]
    (output.path / ".part-000000.parquet.1234.partial").touch()
    output.remove_partial()
    assert output.missing(parts) == parts[:1]
    assert not list(output.path.glob(".*"))


def test_another_plan_is_refused_with_all_differences(images, output):
    _, digest = output.list_files(images, 4)
    output.start_or_resume(plan_of(digest))
    (images / "new.jpg").touch()
    _, other = output.list_files(images, 4)
    changed = plan_of(other, num_files=8, model="models:/drnet/2")
    with pytest.raises(
        ValueError, match=r"(?s)sha256: .*model: 'models:/drnet/1' -> 'models:/drnet/2'.*num_files: 7 -> 8"
    ):
        output.start_or_resume(changed)
    assert output.list_file.read_bytes().count(b"\0") == 7, "the list still belongs to the results"
    (images / "new.jpg").unlink()
    _, again = output.list_files(images, 4)
    output.start_or_resume(plan_of(again))


def test_parts_without_a_plan_and_a_damaged_plan_are_refused(images, output):
    _, digest = output.list_files(images, 4)
    output.plan_file.write_text("{")
    with pytest.raises(ValueError, match=r"_plan\.json is damaged"):
        output.start_or_resume(plan_of(digest))
    output.plan_file.unlink()
    output.part_file(0).touch()
    with pytest.raises(ValueError, match=r"no _plan\.json"):
        output.start_or_resume(plan_of(digest))


def test_every_part_has_the_same_types_even_if_a_column_is_null(tmp_path, output):
    nothing = dict.fromkeys(COLUMNS) | {"file": "b.jpg", "error": "not a JPEG", "gflops": 0.0}
    tables = [rows_table(rows, COLUMNS) for rows in ([ROW], [nothing], [])]
    assert len({table.schema for table in tables}) == 1
    output.write_part(0, tables[0])
    output.write_part(1, tables[1])
    assert pq.read_table(output.path).to_pylist() == [ROW, nothing]
    assert summarize(output, 2) == "2 files, 1 of them with an error; 0.5 GFLOPs an image (100.0% at 48 px)"


def test_a_name_that_is_not_utf8_is_listed_and_can_be_stored(images, output):
    (images / os.fsdecode(b"z\xff.jpg")).touch()
    parts, digest = output.list_files(images, 10)
    output.start_or_resume(plan_of(digest))
    name = output.files_of(parts[0])[-1]
    assert (images / name).exists()
    assert rows_table([ROW | {"file": name}], COLUMNS).to_pylist()[0]["file"] == "z\\xff.jpg"
