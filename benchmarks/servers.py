"""Servers for a registered model (MLflow's and Ray Serve's), and clients that send one image per request."""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Self

import numpy as np

from benchmarks.harness import ROOT

NUM_CLIENTS, REQUESTS = 32, 600
START_SECONDS = 300.0
HOST = "127.0.0.1"


class Server:
    """`mlflow models serve` on loopback, with one single-threaded worker process per CPU.

    One process with several threads leaves CPUs idle: Python's work for a request delays its network's thread, and the
    other threads of a layer then wait for it.

    Args:
        model: folder of an MLflow model.
        files: JPEGs, sent in turn.
        threads: number of worker processes, each with one thread.
    """

    path, health, content_type = "/invocations", "/ping", "application/json"

    def __init__(self, model: Path, files: Sequence[bytes], threads: int):
        self.latencies: list[float] = []
        self.statuses: Counter[int] = Counter()
        """How many answers had each status; 0 is none, or an answer with an error."""
        self._bodies = [self.body_of(file) for file in files]
        with closing(socket.socket()) as listener:
            listener.bind((HOST, 0))
            self.port: int = listener.getsockname()[1]
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        self._log = model.with_suffix(f".{type(self).__name__}.log")
        with self._log.open("wb") as log:
            # Use a new session, because the command starts another process, and both must end.
            self.process = subprocess.Popen(
                self.command(model, threads), cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    @property
    def num_errors(self) -> int:
        """The number of answers without status 200."""
        return sum(self.statuses.values()) - self.statuses[200]

    def command(self, model: Path, threads: int) -> list[str]:
        """Return the command that starts the server."""
        command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"]
        return [*command, "--host", HOST, "--port", str(self.port), "--workers", str(threads)]

    def body_of(self, file: bytes) -> bytes:
        """Return the body of a request for one image."""
        rows = [[base64.b64encode(file).decode()]]
        return json.dumps({"dataframe_split": {"columns": ["image"], "data": rows}}).encode()

    def __enter__(self) -> Self:
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise ChildProcessError(f"the server does not answer:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def measure(self, requests: int = REQUESTS) -> float:
        """Return images/s over a number of requests."""
        numbers, started = itertools.count(), time.perf_counter()

        def client() -> None:
            with closing(Client(self)) as connection:
                while (number := next(numbers)) < requests:
                    connection.ask(number)

        clients = [threading.Thread(target=client) for _ in range(NUM_CLIENTS)]
        for each in clients:
            each.start()
        for each in clients:
            each.join()
        return requests / (time.perf_counter() - started)

    def summary(self) -> str:
        """Return the latencies as one line of text."""
        p50, p95, p99 = np.percentile(self.latencies, (50, 95, 99)) * 1e3
        return f"p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms"

    def _answers(self) -> bool:
        try:
            with closing(http.client.HTTPConnection(HOST, self.port, timeout=1)) as connection:
                connection.request("GET", self.health)
                return connection.getresponse().status == 200
        except OSError:
            return False


class RayServer(Server):
    """`python -m jobs.serve` on loopback, with one single-threaded replica per CPU.

    Args:
        model: folder of an MLflow model, next to its SQLite registry `registry.db`, in which it is version 1.
        options: further settings of the serving section, such as max_queued_requests=64.
    """

    path, health, content_type = "/", "/healthz", "image/jpeg"

    def __init__(self, model: Path, files: Sequence[bytes], threads: int, options: Sequence[str] = ()):
        self.options = options
        super().__init__(model, files, threads)

    def command(self, model: Path, threads: int) -> list[str]:
        registry = f"MLFLOW_TRACKING_URI=sqlite:///{model.with_name('registry.db')}"
        command = ["env", registry, sys.executable, "-m", "jobs.serve", "--model", f"models:/{model.name}@champion"]
        settings = (f"port={self.port}", f"min_replicas={threads}", "split=together", *self.options)
        return [*command, *(f"serving.{setting}" for setting in settings)]

    def body_of(self, file: bytes) -> bytes:
        return file

    def __exit__(self, *_: object) -> None:
        """End the server with SIGTERM, so that Ray's processes end too."""
        self.process.terminate()
        try:
            self.process.wait(timeout=START_SECONDS)
        except subprocess.TimeoutExpired:
            super().__exit__()


class Client:
    """A connection that sends one image after another."""

    def __init__(self, server: Server):
        self.server = server
        self._connection = http.client.HTTPConnection(HOST, server.port, timeout=120)

    def ask(self, number: int) -> tuple[int, str]:
        """Send image `number`, and record the latency and the status of the answer.

        Returns:
            The status, or 0 for no answer or an answer with an error; and the model that the answer names.
        """
        server, started = self.server, time.perf_counter()
        body = server._bodies[number % len(server._bodies)]
        status, model = 0, ""
        try:
            if self._connection.sock is None:
                self._connection.connect()
                # http.client sends head and body separately; without this the body waits for an acknowledgement.
                self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connection.request("POST", server.path, body, {"Content-Type": server.content_type})
            answer = self._connection.getresponse()
            content = answer.read()
            status, model = answer.status, answer.headers.get("x-model", "")
            if status == 200 and json.loads(content)["predictions"][0]["error"] is not None:
                status = 0
        except (OSError, ValueError, KeyError, http.client.HTTPException):
            self._connection.close()
        server.latencies.append(time.perf_counter() - started)
        server.statuses[status] += 1
        return status, model

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
