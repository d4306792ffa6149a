"""Real MLflow servers for tests to kill, and a proxy that fails as networks and servers do."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.unit.tracking_fixtures import free_port, wait_until


class Server:
    """A real `mlflow server` on a store, which can be killed and started again on the same port."""

    def __init__(self, folder: Path, store: str):
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        self._command += ["--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")]
        self._command += ["--workers", "1", "--allowed-hosts", "127.0.0.1:*"]
        self._folder = folder
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=output,
                cwd=self._folder,
                env=environment,
                start_new_session=True,
            )
        wait_until(self._answers, "the server answers")

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return answer.status == 200
        except OSError:
            return False


class Proxy:
    """Stand between clients and a server and handle requests as `mode` says.

    pass: forward and answer. refuse: answer 500 and forward nothing. lose: forward, but answer 500 to requests that
    create or store something. hold: forward once `release` is set, a slow server for tests that do not depend on time.
    """

    def __init__(self, server_port: int):
        self.mode, self.release, self.held = "pass", threading.Event(), threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                mode = proxy.mode
                if mode == "hold":
                    proxy.held.set()
                    proxy.release.wait()
                if mode == "refuse":
                    self.reply(500, b"{}")
                    return
                connection = http.client.HTTPConnection("127.0.0.1", server_port, timeout=60)
                headers = {key: value for key, value in self.headers.items() if key not in ("Host", "Accept-Encoding")}
                try:
                    connection.request(self.command, self.path, body, headers)
                    answer = connection.getresponse()
                    status, content = answer.status, answer.read()
                except (OSError, http.client.HTTPException):
                    status, content = 502, b"{}"
                finally:
                    connection.close()
                lost = mode == "lose" and self.path.endswith(("/create", "/log-batch"))
                self.reply(500 if lost else status, content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

            def reply(self, status: int, content: bytes) -> None:
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    self.close_connection = True  # the client has given up

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
