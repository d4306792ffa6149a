"""pipeline/cluster/connection.py: a wrong RAY_ADDRESS is refused at once, and Ray starts without a home folder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import pytest
import yaml

from pipeline.cluster.connection import HEAD_METHOD, require_head
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://127.0.0.1:8265", "need HOST:PORT"),
        ("ray://127.0.0.1:10001", "need HOST:PORT"),
        ("head", "need HOST:PORT"),
        ("head:", "need HOST:PORT"),
        (":6379", "need HOST:PORT"),
        ("nobody.invalid:6379", "no host nobody.invalid is known"),
        ("127.0.0.1:9", "no connection is possible"),
        ("127.0.0.1:99999", "no connection is possible"),
        ("[::1]:9", "no connection is possible"),
        ("127.0.0.1:8265", "8265 is the port of the dashboard"),
        ("127.0.0.1:10001", "10001 is the port of Ray Client"),
    ],
)
def test_a_wrong_address_is_refused_with_its_reason(address: str, expected: str) -> None:
    with pytest.raises(ConnectionError) as caught:
        require_head(address)
    for words in (f"RAY_ADDRESS is {address}", expected, "HOST:6379", "ray job submit"):
        assert words in str(caught.value)


def test_a_host_that_does_not_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cluster.connection.SECONDS_TO_CONNECT", 0.2)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        waiting = [socket.socket() for _ in range(4)]  # they fill the queue: the next connection gets no answer
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(address)
        with pytest.raises(ConnectionError, match="nothing answers within"):
            require_head(f"127.0.0.1:{address[1]}")
        for each in waiting:
            each.close()


@pytest.fixture
def web_server() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def silent_server() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


TOKEN = "a" * 64


class Service(grpc.GenericRpcHandler):
    """A gRPC service with one method, which needs TOKEN."""

    def __init__(self, method: str):
        self.method = method

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method != self.method:
            return None
        return grpc.unary_unary_rpc_method_handler(self.answer)

    def answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        if ("authorization", f"Bearer {TOKEN}") not in list(context.invocation_metadata()):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "missing or incorrect")
        return request


@pytest.fixture
def grpc_server(request: pytest.FixtureRequest) -> Iterator[int]:
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads, handlers=[Service(request.param)])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield port
        server.stop(None).wait()


@pytest.mark.parametrize("grpc_server", ["/another/Method"], indirect=True)
def test_a_port_where_something_else_listens_is_refused(
    web_server: int, silent_server: int, grpc_server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cluster.connection.SECONDS_TO_ANSWER", 0.5)
    said = "does not answer within 0.5 s: the head is overloaded, or it is something else"
    expected = {web_server: "something else listens there", grpc_server: "something else listens there"}
    for port, words in {**expected, silent_server: f"what listens there {said}"}.items():
        with pytest.raises(ConnectionError, match=f"RAY_ADDRESS is 127.0.0.1:{port}, but {words}"):
            require_head(f"127.0.0.1:{port}")


def test_a_head_with_tls_is_left_to_ray(silent_server: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    require_head(f"127.0.0.1:{silent_server}")
    with pytest.raises(ConnectionError, match="no connection is possible"):
        require_head("127.0.0.1:9")


@pytest.mark.parametrize("grpc_server", [HEAD_METHOD], indirect=True)
def test_a_head_is_accepted_with_its_token(grpc_server: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # is not used within a cluster
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    require_head(f"127.0.0.1:{grpc_server}")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{grpc_server}, whose head refuses this token. Set RAY_AUTH"):
        require_head(f"127.0.0.1:{grpc_server}")
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(ConnectionError, match="whose head needs a token"):
        require_head(f"127.0.0.1:{grpc_server}")


def without_home(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a user without a home folder, who may read everything but write only to open folders."""
    user = []
    if os.geteuid() == 0:
        user = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
        user += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    cleared = ("RAY_", "MLFLOW_TRACKING_URI", "TMPDIR")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(cleared)}
    environment |= {"HOME": "/nonexistent", "RAY_USAGE_STATS_ENABLED": "0", **variables}
    command = (*user, sys.executable, *command)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture
def denied(tmp_path: Path) -> Path:
    """Create a folder that only root can write to."""
    folder = tmp_path / "denied"
    folder.mkdir()
    folder.chmod(0o555)
    return folder


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Create a folder that every user can reach and write to, unlike pytest's own."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


PREPARE = (
    "import os; from pipeline.cluster.connection import _prepare_local_cluster; _prepare_local_cluster();"
    "print(os.environ['RAY_AUTH_TOKEN'], os.environ.get('RAY_TMPDIR'))"
)


def test_without_a_home_ray_gets_its_own_token_and_a_writable_folder(denied: Path) -> None:
    done = without_home("-c", PREPARE)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()[0]) == 64
    done = without_home("-c", PREPARE, TMPDIR=str(denied))
    folder = Path(done.stdout.split()[1])
    assert folder.name.startswith("ray-")
    folder.rmdir()
    done = without_home("-c", PREPARE, RAY_TMPDIR=str(denied))
    assert f"RAY_TMPDIR is {denied}, but this user cannot write to {denied}/ray. Set it" in done.stderr


@pytest.mark.chaos
def test_the_doctor_starts_ray_without_a_home_and_names_what_cannot_be_written(
    denied: Path, open_folder: Path, tmp_path: Path
) -> None:
    runs = open_folder
    data = {"dataset": "glyphs", "folder": str(tmp_path / "data")}
    tree = {"name": "run", "data": data, "stages": {"backbone": {"epochs": 1}}, "cluster": {"storage": str(runs)}}
    said = []
    for store in (runs, denied):
        (tmp_path / "run.yaml").write_text(
            yaml.safe_dump({**tree, "tracking": {"uri": f"sqlite:///{store}/mlflow.db"}})
        )
        done = without_home("-m", "jobs.doctor", "--config", str(tmp_path / "run.yaml"))
        assert done.returncode == 2, done.stderr
        said.append(done.stdout + done.stderr)
    assert ", driver: " in said[0], "Ray has started"
    assert f"{denied} is not a folder that this user may write" in said[1]
    assert not any("Traceback" in text or "Token authentication" in text for text in said)
