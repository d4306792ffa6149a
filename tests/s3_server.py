"""An S3 server (moto) in a separate process, with a log of its requests."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SECONDS_TO_ANSWER = 60


@dataclass
class S3Server:
    """A running server: `address` gives a URI in its bucket; `requests` the requests since the last call."""

    port: int
    lines: queue.Queue[str] = field(repr=False)
    num_marks: int = 0

    def address(self, folder: str, user: str = "") -> str:
        return f"s3://{user}bucket/{folder}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def requests(self) -> list[str]:
        """Return the requests in order, such as "GET /bucket/folder/file HTTP/1.1"."""
        self.num_marks += 1
        mark = f"/moto-api/?mark={self.num_marks}"
        self.send("GET", mark)
        lines = []
        while mark not in (line := self.lines.get(timeout=SECONDS_TO_ANSWER)):
            lines.append(line)
        return lines

    @contextmanager
    def rejecting(self) -> Iterator[None]:
        """Deny all access: keys and signatures are checked, and no key is known."""
        self.send("POST", "/moto-api/reset-auth", b"0")
        try:
            yield
        finally:
            self.send("POST", "/moto-api/reset-auth", b"inf")

    def send(self, method: str, path: str, data: bytes | None = None) -> None:
        url, headers = f"http://127.0.0.1:{self.port}{path}", {"Content-Type": "text/plain"}
        request = urllib.request.Request(url, data, headers, method=method)
        urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER).close()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start a server on a free port with an empty bucket."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines: queue.Queue[str] = queue.Queue()
        port = next(int(line.rsplit(":", 1)[1]) for line in process.stderr if "Running on" in line)
        reader = threading.Thread(target=lambda: [lines.put(line) for line in process.stderr or ()])
        reader.start()
        try:
            server = S3Server(port, lines)
            server.send("PUT", "/bucket")
            yield server
        finally:
            process.terminate()
            reader.join()
