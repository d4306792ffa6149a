"""Addresses of MLflow servers and stores: quoting, checks before training, and what the doctor asks."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.fields import sqlite_address, sqlite_path
from pipeline.tracking import store
from pipeline.tracking.registry import open_model, register_model
from pipeline.tracking.store import TrackingError, connect, server_problem, tracking_uri
from pipeline.tracking.tracker import close_run, open_run
from tests.unit.tracking_fixtures import finish_run, free_port, fresh_store, make_config, make_manifest, make_model

ODD_NAMES = ("a%20b?x", "h#x sp ace", "50% ü;+&=@:")


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_every_path_survives_its_address(name):
    path = Path("/data") / name.lstrip("/")
    assert sqlite_path(sqlite_address(path)) == path
    assert sqlite_path(f"{sqlite_address(path)}?timeout=30") == path


def test_an_address_is_read_as_sqlalchemy_reads_it():
    assert sqlite_address(Path("/data/mlflow.db")) == "sqlite:////data/mlflow.db"
    assert sqlite_path("sqlite:///mlflow.db") == Path("mlflow.db")
    assert sqlite_path("sqlite:////a%20b/m.db") == Path("/a b/m.db")
    assert sqlite_path("http://host:5000") is None


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_store_is_written_where_its_path_says(name, tmp_path, tmp_path_factory, monkeypatch):
    folder = tmp_path / name
    folder.mkdir()
    fresh_store(folder, tmp_path_factory)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_address(folder / "mlflow.db"))
    config = make_config(tmp_path)
    handle = open_run(config, tmp_path / "run", make_manifest())
    client = connect(handle.uri)
    assert client.get_run(handle.run_id).info.run_name == "small"
    client.log_text(handle.run_id, "hello", "said.txt")
    assert [path.read_text() for path in folder.rglob("said.txt")] == ["hello"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "run"])
    assert server_problem(handle.uri) is None


def test_a_model_is_registered_and_loaded_from_a_folder_with_reserved_characters(
    tmp_path, tmp_path_factory, monkeypatch
):
    project = tmp_path / "50%20?x"
    project.mkdir()
    fresh_store(project, tmp_path_factory)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(store, "PROJECT_FOLDER", project)
    config = make_config(tmp_path)
    registered = register_model(config, project / "run", *finish_run(config, project / "run", make_model(config)))
    assert open_model(registered.uri).metadata is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["50%20?x"]


def test_a_ray_jobs_default_store_is_in_the_storage_of_any_name(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    package = tmp_path / "working_dir_files" / "_ray_pkg_1"
    package.mkdir(parents=True)
    monkeypatch.setattr(store, "PROJECT_FOLDER", package)
    config = make_config(tmp_path, cluster={"storage": str(tmp_path / "a%20b?c")})
    assert store.sqlite_file(tracking_uri(config)) == tmp_path / "a%20b?c" / "mlflow.db"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("mysql://user:secret@host/x", r"MySQLdb is missing.*pip install mysqlclient"),
        ("mssql://user:secret@host/x", r"pyodbc is missing.*pip install pyodbc"),
        ("postgresql+pg8000://user:secret@host/x", r"pg8000 is missing.*pip install pg8000"),
        ("postgresql+nothing://user:secret@host/x", r"dialects:postgresql\.nothing.*sqlite:///FILE"),
        ("postgresql://user:secret@host:port/x", r"'port'.*sqlite:///FILE"),
        ("sqlite://mlflow.db", "three slashes"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite://", "three slashes"),
        ("sqlite:///", "names no file"),
        ("sqlite+aiosqlite:///x.db", "give sqlite:///FILE"),
        ("http:///x", "names no host"),
        ("http://host:abc", "names no host and port"),
        ("databricks", r"configure the Databricks CLI"),
        ("file:///runs", "does not support this kind"),
        ("./mlruns", "does not support this kind"),
    ],
)
def test_an_address_that_cannot_work_is_refused_before_training(uri, message, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match=message) as raised:
        open_run(make_config(tmp_path), tmp_path / "run", make_manifest())
    assert "secret" not in str(raised.value)
    assert not (tmp_path / "run").exists()
    problem = server_problem(uri)
    assert problem
    assert "secret" not in problem


def test_the_postgresql_driver_is_installed(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user@host/x")
    assert tracking_uri() == "postgresql://user@host/x"


def test_a_file_that_is_not_a_store_is_refused(tmp_path, monkeypatch):
    (tmp_path / "text.db").write_text("no database at all")
    (tmp_path / "empty.db").touch()
    latin = tmp_path / os.fsdecode(b"b\xff")
    latin.mkdir()
    for path, message in (
        (tmp_path / "text.db", "cannot be used as a SQLite database .*not a database"),
        (tmp_path, "is a folder; give a file in it"),
        (tmp_path / "text.db" / "below.db", "not a folder that this user may write"),
        (latin / "mlflow.db", "is not UTF-8"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_address(path))
        with pytest.raises(TrackingError, match=message) as raised:
            tracking_uri()
        str(raised.value).encode()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_address(tmp_path / "empty.db"))
    assert tracking_uri() == sqlite_address(tmp_path / "empty.db")


def test_a_damaged_store_fails_the_start_at_once(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", fresh_store(tmp_path, tmp_path_factory))
    file = tmp_path / "mlflow.db"
    file.write_bytes(file.read_bytes()[:100] + b"\xff" * 5000)
    for read in (tracking_uri, lambda: connect(sqlite_address(file))):
        with pytest.raises(TrackingError, match=r"malformed|not a database"):
            read()
    assert "database" in str(server_problem(sqlite_address(file)))


def test_a_database_that_does_not_answer_is_reported_at_once(tmp_path, monkeypatch, caplog):
    uri = f"postgresql://me:secret@127.0.0.1:{free_port()}/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    handle = open_run(make_config(tmp_path), tmp_path / "run", make_manifest())
    assert handle.run_id is None
    assert "Training continues. 1 records wait" in caplog.text
    caplog.clear()
    close_run(handle, "FINISHED")
    assert " 2 records wait in" in caplog.text
    assert "Training continues" not in caplog.text
    problem = str(server_problem(uri))
    assert "onnection refused" in problem
    assert "secret" not in problem + caplog.text


def test_a_locked_store_is_not_reported_as_damaged(tmp_path, tmp_path_factory, monkeypatch):
    uri = f"{fresh_store(tmp_path, tmp_path_factory)}?timeout=0.1"
    with sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert tracking_uri() == uri
        assert "locked" in str(server_problem(uri))
    assert server_problem(uri) is None
