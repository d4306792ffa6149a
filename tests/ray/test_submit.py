"""`ray job submit --working-dir .` to a head with token authentication."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_nodes

from datasets.prepare.prepare import prepare
from datasets.sources.glyphs import GlyphSettings
from pipeline.cluster.signals import WAIT_VARIABLE
from pipeline.training.checkpoint import load_model
from tests.small import tree_of
from tests.unit.tracking_fixtures import free_ports

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A cluster of one node with a dashboard, started by `ray start`."""

    client: JobSubmissionClient
    environment: dict[str, str]
    gcs_port: int
    metrics_port: int
    folder: Path

    def gauges(self) -> set[str]:
        """Return the names of this project's metrics that Prometheus would find now."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics") as answer:
            return set(re.findall(r"^(ray_drnet_\w+){", answer.read().decode(), re.MULTILINE))

    def submit(self, *command: str, wait: bool = True) -> tuple[str, str]:
        """Run `ray job submit` and return the job's id and, if `wait`, its log."""
        job = f"job-{len(self.client.list_jobs())}"
        options = ["--submission-id", job, "--no-wait", "--working-dir", "."]
        self._ray("job", "submit", *options, "--", "python", "-m", *command)
        if wait:
            until(lambda: self.client.get_job_status(job).is_terminal())
        return job, self.client.get_job_logs(job) if wait else ""

    def stop(self, job: str) -> str:
        """Run `ray job stop` and return the job's log."""
        self._ray("job", "stop", job)
        return self.client.get_job_logs(job)

    def _ray(self, *words: str) -> None:
        subprocess.run([BIN / "ray", *words], cwd=ROOT, env=self.environment, check=True, timeout=SECONDS)


def until(done: Callable[[], bool]) -> None:
    """Wait until `done`; fail after SECONDS."""
    never = threading.Event()
    for _ in range(SECONDS * 5):
        if done():
            return
        never.wait(0.2)
    pytest.fail(f"nothing after {SECONDS} s")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Start a head of 2 CPUs with its own ports and folders; jobs find this environment's Python."""
    gcs, dashboard, agent, agent_grpc, metrics, client = free_ports(6)
    token = tmp_path_factory.mktemp("token") / "auth_token"
    token.touch(mode=0o600)
    token.write_text(os.environ["RAY_AUTH_TOKEN"])  # this process connects to several heads with one token
    # The token is in a file here, and MLflow writes its last address into the environment.
    unwanted = ("RAY_AUTH_TOKEN", "MLFLOW_TRACKING_URI")
    environment = {key: value for key, value in os.environ.items() if key not in unwanted}
    environment |= {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        WAIT_VARIABLE: "120",
        "RAY_metrics_report_interval_ms": "1000",
    }
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # paths of sockets have at most 107 bytes
    options = f"""--head --num-cpus=2 --temp-dir={folder} --port={gcs} --dashboard-host=127.0.0.1
        --dashboard-port={dashboard} --ray-client-server-port={client} --metrics-export-port={metrics}
        --dashboard-agent-listen-port={agent} --dashboard-agent-grpc-port={agent_grpc}"""
    try:
        with started(options, environment, folder / "head.log"):
            yield Head(connected(environment["RAY_API_SERVER_ADDRESS"]), environment, gcs, metrics, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def started(options: str, environment: dict[str, str], log: Path) -> Iterator[None]:
    """Run `ray start` with these options until the body ends."""
    shared = ["--block", "--object-store-memory=150000000", "--min-worker-port=0", "--max-worker-port=0"]
    with log.open("w") as file:
        command = [str(BIN / "ray"), "start", *options.split(), *shared]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        yield
    finally:
        print(f"`ray start` {'is running' if process.poll() is None else 'has exited'}: {log.read_text()[-3000:]}")
        with suppress(psutil.NoSuchProcess):  # after SIGTERM, `ray start` would wait half a minute for its processes
            for each in (*psutil.Process(process.pid).children(recursive=True), process):
                each.kill()
        process.wait(SECONDS)


def connected(address: str) -> JobSubmissionClient:
    clients: list[JobSubmissionClient] = []

    def connect() -> bool:
        try:
            clients.append(JobSubmissionClient(address))
            clients[0].list_jobs()
        except (ConnectionError, RuntimeError):
            clients.clear()
        return bool(clients)

    until(connect)
    return clients[0]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Prepare data, and write the configuration of a run that takes seconds."""
    routed = {"epochs": 1, "alpha_gflops": 0.0012, "lr": 0.01}
    tree = tree_of(
        tmp_path,
        name="letters",
        training={"batch_size": 20, "checkpoint_steps": 5},
        stages={"backbone": {"epochs": 3, "lr": 0.02}, "joint": routed},
        cluster={"num_workers": 2, "cpus_per_worker": 1, "storage": str(tmp_path / "runs")},
    )
    config = tmp_path / "letters.yaml"
    config.write_text(yaml.safe_dump(tree))
    prepare("glyphs", tmp_path / "data", glyphs=GlyphSettings(400, 50, 64), num_processes=1)
    return config


def test_a_submitted_job_trains_and_shows_its_metrics(head: Head, config: Path, tmp_path: Path) -> None:
    trained, _ = head.submit("jobs.train", "--config", str(config), wait=False)
    shown = {"ray_drnet_epochs_done", "ray_drnet_accuracy", "ray_drnet_share"}
    until(lambda: head.gauges() >= shown or head.client.get_job_status(trained).is_terminal())
    assert head.gauges() >= shown
    until(lambda: head.client.get_job_status(trained).is_terminal())
    log = head.client.get_job_logs(trained)
    assert head.client.get_job_status(trained) == JobStatus.SUCCEEDED, log
    assert "report:" in log
    assert load_model(tmp_path / "runs" / "letters" / "model.pt").classes
    assert (tmp_path / "runs" / "mlflow.db").exists(), "it outlives the job"


@pytest.mark.chaos
def test_a_stopped_job_resumes(head: Head, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "letters"
    trained, _ = head.submit("jobs.train", "--config", str(config), wait=False)
    until(lambda: any(run.glob("checkpoint_0*/state.pt")) or head.client.get_job_status(trained).is_terminal())
    log = head.stop(trained)
    assert head.client.get_job_status(trained) == JobStatus.STOPPED, log
    assert "stopped after checkpoint_" in log, log
    last = log.rpartition("stopped after ")[2].split(";")[0]
    assert (run / last / "state.pt").exists()

    trained, log = head.submit("jobs.train", "--config", str(config))
    assert head.client.get_job_status(trained) == JobStatus.SUCCEEDED, log
    assert "report:" in log
    assert load_model(run / "model.pt").classes


@pytest.mark.chaos
def test_a_job_that_is_refused_has_failed(head: Head) -> None:
    refused, log = head.submit("jobs.train", "--config", "glyphs")
    assert head.client.get_job_status(refused) == JobStatus.FAILED
    assert "data.folder is data/glyphs, in the package of this Ray job" in log


@pytest.mark.chaos
def test_the_doctor_checks_every_node(head: Head, tmp_path: Path) -> None:
    prepare("glyphs", tmp_path / "data", glyphs=GlyphSettings(20, 10, 32), num_processes=1)
    agent, agent_grpc, metrics = free_ports(3)
    options = f"""--address=127.0.0.1:{head.gcs_port} --node-ip-address=127.0.0.2 --num-cpus=1
        --metrics-export-port={metrics} --dashboard-agent-listen-port={agent}
        --dashboard-agent-grpc-port={agent_grpc}"""
    folders = [f"data.folder={tmp_path / 'data'}", f"cluster.storage={tmp_path / 'runs'}"]
    fitting = ["cluster.num_workers=3", "training.batch_size=33"]
    with started(options, head.environment, head.folder / "node.log"):
        until(lambda: len(list_nodes(address=head.environment["RAY_API_SERVER_ADDRESS"])) == 2)
        well, log = head.submit("jobs.doctor", "--config", "glyphs", *folders, *fitting)
        assert head.client.get_job_status(well) == JobStatus.SUCCEEDED, log
        assert "(127.0.0.2): 1 CPUs" in log
        assert ", driver: 2 CPUs" in log
        assert "No problems" in log
        assert list((tmp_path / "runs").iterdir()) == []
        ill, log = head.submit(
            "jobs.doctor", "--config", "glyphs", folders[1], f"data.folder={tmp_path / 'no'}", "cluster.num_workers=4"
        )
        assert head.client.get_job_status(ill) == JobStatus.FAILED
        assert "the cluster has 2 problems" in log
        assert "but there is room for 3" in log
        assert "jobs.prepare" in log
