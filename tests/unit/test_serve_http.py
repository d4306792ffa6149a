"""What jobs.serve understands of a request, and what it refuses, without a server."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from starlette.requests import Request

from pipeline.cluster.serve_model import _require_free_port, choose_split, read_token
from pipeline.config.load import ConfigError, load_serving
from pipeline.config.schema import ServingConfig
from pipeline.serving.deployments import Call, Served
from pipeline.serving.http import (
    LimitedRequest,
    RefusedError,
    UnavailableError,
    build_app,
    check_token,
    digest_of,
    images_of,
    parse_json,
    wanted_policy,
)
from pipeline.serving.runtime import Answer

TEXT = base64.b64encode(b"image").decode()


def request(
    body: list[bytes] | None = None, query: str = "", headers: dict[str, str] | None = None, max_bytes: int = 100
) -> LimitedRequest:
    """Return a request whose body arrives in these chunks; reading beyond them is an error."""
    chunks = list(body or [b""])

    async def receive() -> dict:
        chunk = chunks.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}

    named = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    found = LimitedRequest({"type": "http", "query_string": query.encode(), "headers": named}, receive)
    found.max_bytes = max_bytes
    return found


def read(found: Request) -> tuple:
    return asyncio.run(images_of(found))


@pytest.mark.parametrize(
    ("content", "images"),
    [
        ({"dataframe_records": [{"image": TEXT}, {"picture": 1}]}, [TEXT, None]),
        ({"dataframe_split": {"columns": ["n", "image"], "data": [[1, TEXT], [2]]}}, [TEXT, None]),
        ({"instances": [TEXT, {"image": TEXT}, 3]}, [TEXT, TEXT, 3]),
        ({"inputs": {"image": [TEXT]}}, [TEXT]),
        ({"inputs": []}, []),
    ],
)
def test_every_form_of_mlflows_json_gives_its_images(content, images):
    assert parse_json(json.dumps(content).encode()) == (images, {})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "give one of dataframe_records"),
        (b'{"inputs": [], "instances": []}', "instances and inputs; give one"),
        (b'{"instances": 3}', "instances is int; give a list"),
        (b'{"dataframe_records": [3]}', "needs records"),
        (b'{"dataframe_split": {"columns": ["picture"], "data": []}}', "needs \"columns\" with 'image'"),
        (b'{"instances": [], "params": 3}', "params is int"),
        (b'{"instances": [], "params": {"budget": 1}}', "'budget' is unknown; give one of budget_bias, budget_gflops"),
    ],
)
def test_other_json_is_refused_with_a_reason(body, reason):
    with pytest.raises(RefusedError, match=reason) as refused:
        parse_json(body)
    assert refused.value.status == 400


def test_the_bytes_of_an_image_and_a_form_of_several():
    assert read(request([b"im", b"age"], headers={"content-type": "image/jpeg"})) == ([b"image"], {}, True)
    assert read(request([b"image"])) == ([b"image"], {}, True)
    part = "--x\r\nContent-Disposition: form-data; name={}; filename=a.jpg\r\n\r\n{}\r\n"
    form = (part.format("a", "one") + part.format("b", "two") + "--x--\r\n").encode()
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert read(request([form[:50], form[50:]], headers=headers, max_bytes=1000)) == ([b"one", b"two"], {}, False)
    for body, reason in ((form.replace(b"; filename=a.jpg", b""), "field 'a' is text"), (b"hello", "cannot be read")):
        with pytest.raises(RefusedError, match=reason) as refused:
            read(request([body], headers=headers, max_bytes=1000))
        assert refused.value.status == 400
    with pytest.raises(RefusedError, match="content type is text/csv") as refused:
        read(request([b"image"], headers={"content-type": "text/csv"}))
    assert refused.value.status == 415


@pytest.mark.parametrize("kind", ["image/jpeg", "application/json", "multipart/form-data; boundary=x"])
def test_a_body_over_the_limit_is_refused_before_it_is_read(kind):
    """The chunks after the one that exceeds the limit stay unread."""
    start = b"--x\r\nContent-Disposition: form-data; name=a; filename=b\r\n\r\n"
    endless = request([start, *[b"image" * 10] * 5], headers={"content-type": kind})
    declared = request([b""], headers={"content-type": kind, "content-length": "101"})
    for found in (endless, declared):
        with pytest.raises(RefusedError, match=r"larger than 0\.0001 MB") as refused:
            read(found)
        assert refused.value.status == 413
    rest = asyncio.run(endless.receive())
    assert rest["more_body"], "the request is read to its end"


def test_the_address_or_a_header_names_the_policy():
    assert wanted_policy(request(query="budget=1.5")) == (None, {"budget_gflops": 1.5})
    assert wanted_policy(request(headers={"x-max-accuracy-drop": "1"})) == (None, {"max_accuracy_drop": 1.0})
    assert wanted_policy(request(query="policy=224", headers={"x-budget": "2"})) == ("224", {"budget_gflops": 2.0})
    for query, reason in (("budgt=1", "'budgt' is unknown; give one of budget"), ("budget=low", "budget is 'low'")):
        with pytest.raises(RefusedError, match=reason):
            wanted_policy(request(query=query))


def test_a_token_is_compared_by_its_digest():
    digest = digest_of("s" * 16)
    check_token(request(), None)
    check_token(request(headers={"authorization": f"bearer {'s' * 16}"}), digest)
    for wrong in (
        {},
        {"authorization": "s" * 16},
        {"authorization": "Bearer t"},
        {"authorization": f"Bearer {digest}"},
    ):
        with pytest.raises(RefusedError) as refused:
            check_token(request(headers=wrong), digest)
        assert refused.value.status == 401


def test_the_token_comes_from_the_environment_or_a_file(monkeypatch, tmp_path):
    monkeypatch.delenv("DRNET_SERVE_TOKEN", raising=False)
    assert read_token() is None
    (tmp_path / "token").write_text("f" * 20 + "\n")
    monkeypatch.setenv("DRNET_SERVE_TOKEN_FILE", str(tmp_path / "token"))
    assert read_token() == "f" * 20
    monkeypatch.setenv("DRNET_SERVE_TOKEN", "e" * 20 + "\n")
    assert read_token() == "e" * 20
    for token, reason in (
        ("short", "has 5 characters. Give at least 16"),
        ("\n", "has 0 characters"),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}" * 20, "not printable ASCII. Use `openssl rand"),
        ("two\nlines of a token", "not printable ASCII"),
    ):
        monkeypatch.setenv("DRNET_SERVE_TOKEN", token)
        with pytest.raises(ValueError, match=reason):
            read_token()


class Model:
    """A served model whose answers the test gives."""

    address = "models:/caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{GREEK SMALL LETTER ALPHA}/3"

    def __init__(self, classify: Callable[[threading.Event], list]):
        self._classify = classify

    def about(self) -> dict:
        return {}

    def policy(self, name: str | None, params: Mapping[str, float]) -> Any:
        if params:
            raise ValueError("there is no such policy")

    def classify(self, images: Sequence[Any], policy: Any, stop: threading.Event) -> list:
        return self._classify(stop)


async def asked(model: Model, pool: ThreadPoolExecutor, **scope: Any) -> tuple[int, dict[bytes, bytes], dict]:
    """Send a request with a short body to a model's application. Return status, headers and JSON."""
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": b"image"}

    async def send(message: dict) -> None:
        sent.append(message)

    request = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []} | scope
    await build_app(model, pool, 100, None)(request, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), json.loads(sent[1]["body"])


def test_every_response_names_a_model_of_any_name_in_a_header():
    row = Answer(class_index=0)
    with ThreadPoolExecutor(1) as pool:
        for scope, expected in (({}, 200), ({"query_string": b"budget=x"}, 400), ({"path": "/nowhere"}, 404)):
            status, headers, content = asyncio.run(asked(Model(lambda _: [row]), pool, **scope))
            assert (status, content["model"]) == (expected, Model.address)
            assert headers[b"x-model"] == b"models:/caf%C3%A9%20%CE%B1/3"


def test_only_a_mistake_in_a_request_is_answered_with_400():
    def fail(_: threading.Event) -> list:
        raise ValueError("the model has a defect")

    with ThreadPoolExecutor(1) as pool:
        status, _, content = asyncio.run(asked(Model(fail), pool, query_string=b"budget=1"))
        assert (status, content["error"]) == (400, "there is no such policy")
        status, _, content = asyncio.run(asked(Model(fail), pool))
        assert (status, content["error"]) == (500, "the server failed; its log says why")


def test_the_work_of_a_cancelled_request_stops():
    started, stopped = threading.Event(), threading.Event()

    def classify(stop: threading.Event) -> list:
        started.set()
        if stop.wait(10):
            stopped.set()
        return []

    async def cancel(pool: ThreadPoolExecutor) -> None:
        task = asyncio.create_task(asked(Model(classify), pool))
        await asyncio.to_thread(started.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(cancel(pool))
    assert stopped.is_set()


class Silent:
    """A handle of a deployment that never answers, and the response to its one call."""

    def __init__(self) -> None:
        self.logits, self.is_cancelled = self, False

    def remote(self, crops: NDArray[np.uint8]) -> Silent:
        return self

    def result(self, timeout_s: float) -> None:
        raise TimeoutError

    def cancel(self) -> None:
        self.is_cancelled = True


def test_a_resolution_that_does_not_answer_is_given_up():
    silent: Any = Silent()
    with pytest.raises(UnavailableError, match="does not answer within 60 s"):
        Call(silent, np.zeros((1, 8, 8, 3), np.uint8)).rows()
    assert silent.is_cancelled


def test_only_a_replica_that_reserves_a_gpu_uses_one():
    alone, split = Served(model="models:/a/1"), Served(model="models:/a/1", split="by_resolution")
    with_gpus = {"serving": ServingConfig(gpus_per_replica=0.5, precision="bfloat16")}
    assert alone.placement == {"device": "cpu", "precision": "float32", "compiled": False}
    served = alone.model_copy(update=with_gpus)
    assert served.placement == {"device": "auto", "precision": "bfloat16", "compiled": False}
    served = split.model_copy(update=with_gpus)
    assert (served.num_gpus, served.placement["device"]) == (0, "cpu")
    part = served.model_copy(update={"resolution": 48})
    assert (part.num_gpus, part.placement["device"]) == (0.5, "auto")


@pytest.mark.parametrize(
    ("section", "num_resolutions", "num_gpus", "split"),
    [
        ({}, 3, 8, "together"),
        ({"gpus_per_replica": 1}, 3, 3, "by_resolution"),
        ({"gpus_per_replica": 1}, 3, 2, "together"),
        ({"gpus_per_replica": 1, "min_replicas": 2}, 3, 5, "together"),
        ({"gpus_per_replica": 0.25}, 3, 1, "by_resolution"),
        ({"gpus_per_replica": 1}, 1, 8, "together"),
        ({"split": "by_resolution"}, 3, 0, "by_resolution"),
    ],
)
def test_resolutions_are_apart_where_each_has_a_gpu(section, num_resolutions, num_gpus, split):
    assert choose_split(ServingConfig(**section), num_resolutions, num_gpus) == split


def test_a_port_in_use_is_named_before_anything_starts():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} of 127\.0\.0\.1 cannot be used .*Set serving\.port"):
            _require_free_port(ServingConfig(port=port))
    _require_free_port(ServingConfig(port=port))


def test_the_section_is_read_without_a_configuration():
    assert load_serving(["serving.port=9000", "serving.split=together"]).port == 9000
    with pytest.raises(ConfigError, match=r"(?s)'name=a' belongs to a configuration; add --config"):
        load_serving(["name=a"])
    with pytest.raises(ConfigError, match=r"serving\.prt is not a known key. Did you mean serving\.port"):
        load_serving(["serving.prt=1"])
    with pytest.raises(ConfigError, match="max_replicas 1 is less than min_replicas 2"):
        load_serving(["serving.min_replicas=2", "serving.max_replicas=1"])
