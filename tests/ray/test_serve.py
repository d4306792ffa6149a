"""A registered model on Ray Serve: same answers, all forms, refusals, a browser, a rollout, and killed replicas."""

from __future__ import annotations

import asyncio
import base64
import importlib
import json
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import psutil
import pytest
from mlflow import MlflowClient
from ray import serve
from ray.serve.schema import ServeDeploySchema

from pipeline.cluster.serve_model import _follow, plan_for, serve_config, serve_model
from pipeline.config.schema import ServingConfig
from pipeline.serving.pyfunc import REQUESTS_AT_ONCE
from pipeline.tracking.registry import open_model, register_model
from pipeline.tracking.store import TrackingError
from tests.chaos.matrix import Row, record
from tests.serve_clients import FILES, TOKEN, ask, load
from tests.unit.browser import CHROMIUM, opened
from tests.unit.tracking_fixtures import finish_run, free_port, fresh_store, make_config, make_model, wait_until

pytestmark = pytest.mark.distributed

SPLIT: dict[str, Any] = {"split": "by_resolution"}
SCALED: dict[str, Any] = {
    **SPLIT,
    "max_replicas": 2,
    "target_ongoing_requests": 1.0,
    "scale_up_seconds": 0.5,
    "scale_down_seconds": 2.0,
}
QUEUED = 16
CHAMPION, SECOND = "models:/drnet@champion", "models:/drnet/2"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Register two versions with different answers."""
    folder = tmp_path_factory.mktemp("registry")
    store = fresh_store(folder, tmp_path_factory)
    config = make_config(folder, tracking={"uri": store})
    model = make_model(config)
    register_model(config, folder / "run", *finish_run(config, folder / "run", model))
    for name, values in model.backbone.named_parameters():
        if "fc" in name.split("."):
            values.data = values.data.flip(0)
    register_model(config, folder / "run", *finish_run(config, folder / "run", model))
    return store


@pytest.fixture(autouse=True)
def address(registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)


def settings(port: int, **changed: Any) -> ServingConfig:
    return ServingConfig(port=port, cpus_per_replica=0.5, max_queued_requests=QUEUED, max_body_mb=1.0, **changed)


@pytest.fixture(scope="module")
def port(ray_cluster: str, registry: str) -> Iterator[int]:
    """Serve the champion from one deployment; the tests below share it, and the rollout replaces it."""
    number = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", registry)
        serve_model(CHAMPION, settings(number, split="together"), TOKEN, show=lambda _: None)
    yield number
    serve.shutdown()


def form_of(files: list[bytes]) -> tuple[bytes, str]:
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="a"; filename="a.jpg"\r\n\r\n' + file + b"\r\n" for file in files
    ]
    return b"".join(parts) + b"--x--\r\n", "multipart/form-data; boundary=x"


def json_of(files: list[bytes], **params: float) -> tuple[bytes, str]:
    records = [{"image": base64.b64encode(file).decode()} for file in files]
    return json.dumps({"dataframe_records": records, "params": params}).encode(), "application/json"


def require_answers(found: list[dict], files: list[bytes], model: str, **params: float) -> None:
    """Require the rows of the registered model for these files."""
    frame = open_model(model).predict(pd.DataFrame({"image": files}), params=params or None)
    expected = frame.astype(object).where(frame.notna(), None).to_dict("records")
    for row, other in zip(found, expected, strict=True):
        assert row | {"probability": 0} == other | {"probability": 0}
        assert row["probability"] == (other["probability"] and pytest.approx(other["probability"], rel=1e-4))


def test_every_form_gets_the_answers_of_the_registered_model(port: int) -> None:
    files = [*FILES, b"hello", b""]
    for body, kind in (form_of(files), json_of(files)):
        status, headers, content = ask(port, body, kind)
        assert (status, headers["x-model"], content["model"]) == (200, "models:/drnet/1", "models:/drnet/1")
        require_answers(content["predictions"], files, CHAMPION)
    status, _, content = ask(port, FILES[0], path="/invocations")
    assert status == 200
    require_answers(content["predictions"], FILES[:1], CHAMPION)


def test_an_address_a_header_and_mlflows_parameters_pick_the_policy(port: int) -> None:
    wanted = {"budget_gflops": 0.025}
    _, _, content = ask(port, *form_of(FILES), path="/?budget=0.025")
    require_answers(content["predictions"], FILES, CHAMPION, **wanted)
    assert {row["resolutions"] for row in content["predictions"]} == {"32,48"}, "the cascade escalates"
    assert ask(port, *json_of(FILES, **wanted))[2] == content
    for side in ("48", "32"):
        status, _, content = ask(port, FILES[0], path=f"/?policy={side}")
        assert (status, content["predictions"][0]["resolutions"]) == (200, side)


@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        ({"body": b"hello"}, 400, "not a JPEG, PNG, WebP, BMP, TIFF, PPM or AVIF file"),
        ({"body": FILES[0][:400]}, 400, "runcated"),
        ({"body": b"", "path": "/?policy=40"}, 400, "policy is '40'; give one of registered, predictor, 48, 32"),
        ({"body": FILES[0], "path": "/?budget=0.001"}, 400, "give at least 0.01"),
        ({"body": FILES[0], "path": "/?budget=1&policy=48"}, 400, "contradict"),
        ({"body": b"{", "kind": "application/json"}, 400, "not JSON"),
        ({"body": FILES[0], "token": None}, 401, "Authorization: Bearer TOKEN"),
        ({"body": FILES[0], "token": "another"}, 401, "Authorization: Bearer TOKEN"),
        ({"body": b"", "method": "GET", "path": "/model", "token": None}, 401, "Authorization: Bearer TOKEN"),
        ({"body": bytes(1_000_001)}, 413, "larger than 1 MB"),
        ({"body": FILES[0], "kind": "text/csv"}, 415, "content type is text/csv"),
        ({"body": FILES[0], "path": "/nowhere"}, 404, "the addresses are"),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_a_refusal_has_a_reason(port: int, request_: dict, status: int, reason: str) -> None:
    found, headers, content = ask(port, **request_)
    assert (found, headers["x-model"]) == (status, "models:/drnet/1")
    assert reason in content["error"]


def test_a_description_and_a_health_check(port: int) -> None:
    status, _, about = ask(port, b"", method="GET", path="/model")
    assert status == 200
    assert (about["name"], about["version"], about["split"]) == ("drnet", "1", "together")
    assert (about["resolutions"], len(about["classes"]), len(about["policies"])) == ([48, 32], 5, 3)
    assert ask(port, b"", method="GET", path="/healthz", token=None)[::2] == (200, "ok")


def test_beyond_the_queue_a_request_is_refused_and_later_answered(port: int) -> None:
    """Requests whose body does not arrive occupy the replica and then the queue."""
    head = f"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
    with ExitStack() as connections:
        held: list[socket.socket] = []
        refused: list[socket.socket] = []
        while not refused and len(held) < 2 * (REQUESTS_AT_ONCE + QUEUED):
            held.append(connections.enter_context(socket.create_connection(("127.0.0.1", port))))
            held[-1].sendall(head)
            is_full = len(held) > REQUESTS_AT_ONCE + QUEUED
            refused, _, _ = select.select(held, [], [], 2.0 if is_full else 0.0)
        assert len(held) > REQUESTS_AT_ONCE
        answer = refused[0].recv(65_536).decode().lower()
    assert answer.startswith("http/1.1 503"), answer
    assert "retry-after: 1" in answer
    assert "traceback" not in answer
    wait_until(lambda: ask(port, FILES[0])[0] == 200, "the queue is empty")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_in_a_browser_shows_the_answer_and_each_resolutions(port: int, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(FILES[0])
    (tmp_path / "text.jpg").write_bytes(b"hello")
    (tmp_path / "profile").mkdir()
    (row,) = ask(port, FILES[0], path="/?budget=0.025")[2]["predictions"]

    async def visit() -> tuple[str, list[str], str]:
        async with opened(f"http://127.0.0.1:{port}/", tmp_path / "profile") as page:
            await page.until("!document.getElementById('token-field').hidden")
            await page.value(f"$('token').value = {TOKEN!r}; $('token').dispatchEvent(new Event('change'))")
            await page.until("$('policy').options.length === 4")
            await page.value("$('policy').selectedIndex = 2")
            await page.choose_file("#file", tmp_path / "photo.jpg")
            await page.until("document.body.dataset.state === 'answered'")
            answer = await page.value("$('answer').innerText")
            rows = await page.value("[...document.querySelectorAll('#each tr')].map(row => row.innerText)")
            if folder := os.environ.get("DRNET_SCREENSHOTS"):
                picture = await page.call("Page.captureScreenshot")
                Path(folder, "page.png").write_bytes(base64.b64decode(picture["data"]))
            await page.choose_file("#file", tmp_path / "text.jpg")
            await page.until("document.body.dataset.state === 'failed'")
            return answer, rows, await page.value("$('error').innerText")

    answer, rows, error = asyncio.run(visit())
    assert row["label"] in answer
    assert f"answered at {row['resolution']} px, ran at 32 px, then 48 px" in answer
    for side, text in zip(("48", "32"), rows, strict=True):
        (alone,) = ask(port, FILES[0], path=f"/?policy={side}")[2]["predictions"]
        assert text.split("\t")[:3] == [f"{side} px", alone["label"], f"{100 * alone['probability']:.1f} %"]
    assert error == "not a JPEG, PNG, WebP, BMP, TIFF, PPM or AVIF file"


def replicas(deployment: str) -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [each for each in found if "ServeReplica" in (line := " ".join(each.cmdline())) and deployment in line]


def test_a_rollout_under_load_fails_no_request_and_names_the_version(port: int, registry: str) -> None:
    """The alias moves to version 2, which also runs in another split, so both change at once."""
    said: list[str] = []
    client = MlflowClient(registry)
    first = plan_for(CHAMPION, settings(port, **SPLIT), TOKEN)
    with load(port) as during:
        wait_until(lambda: len(during.answers) > 8, "clients are served")
        assert _follow(first, CHAMPION, TOKEN, said.append, set()) is first
        client.set_registered_model_alias("drnet", "champion", "2")
        try:
            second = _follow(first, CHAMPION, TOKEN, said.append, set())
        finally:
            client.set_registered_model_alias("drnet", "champion", "1")
        since = len(during.answers)
        wait_until(lambda: len(during.answers) > since + 16, "the new version answers")
    assert second.router.model == SECOND
    assert said == [
        f"{CHAMPION} is {SECOND} now; rolling it out",
        f"{SECOND} answers at http://127.0.0.1:{port}",
    ]
    assert during.statuses() == {200}
    record(
        Row(
            "another version and split rolled out under load", "nothing", f"{len(during.answers)} requests, none failed"
        )
    )
    assert {model for _, model, _ in during.answers[:8]} == {"models:/drnet/1"}
    assert {model for _, model, _ in during.answers[since + 8 :]} == {"models:/drnet/2"}
    for version in ("models:/drnet/1", "models:/drnet/2"):
        labels = open_model(version).predict(pd.DataFrame({"image": FILES}))["label"].tolist()
        seen = {number: found for (model, number), found in during.labels.items() if model == version}
        assert seen == {number: {labels[number]} for number in seen}
        assert seen
    status, _, content = ask(port, *form_of([*FILES, b"hello"]), path="/?budget=0.025")
    assert status == 200
    require_answers(content["predictions"], [*FILES, b"hello"], SECOND, budget_gflops=0.025)


def num_running(app: str) -> int:
    return serve.status().applications[app].deployments["Resolution"].replica_states.get("RUNNING", 0)


@pytest.mark.chaos
def test_replicas_follow_the_shares_of_the_traffic(port: int) -> None:
    """Depends on the rollout of version 2. Lets each resolution have two replicas, and at the end one again."""
    serve_model(SECOND, settings(port, **SCALED), TOKEN, show=lambda _: None)
    try:
        for side, other in ((48, 32), (32, 48)):
            with load(port, 8, f"/?policy={side}") as during:
                wait_until(lambda side=side: num_running(f"drnet v2 {side}px") == 2, f"{side} px has two replicas")
                wait_until(lambda other=other: num_running(f"drnet v2 {other}px") == 1, f"{other} px has one replica")
            assert during.statuses() == {200}
    finally:
        serve_model(SECOND, settings(port, **SPLIT), TOKEN, show=lambda _: None)
    outcome = "replicas follow in both directions; every request is answered"
    record(Row("all traffic moves to one resolution, then to another", "slower answers for seconds", outcome))


def test_a_killed_replica_of_a_resolution_loses_no_answer(port: int) -> None:
    """Depends on the rollout, which splits the model."""
    with load(port) as during:
        wait_until(lambda: len(during.answers) > 8, "clients are served")
        killed = replicas("Resolution")
        assert len(killed) >= 2
        for each in killed:
            each.send_signal(signal.SIGKILL)
        psutil.wait_procs(killed)
        since, started = len(during.answers), time.monotonic()
        wait_until(lambda: len(during.answers) > since + 16, "new replicas answer")
        seconds = time.monotonic() - started
    assert during.statuses() == {200}
    outcome = f"{len(during.answers)} requests, all answered, none repeated by its client"
    record(Row("all replicas of all resolutions killed under load", "requests wait", outcome, seconds))


@pytest.mark.chaos
def test_a_killed_router_is_replaced(port: int) -> None:
    killed = replicas("Router")
    assert killed
    for each in killed:
        each.send_signal(signal.SIGKILL)
    psutil.wait_procs(killed)
    started = time.monotonic()
    wait_until(lambda: ask(port, FILES[0])[0] == 200, "a new router answers")
    record(Row("all routers killed", "errors, or a wait", "the next requests are answered", time.monotonic() - started))


def test_a_lost_registry_changes_nothing(port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Depends on the rollout of version 2."""
    said: list[str] = []
    running = plan_for(SECOND, settings(port, **SPLIT), TOKEN)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/gone.db")
    assert _follow(running, CHAMPION, TOKEN, said.append, set()) is running
    assert len(said) == 1
    assert said[0].startswith(f"{SECOND} keeps running: {tmp_path}/gone.db does not exist")
    assert ask(port, FILES[0])[1]["x-model"] == SECOND


@pytest.mark.chaos
def test_after_a_version_that_does_not_start_serve_runs_the_older_one_again(
    port: int, registry: str, tmp_path: Path
) -> None:
    """Version 3 lacks its predictor, so its resolutions start and its router does not."""
    said: list[str] = []
    running = plan_for(SECOND, settings(port, **SPLIT), TOKEN)
    model = Path(mlflow.artifacts.download_artifacts(artifact_uri=SECOND, dst_path=str(tmp_path / "model")))
    next(model.rglob("predictor.pt2")).unlink()
    client = MlflowClient(registry)
    broken = client.create_model_version("drnet", str(model)).version
    client.set_registered_model_alias("drnet", "champion", broken)
    failed: set[str] = set()
    try:
        assert _follow(running, CHAMPION, TOKEN, said.append, failed) is running
        num_messages = len(said)
        assert _follow(running, CHAMPION, TOKEN, said.append, failed) is running
        assert len(said) == num_messages, "a version that failed is not tried again at once"
    finally:
        client.set_registered_model_alias("drnet", "champion", "1")
    assert said[0] == f"{CHAMPION} is models:/drnet/{broken} now; rolling it out"
    assert said[1].startswith(f"{SECOND} keeps running: the replicas of models:/drnet/{broken} do not start: ")
    assert said[2:] == [f"{SECOND} answers at http://127.0.0.1:{port}"]
    applications = serve.status().applications
    assert {name: about.status for name, about in applications.items() if about.status != "DELETING"} == {
        "drnet": "RUNNING",
        "drnet v2 48px": "RUNNING",
        "drnet v2 32px": "RUNNING",
    }
    assert ask(port, FILES[0])[1]["x-model"] == SECOND
    record(Row("a new version whose replicas do not start", "one message", "the older version answers again"))


def test_a_version_of_an_older_register_is_refused_and_one_without_policies_is_not(
    registry: str, tmp_path: Path
) -> None:
    model = Path(mlflow.artifacts.download_artifacts(artifact_uri="models:/drnet/1", dst_path=str(tmp_path / "model")))
    (meta,) = model.rglob("meta.json")
    about = json.loads(meta.read_text())
    client = MlflowClient(registry)
    client.create_registered_model("other")

    def without(key: str) -> str:
        meta.write_text(json.dumps({name: value for name, value in about.items() if name != key}))
        return f"models:/other/{client.create_model_version('other', str(model)).version}"

    assert not plan_for(without("policies"), settings(8000), TOKEN).has_policies
    with pytest.raises(TrackingError, match=r"an older jobs\.register created it\. Register its run again"):
        plan_for(without("format"), settings(8000), TOKEN)
    assert plan_for(CHAMPION, settings(8000), TOKEN).has_policies


def test_mistakes_are_reported_before_anything_changes(port: int) -> None:
    other = settings(free_port())
    with pytest.raises(ValueError, match=rf"listens at 127\.0\.0\.1:{port} already"):
        serve_model(CHAMPION, other, TOKEN)
    with pytest.raises(ValueError, match="need 60 CPUs, but there are 4"):
        serve_model(CHAMPION, settings(port, min_replicas=120), TOKEN)
    with pytest.raises(TrackingError, match="no model is named 'nothing'"):
        serve_model("models:/nothing@champion", other, TOKEN)
    assert ask(port, FILES[0])[0] == 200


def test_the_configuration_for_serve_deploy_is_one(registry: str) -> None:
    plan = plan_for(SECOND, settings(8000, split="by_resolution"), TOKEN)
    config = serve_config(plan)
    schema = ServeDeploySchema.model_validate(config)
    assert [app.name for app in schema.applications] == ["drnet v2 48px", "drnet v2 32px", "drnet"]
    assert [app.route_prefix for app in schema.applications] == [None, None, "/"]
    assert TOKEN not in json.dumps(config)
    for app in schema.applications:
        module, _, name = app.import_path.partition(":")
        built = getattr(importlib.import_module(module), name)(app.args)
        assert isinstance(built, serve.Application)
