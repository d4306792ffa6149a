"""A registered model behind MLflow's server, used as docs/inference.md documents it."""

from __future__ import annotations

import ast
import base64
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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
    """Return the page's code blocks in a language. They name the registered model of these tests, not the demo's."""
    page = PAGE.read_text().replace("drnet-glyphs", "drnet")
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


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
    over_http, in_process, _ = documented("python")
    lines = ran(
        [sys.executable, "-c", over_http.replace(DOCUMENTED_PORT, str(port))], tmp_path, environment
    ).splitlines()
    (expected,) = model.predict(pd.DataFrame({"image": [photo]}), params={"budget_gflops": 0.01}).to_dict("records")
    label, _, resolutions, gflops = ast.literal_eval(lines[0])
    assert (label, resolutions) == (expected["label"], expected["resolutions"])
    assert gflops == pytest.approx(expected["gflops"])
    assert lines[1] == "not a JPEG, PNG, WebP, BMP, TIFF, PPM or AVIF file"
    assert "class " in ran([sys.executable, "-c", in_process], tmp_path, environment)


def test_bad_images_have_a_reason_and_the_server_lives(port, model):
    files = [jpeg(60, 50, seed=1), b"hello", jpeg(60, 50, seed=2), jpeg(60, 50)[:400], b""]
    rows = predictions(port, files)
    expected = model.predict(pd.DataFrame({"image": files}))
    assert [row["label"] for row in rows] == [None if pd.isna(label) else label for label in expected["label"]]
    assert [bool(row["error"]) for row in rows] == [False, True, False, True, True]
    for nonsense in ({"nonsense": 1}, {"dataframe_records": [{"picture": ""}]}):
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


SOUND = base64.b64encode(jpeg(60, 50, seed=1)).decode()
SCALARS = (
    None,
    0,
    -7,
    2.5,
    True,
    "",
    " ",
    "hello",
    "None",
    "\u2603",
    SOUND[:40],
    SOUND[:-9],
    "data:image/jpeg;base64,",
)
NESTED = ([], [1, 2], [SOUND], {}, {"image": SOUND}, [[SOUND, None]])
BAD_BIASES = (math.nan, math.inf, -math.inf, "1", "", [1.0], {}, True, 10**400)
FORMS = {
    "dataframe_records": lambda cells: {"dataframe_records": [{"image": cell} for cell in cells]},
    "dataframe_split": lambda cells: {"dataframe_split": {"columns": ["image"], "data": [[cell] for cell in cells]}},
    "instances": lambda cells: {"instances": cells},
    "instances of records": lambda cells: {"instances": [{"image": cell} for cell in cells]},
    "inputs": lambda cells: {"inputs": cells},
    "inputs of a column": lambda cells: {"inputs": {"image": cells}},
    "inputs of records": lambda cells: {"inputs": [{"image": cell} for cell in cells]},
}
RAW = (
    b"",
    b"null",
    b"[]",
    b"{",
    b"\xff\xfe",
    b'{"inputs": null}',
    b'{"instances": 3}',
    b'{"prompt": "x"}',
    b'{"params": 3}',
)


class Malformed(NamedTuple):
    """A request; `cells` are its images where MLflow's parser passes each of them on, and the parameters are sound."""

    body: bytes
    content_type: str
    cells: list | None


def malformed(count: int, seed: int) -> Iterator[Malformed]:
    rng = random.Random(seed)
    while count:
        count -= 1
        cells = rng.choices(SCALARS, k=rng.randrange(1, 5))
        cells.insert(rng.randrange(len(cells) + 1), SOUND)
        kind = rng.choice([*FORMS, "csv", "raw", "nested", "surrogate", "bias"])
        if kind == "csv":
            texts = ["" if cell is None else str(cell).encode("utf-8", "replace").decode() for cell in cells]
            rows = "".join(f'"{text}"\n' for text in texts)
            yield Malformed(f"image\n{rows}".encode(), "text/csv", [text or None for text in texts])
        elif kind == "raw":
            content_type = rng.choice(["application/json", "text/csv", "image/jpeg", "application/vnd.apache.parquet"])
            body = rng.choice([*RAW, rng.randbytes(rng.randrange(300)), base64.b64decode(SOUND)])
            yield Malformed(body, content_type, None)
        elif kind == "nested":
            form = rng.choice(list(FORMS))
            cells.insert(rng.randrange(len(cells) + 1), rng.choice(NESTED))
            body = json.dumps(FORMS[form](cells)).encode()
            yield Malformed(body, "application/json", cells if form.startswith("dataframe") else None)
        elif kind == "surrogate":
            cells.insert(rng.randrange(len(cells) + 1), "\udcff")
            yield Malformed(json.dumps(FORMS[rng.choice(list(FORMS))](cells)).encode(), "application/json", None)
        elif kind == "bias":
            content = FORMS[rng.choice(list(FORMS))](cells) | {"params": {"budget_bias": rng.choice(BAD_BIASES)}}
            yield Malformed(json.dumps(content).encode(), "application/json", None)
        else:
            yield Malformed(json.dumps(FORMS[kind](cells)).encode(), "application/json", cells)


def test_500_malformed_requests_answer_the_sound_image_and_never_with_status_500(port, model):
    expected = model.predict(pd.DataFrame({"image": [SOUND]}))["label"][0]
    requests = list(malformed(500, seed=0))
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda request: sent(port, request.body, request.content_type), requests))
    for request, (status, content) in zip(requests, answers, strict=True):
        said = (request, content)
        if request.cells is None:
            assert status in (200, 400, 415), said
            continue
        assert status == 200, said
        rows = json.loads(content)["predictions"]
        assert [row["error"] is None for row in rows] == [cell == SOUND for cell in request.cells], said
        assert {row["label"] for row in rows if row["error"] is None} == {expected}, said
    for bias in BAD_BIASES:
        content = {"dataframe_records": [{"image": SOUND}], "params": {"budget_bias": bias}}
        status, content = sent(port, json.dumps(content).encode(), "application/json")
        assert status == 400
        assert b"budget_bias" in content
        assert b"unexpected" not in content
    assert predictions(port, [base64.b64decode(SOUND)])[0]["label"] == expected


def sent(port: int, body: bytes, content_type: str) -> tuple[int, bytes]:
    """Send a request and return the status and the answer."""
    url = f"http://127.0.0.1:{port}/invocations"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": content_type})) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


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
