"""Clients of a model on Ray Serve."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

from tests.unit.pictures import jpeg

TOKEN = "token of sixteen characters or more"
FILES = [jpeg(60, 50, seed=seed) for seed in range(8)]


def ask(
    port: int, body: bytes, kind: str = "image/jpeg", path: str = "/", token: str | None = TOKEN, method: str = "POST"
) -> tuple[int, dict[str, str], Any]:
    """Send a request and return status, headers and the parsed answer."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        authorization = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request(method, path, body, {"Content-Type": kind, **authorization})
        answer = connection.getresponse()
        content = answer.read()
    headers = {name.lower(): value for name, value in answer.getheaders()}
    return answer.status, headers, json.loads(content) if content[:1] == b"{" else content.decode()


class Load:
    """Clients that send images one after another, and remember every answer.

    They repeat a failed request once, after a second. The status of a lost connection is 0.
    """

    def __init__(self) -> None:
        self.answers: list[tuple[int, str, int]] = []
        """status, model and image of each answer, in the order in which they came"""
        self.repeated: list[int] = []
        """statuses of the requests that were repeated because they had failed"""
        self.labels: dict[tuple[str, int], set[str]] = {}

    def statuses(self, since: int = 0) -> set[int]:
        """Return the statuses of the answers, without the first `since`."""
        return {status for status, _, _ in self.answers[since:]}


@contextmanager
def load(port: int, num_clients: int = 4, path: str = "/") -> Iterator[Load]:
    found, over, numbers = Load(), threading.Event(), itertools.count()

    def ask_or_lose(number: int) -> tuple[int, dict[str, str], Any]:
        try:
            return ask(port, FILES[number], path=path)
        except (OSError, http.client.HTTPException):
            return 0, {}, None

    def client() -> None:
        while not over.is_set():
            number = next(numbers) % len(FILES)
            status, headers, content = ask_or_lose(number)
            found.answers.append((status, headers.get("x-model", ""), number))
            if status == 200:
                label = content["predictions"][0]["label"]
                found.labels.setdefault((content["model"], number), set()).add(label)
            else:
                time.sleep(1)
                found.repeated.append(ask_or_lose(number)[0])

    with ThreadPoolExecutor(num_clients) as clients:
        running = [clients.submit(client) for _ in range(num_clients)]
        try:
            yield found
        finally:
            over.set()
            for each in running:
                each.result()
