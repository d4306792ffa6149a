from __future__ import annotations

import io
import json
import os
import sys

import pytest

from jobs import predict
from jobs.cli import run_job
from tests.unit.pictures import jpeg
from tests.unit.tracking_fixtures import registered_store

ROW = {"file": "a.jpg", "label": "cat", "probability": 0.987, "resolution": 112, "gflops": 1.08, "error": None}


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> str:
    return registered_store(tmp_path_factory)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for name in ("b.jpg", "a.JPEG", "below/c.jpg"):
        (folder / name).write_bytes(jpeg(60, 50, seed=len(name)))
    (folder / "notes.txt").write_text("no image")
    return folder


def ran(monkeypatch, *arguments: object) -> str | int | None:
    """Return the exit code of `python -m jobs.predict ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    try:
        run_job(predict.main)
    except SystemExit as ended:
        return ended.code
    return 0


def test_folders_are_searched_and_files_taken_as_given(pictures, capsys):
    (pictures / "gone.jpg").symlink_to("/nowhere")
    (pictures / "photo.webp").touch()
    found = predict.find_images([pictures / "notes.txt", pictures])
    assert [path.name for path in found] == ["notes.txt", "a.JPEG", "b.jpg", "c.jpg", "gone.jpg", "photo.webp"]
    assert capsys.readouterr().err == f"left out below {pictures}: 1 entry that is not an image: .txt file (1)\n"


def test_all_missing_paths_are_named_together(tmp_path):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"(?s)empty has no \.jpg.*absent\.jpg does not exist.*pipe is not a file"):
        predict.find_images([tmp_path / "empty", tmp_path / "absent.jpg", tmp_path / "pipe"])


def test_the_table_is_aligned():
    failed = {**dict.fromkeys(ROW), "file": "long/name.jpg", "error": "the file is empty"}
    lines = predict.table([ROW, failed]).splitlines()
    assert lines[1].split() == ["a.jpg", "cat", "0.987", "112", "1.08"]
    assert len(lines[1]) == len(lines[0])
    assert lines[2] == "long/name.jpg  error: the file is empty"


def test_images_are_classified(registry, pictures, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    assert ran(monkeypatch, "--model", "models:/drnet@champion", pictures) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "class", "probability", "resolution", "GFLOPs"]
    assert [line.split()[0] for line in lines[1:]] == [
        str(pictures / name) for name in ("a.JPEG", "b.jpg", "below/c.jpg")
    ]
    assert all(" class " in line for line in lines[1:])


def test_json_is_alone_on_the_output_and_a_bad_image_is_exit_code_1(registry, pictures, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    code = ran(monkeypatch, "--json", "--model", "models:/drnet/1", pictures / "b.jpg", pictures / "notes.txt")
    rows = json.loads(capsys.readouterr().out)
    assert code == 1
    assert rows[0]["error"] is None
    assert rows[0]["resolution"] in (48, 32)
    assert rows[1]["error"] == "not a JPEG, PNG, WebP, BMP, TIFF, PPM or AVIF file"
    assert rows[1]["label"] is None


def test_names_that_the_output_cannot_show_lose_no_row(registry, pictures, monkeypatch):
    for name in (os.fsdecode(b"caf\xe9.jpg"), "caf\N{LATIN SMALL LETTER E WITH ACUTE}.jpg"):
        (pictures / name).write_bytes(jpeg(60, 50))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    for options, count in (([], 6), (["--json"], 5)):
        output = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
        assert ran(monkeypatch, *options, "--model", "models:/drnet/1", pictures) == 0
        sys.stdout.flush()
        said = output.getvalue().decode("ascii")
        assert (len(json.loads(said)) if options else len(said.splitlines())) == count


def test_broken_links_and_names_that_are_not_utf_8_have_rows(registry, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(jpeg(60, 50))
    (tmp_path / "gone.jpg").symlink_to("/nowhere")
    for arguments in (["--json"], []):
        assert ran(monkeypatch, *arguments, "--model", "models:/drnet/1", tmp_path) == 1
        printed = capsys.readouterr().out
        printed.encode()
        assert "No such file or directory" in printed
        if arguments:
            rows = json.loads(printed)
            assert [row["file"] for row in rows] == [f"{tmp_path}/caf\\xe9.jpg", f"{tmp_path}/gone.jpg"]
            assert rows[0]["error"] is None


def test_an_unknown_model_is_one_message(registry, pictures, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    assert ran(monkeypatch, "--model", "models:/drnet@nobody", pictures) == 2
    assert "has no alias 'nobody' (it has: champion)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "results", "b.jpg"], "--out takes one folder of images"),
        (["--out", "results", "--json", "."], "no --json"),
        (["--out", "results", ".", "."], "--out takes one folder of images"),
        (["--files-per-part", "8", "."], "--files-per-part needs --out"),
        (["--files-per-part", "0", "--out", "results", "."], "--files-per-part is 0; give 1 or more"),
        (["--budget-bias", "nan", "--out", "results", "."], "--budget-bias is nan; give a finite number"),
        (["--budget-bias", "inf", "."], "--budget-bias is inf; give a finite number"),
    ],
)
def test_invalid_arguments_are_refused_first(pictures, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(pictures)
    assert ran(monkeypatch, "--model", "models:/drnet@champion", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (pictures / "results").exists()


def test_a_bias_spends_more_or_less(registry, pictures, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    for bias, side in ((1000, 48), (-1000, 32)):
        assert ran(monkeypatch, "--json", "--budget-bias", bias, "--model", "models:/drnet/1", pictures) == 0
        assert {row["resolution"] for row in json.loads(capsys.readouterr().out)} == {side}
