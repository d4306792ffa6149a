"""Nodes that share only a network and the run's storage: `ray start` in separate namespaces.

Each node has its own network stack, and its own disk for downloaded data.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from benchmarks.namespaces import Network
from datasets.beton import MANIFEST
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import Config
from pipeline.tracking.journal import NODE_JOURNALS
from tests.chaos.matrix import Row, record
from tests.chaos.runs import Driver, config_of, require_same
from tests.unit.tracking_fixtures import wait_until

pytestmark = [pytest.mark.distributed, pytest.mark.chaos]

SUBNET = "10.213.77"
PORT = 6399
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", "--block"]
STORE = ["--object-store-memory", str(100 * 1024**2)]


class Nodes:
    """A cluster on a bridge: a head that runs no training, and nodes of one CPU in separate namespaces."""

    def __init__(self, stack: ExitStack, disk: Path):
        self.disk, self.processes = disk, []
        self.address, self.log = f"{SUBNET}.1:{PORT}", disk.with_suffix(".log")
        network = Network(stack, SUBNET)
        stack.callback(self.stop)
        head = ["--head", "--port", str(PORT), "--node-ip-address", f"{SUBNET}.1", "--num-cpus", "0"]
        self.start([*RAY, *head, *STORE, "--include-dashboard", "false"])
        self.wait_for(1)  # a node that finds no head exits after a while
        for number in (2, 3):
            space = network.join(number)
            node = ["--address", self.address, "--node-ip-address", f"{SUBNET}.{number}", "--num-cpus", "1"]
            # /tmp/ray too: nodes that start at the same time in one folder can use each other's sockets.
            own_disk = 'mount -t tmpfs -o size=64m tmpfs "$0" && mount -t tmpfs tmpfs /tmp/ray && exec "$@"'
            inside = ["ip", "netns", "exec", space, "unshare", "--mount", "sh", "-c", own_disk, str(disk)]
            self.start([*inside, *RAY, *node, *STORE])
        self.wait_for(3)

    def start(self, command: list[str]) -> None:
        # Gloo resolves the host name, which is the machine's in every namespace.
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0"}
        with self.log.open("ab") as log:
            self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def wait_for(self, count: int) -> None:
        """Wait until `count` nodes have joined; raise AssertionError if one exited."""

        def joined() -> bool:
            assert all(process.poll() is None for process in self.processes), self.log.read_text(errors="replace")
            return _joined(self.address, count)

        wait_until(joined, f"{count} nodes have joined")

    def stop(self) -> None:
        """Kill the nodes and their child processes."""
        mine = [psutil.Process(process.pid) for process in self.processes if process.poll() is None]
        started = [child for process in mine for child in process.children(recursive=True)]
        for process in [*started, *mine]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self.processes:
            process.wait()

    def staged(self) -> list[str]:
        """Return the manifest on each node's own disk, read through its process."""
        found = []
        for process in self.processes[1:]:
            path = Path(f"/proc/{process.pid}/root{self.disk}") / MANIFEST
            found.append(path.read_text())
        return found


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.5")
    disk = tmp_path / "disk"
    disk.mkdir()
    with ExitStack() as stack:
        yield Nodes(stack, disk)


def test_nodes_in_namespaces_train_together_and_each_downloads_the_data(
    undisturbed: Config, nodes: Nodes, folder: Path
) -> None:
    data = {"folder": str(nodes.disk), "uri": (folder / "data").as_uri()}
    config = config_of(folder, "namespaces", data=data)
    driver = Driver(config, nodes.address)
    assert driver.ended() == 0, driver.output
    require_same(config, undisturbed)
    here, *there = [(nodes.disk / MANIFEST).read_text(), *nodes.staged()]
    assert there == [here, here], "each node has downloaded the data to its own disk"
    measured = {path.name for path in RunFolder.of(config).path.glob(NODE_JOURNALS)}
    assert measured == {"journal-node-0.jsonl", "journal-node-1.jsonl"}
    outcome = "same result; each node downloads the data once"
    record(Row("two nodes in network and mount namespaces (no fault)", "nothing", outcome))


def _joined(address: str, count: int) -> bool:
    """Return whether Ray reports at least `count` nodes alive."""
    look = (
        "import ray; ray.init(logging_level='ERROR')\n"
        f"raise SystemExit(len([node for node in ray.nodes() if node['Alive']]) < {count})"
    )
    environment = {**os.environ, "RAY_ADDRESS": address}
    done = subprocess.run([sys.executable, "-c", look], env=environment, capture_output=True, check=False, timeout=120)
    return done.returncode == 0
