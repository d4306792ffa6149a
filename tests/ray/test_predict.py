"""A large prediction on a real Ray cluster: killed, resumed, and equal to predicting file by file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import psutil
import pyarrow.parquet as pq
import pytest

from pipeline.cluster.predict_folder import Actors, OutputFolder, divide_resources, predict_folder
from pipeline.serving.package import classify_files
from pipeline.tracking.registry import open_model, register_model
from tests.chaos.runs import ray_processes
from tests.unit.pictures import jpeg
from tests.unit.tracking_fixtures import finish_run, fresh_store, make_config, make_model, wait_until

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
NUM_FILES = 240
BAD = {"050.jpg": b"hello", "051.jpg": b""}
MODEL = "models:/drnet@champion"


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("registry")
    store = fresh_store(folder, tmp_path_factory)
    config = make_config(folder, tracking={"uri": store})
    register_model(config, folder / "run", *finish_run(config, folder / "run", make_model(config)))
    return store


@pytest.fixture(autouse=True)
def address(registry, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(NUM_FILES):
        (folder / f"{number:03d}.jpg").write_bytes(jpeg(60, 50, seed=number))
    for name, content in BAD.items():
        (folder / name).write_bytes(content)
    return folder


def parts_in(out: Path) -> dict[str, int]:
    """Return the name and modification time of every part."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}


@contextmanager
def killing_an_actor(num_parts: int, out: Path) -> Iterator[None]:
    """Kill an actor as soon as `out` has more than `num_parts` parts; fail if the body ends before."""
    killed, over = threading.Event(), threading.Event()

    def kill_an_actor() -> None:
        while not over.wait(0.02):
            if len(parts_in(out)) > num_parts and (actors := ray_processes("PartPredictor")):
                actors[0].kill()
                killed.set()
                return

    killer = threading.Thread(target=kill_an_actor)
    killer.start()
    try:
        yield
    finally:
        over.set()
        killer.join()
    assert killed.is_set(), "the prediction ended before an actor could be killed"


def check_rows(images: Path, out: Path) -> None:
    """Check that every file has the row that it has when it is classified alone."""
    rows = pq.read_table(out).to_pylist()
    paths = sorted(images.iterdir())
    assert [row["file"] for row in rows] == [path.name for path in paths]
    assert {row["file"] for row in rows if row["error"]} == set(BAD)
    expected = list(classify_files(open_model(MODEL), paths))
    for row, alone in zip(rows, expected, strict=True):
        assert row["label"] == alone["label"]
        assert row["resolution"] == alone["resolution"]
        assert row["probability"] == (alone["probability"] and pytest.approx(alone["probability"], rel=1e-4))


def test_a_folder_is_predicted_once(images: Path, tmp_path: Path, ray_cluster: str) -> None:
    out = tmp_path / "out"
    said = predict_folder(MODEL, images, out, files_per_part=60, show_progress=False)
    assert said.startswith("240 files, 2 of them with an error; ")
    assert OutputFolder(out).list_file.exists()
    check_rows(images, out)
    before = parts_in(out)
    assert predict_folder(MODEL, images, out, files_per_part=60, show_progress=False) == said
    assert parts_in(out) == before, "nothing is left to do"
    with pytest.raises(ValueError, match="files_per_part: 60 -> 3"):
        predict_folder(MODEL, images, out, files_per_part=3, show_progress=False)


@pytest.mark.chaos
def test_a_killed_driver_and_a_killed_actor_lose_no_row(images: Path, tmp_path: Path, ray_cluster: str) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "jobs.predict", "--model", MODEL, str(images), "--out", str(out)]
    command += ["--files-per-part", "2"]
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster}
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        wait_until(lambda: driver.poll() is not None or parts_in(out), "the first part is written")
        actors = ray_processes("PartPredictor")
        driver.kill()
        driver.wait()
    finally:
        driver.kill()
    assert driver.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    psutil.wait_procs(actors)  # Ray ends the actors of a dead driver; until then they may write
    before = parts_in(out)
    assert 0 < len(before) < NUM_FILES / 2
    (out / ".part-000000.parquet.1.partial").write_bytes(b"half")

    with killing_an_actor(len(before), out):
        said = predict_folder(MODEL, images, out, files_per_part=2, show_progress=False)
    after = parts_in(out)
    assert len(after) == NUM_FILES / 2
    assert {name: after[name] for name in before} == before, "existing parts are not computed again"
    assert not list(out.glob("*.partial"))
    assert said.startswith("240 files, 2 of them with an error; ")
    check_rows(images, out)
    assert predict_folder(MODEL, images, out, files_per_part=2, show_progress=False) == said
    assert parts_in(out) == after, "nothing is left to do"


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([{"CPU": 2}], Actors(1, 2, 0)),
        ([{"CPU": 16}, {"CPU": 10}, {}], Actors(6, 4, 0)),
        ([{"CPU": 64}, {"CPU": 2}], Actors(33, 2, 0)),
        ([{"CPU": 0}, {"CPU": 1}], Actors(1, 1, 0)),
        ([{"CPU": 16, "GPU": 4}, {"CPU": 12, "GPU": 2}, {"CPU": 64}], Actors(6, 4, 1)),
        ([{"CPU": 2, "GPU": 4}], Actors(4, 1, 1)),
    ],
)
def test_actors_fit_the_nodes(nodes, expected):
    assert divide_resources(nodes) == expected


def test_a_model_that_cannot_be_loaded_gives_one_message(images: Path, tmp_path: Path, ray_cluster: str) -> None:
    """The model exists, but every actor fails. The message says why, and that the same command resumes."""
    local = Path(mlflow.artifacts.download_artifacts(artifact_uri="models:/drnet/1", dst_path=str(tmp_path / "model")))
    (program,) = local.rglob("predictor.pt2")
    program.write_bytes(b"no program")
    with pytest.raises(
        ChildProcessError, match=r"(?s)a part could not be computed.*rerun the same command; it resumes"
    ):
        predict_folder(str(local), images, tmp_path / "out", files_per_part=60, show_progress=False)
    assert parts_in(tmp_path / "out") == {}
