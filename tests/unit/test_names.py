"""Any names that a file system takes go through all jobs, or are refused by name before anything is written."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from datasets.beton import beton_path, load_manifest, read_jpeg, read_layout, verify_betons
from datasets.files import shown_name
from datasets.prepare.build import BadImagesError
from datasets.prepare.prepare import ChangedInputsError, Prepared, prepare, read_records
from datasets.sources.index import SourceError
from jobs import predict
from jobs.cli import run_job
from jobs.prepare import main
from pipeline.evaluation.render import render_html, render_markdown
from pipeline.evaluation.report import FIGURES, build_report, to_json
from pipeline.tracking.registry import register_model
from pipeline.tracking.tracker import close_run, open_run
from pipeline.training.checkpoint import load_model, save_model
from tests.unit.evaluation_cases import easy_and_hard, evaluation_of, predictions_of
from tests.unit.pictures import jpeg, write_class_folders
from tests.unit.tracking_fixtures import finish_run, fresh_store, make_config, make_manifest, make_model

LATIN_1 = os.fsdecode(b"caf\xe9")


def prepared(folder: Path, source: Path, **options: Any) -> Prepared:
    return prepare("imagefolder", folder, source=source, num_processes=1, **options)


def write(folder: Path, names: list[bytes], seed: int = 0) -> dict[str, bytes]:
    """Write a small JPEG of each name; return them by the name that is shown."""
    folder.mkdir()
    images = {name: jpeg(8, 8, seed=seed + number) for number, name in enumerate(names)}
    for name, data in images.items():
        (folder / os.fsdecode(name)).write_bytes(data)
    return {shown_name(f"{folder.name}/{os.fsdecode(name)}"): data for name, data in images.items()}


names = (
    st.one_of(
        st.binary(min_size=1, max_size=16),
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).map(str.encode),
        st.sampled_from(
            [b"caf\xe9", "caf\u00e9".encode(), "cafe\u0301".encode(), b"caf\\xe9", b"train", b"a\nb", b".x"]
        ),
        st.sampled_from([b"\xff" * 255, "\u20ac".encode() * 85, b"x" * 255]),
    )
    .map(lambda name: name.translate(None, b"/\0")[:255])
    .filter(lambda name: name not in (b"", b".", b".."))
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    classes=st.lists(names, min_size=2, max_size=3, unique=True),
    files=st.lists(names, max_size=2, unique=True),
    inside=names,
)
def test_any_name_is_prepared_or_refused_by_name(classes: list[bytes], files: list[bytes], inside: bytes) -> None:
    with TemporaryDirectory() as root:
        source, out = Path(root, os.fsdecode(inside)), Path(root, os.fsdecode(inside[:-1] + b"y"))
        assume(source != out)
        source.mkdir()
        written: dict[str, bytes] = {}
        for number, name in enumerate(classes):
            written |= write(source / os.fsdecode(name), list({*files, b"1.jpg", b"2.jpg"}), seed=10 * number)
        refused = ""
        try:
            done = prepared(out, source)
        except SourceError as error:
            refused = str(error)
        if refused:
            assert refused.encode()
            shown = {form for name in map(os.fsdecode, classes) for form in (shown_name(name), ascii(name))}
            assert any(form in refused for form in shown), refused
            assert not out.exists() or list(out.iterdir()) == []
            return
        manifest = verify_betons(out)
        assert json.loads((out / "manifest.json").read_bytes())["classes"] == manifest.classes
        assert all(name.encode() and name == shown_name(name) for name in manifest.classes)
        records = read_records(out / "images.jsonl")
        for record in records:
            path, position = beton_path(out, record.split), record.position
            assert position is not None
            assert read_jpeg(path, position) == written[record.name]
            label = int(read_layout(path).metadata["label"][position])
            assert manifest.classes[label] == record.class_name == record.name.split("/")[0]
        num_files = len({*files, b"1.jpg", b"2.jpg"}) * len(manifest.classes)
        num_beside = len(classes) - len(manifest.classes)
        assert len(records) + done.not_images.total() == num_files + num_beside, "nothing vanishes"
        assert prepared(out, source).unchanged


@pytest.fixture
def latin_1(tmp_path: Path) -> Path:
    """A folder, classes and files whose names are not UTF-8."""
    source = tmp_path / LATIN_1 / "source"
    source.parent.mkdir()
    write_class_folders(source, {LATIN_1: 3, "b": 3})
    (source / LATIN_1 / f"{LATIN_1}.jpg").write_bytes(b"no image")
    (source / LATIN_1 / f"{LATIN_1}.link").symlink_to(LATIN_1)
    return source


def test_a_job_prints_and_stores_names_that_are_not_utf_8(
    latin_1: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(latin_1.parent)
    data = {"dataset": "imagefolder", "source": "source", "folder": "out", "num_processes": 1, "on_bad_image": "skip"}
    Path("config.yaml").write_text(json.dumps({"name": "test", "data": data, "stages": {"backbone": {"epochs": 1}}}))
    monkeypatch.setattr(sys, "argv", ["prepare", "--config", "config.yaml"])
    Path("source/loose.txt").touch()
    main()
    printed = capsys.readouterr().out
    assert r"2: b, caf\xe9" in printed
    assert "left out 1 entry that is not an image: .txt file (1)" in printed
    manifest = load_manifest(Path("out"))
    assert manifest.classes == ["b", r"caf\xe9"]
    assert manifest.skipped == [
        {
            "path": r"caf\xe9/caf\xe9.link",
            "reason": r"it is a link to caf\xe9, which cannot be opened (No such file or directory)",
        },
        {"path": r"caf\xe9/caf\xe9.jpg", "reason": "not an image of a known type"},
    ]
    assert all(sample.name.isascii() for sample in Path("out", "samples").iterdir())


def test_errors_show_names_that_are_not_utf_8(latin_1: Path, tmp_path: Path) -> None:
    with pytest.raises(BadImagesError, match=r"source/caf\\xe9/caf\\xe9\.jpg: not an image"):
        prepared(tmp_path / "out", latin_1)
    for image in (latin_1 / LATIN_1).glob("*[!0-9].*"):
        image.unlink()
    prepared(tmp_path / "out", latin_1)
    (latin_1 / LATIN_1 / "000.jpg").unlink()
    with pytest.raises(ChangedInputsError, match=r"1 image removed: caf\\xe9/000\.jpg"):
        prepared(tmp_path / "out", latin_1)


def test_an_image_whose_name_changes_its_unicode_form_is_shown_by_its_escapes(tmp_path: Path) -> None:
    source = write_class_folders(tmp_path / "source", {"a": 3, "b": 3})
    (source / "a" / "000.jpg").rename(source / "a" / "\u00e9.jpg")
    prepared(tmp_path / "out", source)
    (source / "a" / "\u00e9.jpg").rename(source / "a" / "e\u0301.jpg")
    with pytest.raises(ChangedInputsError, match=r"added: 'a/e\\u0301\.jpg'\n  1 image removed: 'a/\\xe9\.jpg'"):
        prepared(tmp_path / "out", source)


def test_a_prepared_folder_that_overlaps_its_source_is_refused_before_anything_is_created(tmp_path: Path) -> None:
    source = write_class_folders(tmp_path / "images" / "source", {"a": 3, "b": 3})
    (tmp_path / "link").symlink_to(source)
    before = sorted(tmp_path.rglob("*"))
    for folder, relation in (
        (source, "is data.source"),
        (source / "prepared", "is inside data.source"),
        (tmp_path / "link" / "prepared", "is inside data.source"),
        (source / "a", "is inside data.source"),
        (tmp_path / "images", "contains data.source"),
    ):
        with pytest.raises(SourceError, match=f"{folder} {relation} {source}; choose a data.folder outside"):
            prepared(folder, source)
    with pytest.raises(SourceError, match=r"is inside data\.source"):
        prepared(source / "prepared", tmp_path / "link")
    other = write_class_folders(tmp_path / "other", {"a": 3, "b": 3})
    with pytest.raises(SourceError, match=r"is inside data\.validation_source"):
        prepared(source / "prepared", other, validation_source=source)
    assert sorted(path for path in tmp_path.rglob("*") if "other" not in path.parts) == before


def test_a_class_that_is_a_link_to_the_prepared_folder_is_refused(tmp_path: Path) -> None:
    source = write_class_folders(tmp_path / "source", {"a": 3, "b": 3})
    (tmp_path / "out").mkdir()
    (source / "c").symlink_to(tmp_path / "out")
    with pytest.raises(SourceError, match=r"out is a folder of data\.source .*source/c; choose"):
        prepared(tmp_path / "out", source)
    assert list((tmp_path / "out").iterdir()) == []


@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(classes=st.lists(names, min_size=4, max_size=4, unique_by=lambda name: shown_name(os.fsdecode(name))))
def test_a_report_is_written_for_classes_of_any_name(classes: list[bytes]) -> None:
    shown = [shown_name(os.fsdecode(name)) for name in classes]
    correct_NR, chosen_N, _ = easy_and_hard(60)
    evaluation = evaluation_of(predictions_of(correct_NR, chosen_N))
    report = build_report(evaluation, classes=shown, attributes={}, name="run", context={})
    assert json.loads(to_json(report).encode())["classes"] == shown
    figures = dict.fromkeys(FIGURES, b"a picture")
    assert render_markdown(report, figures).encode()
    assert render_html(report, figures, figures, []).encode()


@pytest.fixture(scope="module")
def odd_registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a store with a model whose classes have the names of ODD, and with its run's report."""
    folder = tmp_path_factory.mktemp("odd")
    config = make_config(folder)
    run = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", fresh_store(folder, tmp_path_factory))
        manifest = dataclasses.replace(make_manifest(), classes=ODD)
        tracked = open_run(config, run, manifest)
        model, report = finish_run(config, run, make_model(config))
        save_model(model, load_model(model).model, config, classes=ODD)
        (run / "report").mkdir()
        (run / "report" / "report.md").write_text("\n".join(ODD))
        close_run(tracked, "FINISHED", artifacts=run / "report")
        registered = register_model(config, run, model, report)
        assert MlflowClient().list_artifacts(str(tracked.run_id), "report")
        assert registered.is_new
    return f"sqlite:///{folder / 'mlflow.db'}"


ODD = [shown_name(os.fsdecode(name)) for name in (b"caf\xe9", b"a\nb", "cafe\u0301".encode(), b"\xff" * 60, b"'\"<|,")]


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.lists(names, min_size=1, max_size=4, unique=True))
def test_files_of_any_name_are_predicted_with_classes_of_any_name(
    files: list[bytes], odd_registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", odd_registry)
    with TemporaryDirectory() as root:
        paths = [Path(root, os.fsdecode(name)) for name in files]
        for number, path in enumerate(paths):
            path.write_bytes(jpeg(40, 40, seed=number))
        output = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="utf-8", errors="strict"))
        monkeypatch.setattr(sys, "argv", ["predict", "--json", "--model", "models:/drnet/1", *map(str, paths)])
        run_job(predict.main)
        sys.stdout.flush()
        rows = json.loads(output.getvalue())
    assert len(rows) == len(paths)
    assert all(row["error"] is None and row["label"] in ODD for row in rows)
