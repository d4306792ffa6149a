"""MLflow's server for a registered model, and clients that send one image in each request."""

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
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

NUM_CLIENTS, REQUESTS = 32, 2000
START_SECONDS = 180.0
_HOST = "127.0.0.1"


class Server:
    """Runs `mlflow models serve` on loopback, with one single-threaded worker process for each CPU.

    One process with several threads leaves CPUs idle: Python's work for a request delays its network's thread, and the
    other threads of a layer then wait for it.

    Args:
        model: the folder of an MLflow model.
        files: JPEGs, sent in turn.
        threads: the number of worker processes, which have one thread each.
    """

    def __init__(self, model: Path, files: Sequence[bytes], threads: int):
        self.latencies: list[float] = []
        self.num_errors = 0
        self._bodies = [
            json.dumps(
                {"dataframe_split": {"columns": ["image"], "data": [[base64.b64encode(file).decode()]]}}
            ).encode()
            for file in files
        ]
        with closing(socket.socket()) as listener:
            listener.bind((_HOST, 0))
            self.port: int = listener.getsockname()[1]
        command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"]
        command += ["--host", _HOST, "--port", str(self.port), "--workers", str(threads)]
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        self._log = model.with_suffix(".log")
        with self._log.open("wb") as log:
            # A session of its own: the command starts another process, and both must end.
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def __enter__(self) -> Server:
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise ChildProcessError(f"mlflow models serve does not answer:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def measure(self) -> float:
        """Returns images/s over REQUESTS requests."""
        numbers, started = itertools.count(), time.perf_counter()
        clients = [threading.Thread(target=self._client, args=(numbers,)) for _ in range(NUM_CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        return REQUESTS / (time.perf_counter() - started)

    def summary(self) -> str:
        p50, p95, p99 = np.percentile(self.latencies, (50, 95, 99)) * 1e3
        return f"p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms"

    def _client(self, numbers: itertools.count[int]) -> None:
        with closing(http.client.HTTPConnection(_HOST, self.port, timeout=120)) as connection:
            while (number := next(numbers)) < REQUESTS:
                started = time.perf_counter()
                try:
                    body = self._bodies[number % len(self._bodies)]
                    connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
                    (answer,) = json.loads(connection.getresponse().read())["predictions"]
                    self.num_errors += answer["error"] is not None
                except (OSError, ValueError, KeyError, http.client.HTTPException):
                    self.num_errors += 1
                    connection.close()
                self.latencies.append(time.perf_counter() - started)

    def _answers(self) -> bool:
        try:
            with closing(http.client.HTTPConnection(_HOST, self.port, timeout=1)) as connection:
                connection.request("GET", "/ping")
                return connection.getresponse().status == 200
        except OSError:
            return False
