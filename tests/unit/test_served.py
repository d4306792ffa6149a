"""A registered model behind MLflow's server, used as docs/inference.md documents it."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from pipeline.tracking.registry import open_model
from tests.unit.pictures import jpeg
from tests.unit.tracking_fixtures import free_port, registered_store, wait_until

PAGE = Path(__file__).resolve().parents[2] / "docs" / "inference.md"
DOCUMENTED_PORT = "5001"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    return registered_store(tmp_path_factory)


@pytest.fixture(scope="module")
def environment(store) -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "MLFLOW_TRACKING_URI": store}


@pytest.fixture(scope="module")
def port(environment, tmp_path_factory):
    """The port of a server that the documented command started."""
    number, folder = free_port(), tmp_path_factory.mktemp("served")
    command = documented("bash")[0].replace(DOCUMENTED_PORT, str(number))
    with (folder / "serve.log").open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", command], stdout=output, stderr=output, cwd=folder, env=environment, start_new_session=True
        )
    try:
        wait_until(lambda: process.poll() is not None or answers(number), "the model server answers")
        assert process.poll() is None, (folder / "serve.log").read_text()
        yield number
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def photo(tmp_path) -> bytes:
    file = jpeg(60, 50, seed=1)
    (tmp_path / "photo.jpg").write_bytes(file)
    return file


@pytest.fixture
def model(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    return open_model("models:/drnet@champion")


def documented(language: str) -> list[str]:
    """Returns the page's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def ran(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl_as_documented(port, photo, model, environment, tmp_path):
    command = documented("bash")[1].replace(DOCUMENTED_PORT, str(port))
    (row,) = json.loads(ran(["bash", "-c", command], tmp_path, environment))["predictions"]
    (expected,) = model.predict(pd.DataFrame({"image": [photo]})).to_dict("records")
    shown = json.loads(documented("json")[0])["predictions"][0]
    assert row.keys() == shown.keys()
    assert (row["label"], row["resolution"], row["error"]) == (expected["label"], expected["resolution"], None)
    assert row["probability"] == pytest.approx(expected["probability"], rel=1e-5)


def test_python_as_documented(port, photo, model, environment, tmp_path):
    over_http, in_process = documented("python")
    lines = ran(
        [sys.executable, "-c", over_http.replace(DOCUMENTED_PORT, str(port))], tmp_path, environment
    ).splitlines()
    (expected,) = model.predict(pd.DataFrame({"image": [photo]}), params={"budget_bias": -2.0}).to_dict("records")
    assert lines[0].startswith(f"('{expected['label']}', 0.")
    assert lines[0].endswith(f" {expected['resolution']})")
    assert lines[1] == "not a JPEG or PNG file"
    assert "class " in ran([sys.executable, "-c", in_process], tmp_path, environment)


def test_bad_images_have_a_reason_and_the_server_lives(port, model):
    files = [jpeg(60, 50, seed=1), b"hello", jpeg(60, 50, seed=2), jpeg(60, 50)[:400], b""]
    rows = predictions(port, files)
    expected = model.predict(pd.DataFrame({"image": files}))
    assert [row["label"] for row in rows] == [None if pd.isna(label) else label for label in expected["label"]]
    assert [bool(row["error"]) for row in rows] == [False, True, False, True, True]
    for nonsense in (
        {"nonsense": 1},
        {"dataframe_records": [{"picture": ""}]},
        {"dataframe_records": [{"image": "a"}]},
    ):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            post(port, nonsense)
    assert post(port, {"dataframe_split": {"columns": ["image"], "data": []}})["predictions"] == []
    assert predictions(port, files[:1])[0]["label"] == rows[0]["label"]


def test_many_concurrent_clients_get_their_own_answers(port, model):
    files = [jpeg(60, 50, seed=seed) for seed in range(16)] + [b"hello"]
    expected = model.predict(pd.DataFrame({"image": files}))
    with ThreadPoolExecutor(16) as clients:
        rows = [row for (row,) in clients.map(lambda file: predictions(port, [file]), files * 6)]
    for number, row in enumerate(rows):
        wanted = expected.iloc[number % len(files)]
        assert row["error"] == (None if pd.isna(wanted["error"]) else wanted["error"])
        if row["error"] is None:
            assert (row["label"], row["resolution"]) == (wanted["label"], wanted["resolution"])
            assert row["probability"] == pytest.approx(wanted["probability"], rel=1e-4)


def predictions(port: int, files: list[bytes]) -> list[dict]:
    records = [{"image": base64.b64encode(file).decode()} for file in files]
    return post(port, {"dataframe_records": records})["predictions"]


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=1) as answer:
            return answer.status == 200
    except OSError:
        return False


def post(port: int, content: dict) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
