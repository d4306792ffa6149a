"""bench serve: a registered model on Ray Serve against `mlflow models serve` with one process per core.

Then the same server is measured with broken images, at three times its rate, with killed replicas and during a rollout.
These results are notes.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
from mlflow import MlflowClient

from benchmarks.harness import Row, compare, progress
from benchmarks.inference import build_model
from benchmarks.photographs import write_photographs
from benchmarks.servers import START_SECONDS, Client, RayServer, Server
from pipeline.serving.package import save_pyfunc

NETWORKS = ("resnet18", "resnet50")
NUM_IMAGES = 128
SECONDS = float(os.environ.get("DRNET_BENCH_SECONDS", "60"))
"""The duration of each disturbance in seconds."""
NUM_MIXED, BROKEN_SHARE = 10_000, 0.01
SECONDS_BETWEEN_KILLS = 10.0
NUM_OVERLOADING = 300
"""The number of clients that overload the server."""


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """Measure both servers in turns for each network, then disturb Ray Serve's. Return rows and notes."""
    rows, notes = [], []
    with TemporaryDirectory(prefix="bench-serve-") as scratch:
        photographs = write_photographs(Path(scratch) / "images", images, NUM_IMAGES)
        files = [path.read_bytes() for path in sorted(photographs.rglob("*.jpg"))]
        for network in NETWORKS:
            model = registered(Path(scratch), network)
            with RayServer(model, files, threads) as ours, Server(model, files, threads) as peer:
                for server in (ours, peer):
                    server.measure()
                    server.latencies.clear()
                name = f"{network} on Ray Serve, 32 clients of one image a request, against mlflow models serve"
                rows.append(compare(name, "images/s", ours.measure, peer.measure, runs))
                progress(f"{name}: {rows[-1].ours:.1f} against {rows[-1].peer:.1f}, ratio {rows[-1].ratio:.2f}")
                notes += [
                    f"{network}, {what}: {server.summary()}, {server.num_errors} errors"
                    for what, server in (("Ray Serve", ours), ("MLflow", peer))
                ]
        model = registered(Path(scratch), "resnet18", versions=2)
        for disturbance in (broken_images, overload, killed_replicas, rollout):
            notes.append(disturbance(model, files, threads))
            progress(notes[-1])
    return rows, notes


def registered(scratch: Path, network: str, versions: int = 1) -> Path:
    """Return the folder of a model that is registered under the folder's name, with the first version as champion."""
    model = scratch / network
    if not model.exists():
        save_pyfunc(build_model(network), model)
    client = MlflowClient(f"sqlite:///{scratch / 'registry.db'}")
    if not client.search_registered_models(f"name = '{network}'"):
        client.create_registered_model(network)
    for _ in range(versions - len(client.search_model_versions(f"name = '{network}'"))):
        client.create_model_version(network, str(model))
    client.set_registered_model_alias(network, "champion", "1")
    return model


def broken_images(model: Path, files: list[bytes], threads: int) -> str:
    """Send 10,000 requests, of which 1 % contain half an image."""
    mixed = [file[: len(file) // 2] if n % int(1 / BROKEN_SHARE) == 0 else file for n, file in enumerate(files * 8)]
    with RayServer(model, mixed, threads) as server:
        server.measure(NUM_MIXED)
    return f"{NUM_MIXED:,} requests, 1 % of them broken images: statuses {_shown(server.statuses)}"


def overload(model: Path, files: list[bytes], threads: int) -> str:
    """Send requests at three times the rate that the server can handle, then from a single client."""
    with RayServer(model, files, threads, ("max_queued_requests=64",)) as server:
        rate = server.measure()
        server.latencies.clear()
        server.statuses.clear()
        memory = [_memory(server)]
        interval, slots = 1 / (3 * rate), itertools.count()
        until = time.monotonic() + SECONDS
        started = time.monotonic()

        def send(_: int) -> None:
            with closing(Client(server)) as client:
                while (due := started + interval * next(slots)) < until:
                    time.sleep(max(0.0, due - time.monotonic()))
                    client.ask(int(due / interval))

        with ThreadPoolExecutor(NUM_OVERLOADING) as clients:
            sending = [clients.submit(send, n) for n in range(NUM_OVERLOADING)]
            for part in (1, 2, 3):
                time.sleep(max(0.0, started + part * SECONDS / 3 - time.monotonic()))
                memory.append(_memory(server))
            for each in sending:
                each.result()
        statuses = _shown(server.statuses)
        server.latencies.clear()
        normal, calm = time.monotonic(), float("nan")
        with closing(Client(server)) as client:
            while time.monotonic() < normal + 30:
                began = time.monotonic()
                if client.ask(0)[0] == 200 and time.monotonic() - began < 5 / rate * threads:
                    calm = time.monotonic() - normal
                    break
    gigabytes = ", ".join(f"{each:.2f}" for each in memory)
    return (
        f"three times {rate:.0f} images/s for {SECONDS:.0f} s: statuses {statuses}; memory {gigabytes} GB at the start "
        f"and after each third; back to the usual time of a request after {calm:.1f} s"
    )


def killed_replicas(model: Path, files: list[bytes], threads: int) -> str:
    """Send from clients that repeat a failed request once, while a replica is killed every 10 s."""
    with RayServer(model, files, threads) as server:
        killed = 0

        def disturb(over: threading.Event) -> None:
            nonlocal killed
            while not over.wait(SECONDS_BETWEEN_KILLS):
                replicas = [each for each in _processes(server) if "ServeReplica" in " ".join(each.cmdline())]
                if replicas:
                    replicas[killed % len(replicas)].send_signal(signal.SIGKILL)
                    killed += 1

        first, second = _disturbed(server, disturb)
    repeated = f"of the repeated requests {_shown(second)}" if second else "no request had to be repeated"
    return f"{killed} replicas killed in {SECONDS:.0f} s: statuses {_shown(first)}; {repeated}"


def rollout(model: Path, files: list[bytes], threads: int) -> str:
    """Send from clients while the alias moves to another version."""
    client = MlflowClient(f"sqlite:///{model.with_name('registry.db')}")
    with FollowingServer(model, files, threads, ("follow_seconds=2",)) as server:

        def disturb(over: threading.Event) -> None:
            over.wait(SECONDS / 4)
            client.set_registered_model_alias(model.name, "champion", "2")
            over.wait()

        newest = f"models:/{model.name}/2"
        first, _ = _disturbed(server, disturb, done=lambda: server.models[newest] > 100)
    return f"a rollout: statuses {_shown(first)}, models {_shown(server.models)}"


class FollowingServer(RayServer):
    """A server that follows its alias."""

    def __init__(self, model: Path, files: Sequence[bytes], threads: int, options: Sequence[str] = ()):
        self.models: Counter[str] = Counter()
        super().__init__(model, files, threads, options)

    def command(self, model: Path, threads: int) -> list[str]:
        return [*super().command(model, threads), "--follow-alias"]


def _disturbed(
    server: Server, disturb: Callable[[threading.Event], None], done: Callable[[], bool] = lambda: True
) -> tuple[Counter[int], Counter[int]]:
    """Send for SECONDS and until `done` while `disturb` runs. Return the statuses of first and of repeated requests."""
    over, first, second, numbers = threading.Event(), Counter[int](), Counter[int](), itertools.count()

    def send(_: int) -> None:
        with closing(Client(server)) as client:
            while not over.is_set():
                number = next(numbers)
                status, model = client.ask(number)
                first[status] += 1
                if isinstance(server, FollowingServer):
                    server.models[model] += 1
                if status != 200:
                    time.sleep(1)
                    second[client.ask(number)[0]] += 1

    with ThreadPoolExecutor(17) as pool:
        sending = [pool.submit(send, n) for n in range(16)]
        disturbing = pool.submit(disturb, over)
        started = time.monotonic()
        while (passed := time.monotonic() - started) < SECONDS or (not done() and passed < START_SECONDS):
            time.sleep(0.2)
        over.set()
        for each in (*sending, disturbing):
            each.result()
    return first, second


def _processes(server: RayServer) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def _memory(server: RayServer) -> float:
    """Return the unique memory of the server's processes, in GB."""
    return float(np.sum([each.memory_full_info().uss for each in _processes(server)])) / 1e9


def _shown(counts: Counter) -> str:
    return ", ".join(
        f"{key or 'none'}: {count:,}" for key, count in sorted(counts.items(), key=lambda item: str(item[0]))
    )
