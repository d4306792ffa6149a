"""MLflow servers that are killed, answer 500, lose answers or hang: every value arrives exactly once."""

from __future__ import annotations

import math
import os
import pwd
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.config.schema import Config
from pipeline.tracking import runs
from pipeline.tracking.journal import JOURNAL_FILE, NODE_JOURNALS, Journal
from pipeline.tracking.tracker import RunLogger, close_run, open_run, replay, system_metrics
from tests.chaos.matrix import Row, record
from tests.mlflow_server import Proxy, Server
from tests.unit.tracking_fixtures import free_port, fresh_store, make_config, make_manifest, wait_until

STAGES = ("backbone", "predictor", "joint")


@pytest.fixture
def postgresql() -> Iterator[str]:
    """Start a temporary PostgreSQL cluster; needs Debian's postgresql, which refuses to run as root."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    assert found, "apt-get install postgresql"
    binaries, port = found[-1].parent, free_port()
    user = "postgres" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="drnet-pg-") as folder:
        if user:
            owner = pwd.getpwnam(user)
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        control = [binaries / "pg_ctl", "-D", f"{folder}/data", "-w", "-l", f"{folder}/log"]
        options = f"-c listen_addresses=127.0.0.1 -p {port} -c unix_socket_directories={folder}"

        def command(*arguments: object) -> None:
            done = subprocess.run(
                list(map(str, arguments)), user=user, cwd=folder, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr

        command(binaries / "initdb", "-D", f"{folder}/data", "-U", "drnet", "--auth", "trust")
        command(*control, "-o", options, "start")
        try:
            yield f"postgresql://drnet@127.0.0.1:{port}/postgres"
        finally:
            command(*control, "-m", "immediate", "stop")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.chaos)])
def store(request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "sqlite":
        return fresh_store(tmp_path, tmp_path_factory)
    return request.getfixturevalue("postgresql")


@pytest.fixture
def server(tmp_path: Path, store: str) -> Iterator[Server]:
    server = Server(tmp_path, store)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the server; MLFLOW_TRACKING_URI names it."""
    proxy = Proxy(server.port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    yield proxy
    proxy.close()


def log_epochs(logger: RunLogger, stage: str, first: int, last: int) -> float:
    """Log epochs first to last of a stage; return the seconds of the longest call."""
    longest = 0.0
    for step in range(first, last + 1):
        begun = time.perf_counter()
        logger.metrics(stage, {"loss": 1 / step, "nan": math.nan}, step)
        longest = max(longest, time.perf_counter() - begun)
    return longest


def require_everything_once(config: Config, folder: Path, uri: str, epochs: dict[str, int]) -> None:
    """Require one run with one child per stage and every value of every epoch once, whatever the proxy did."""
    client = MlflowClient(uri)
    run_id = replay(config, folder).run_id
    assert run_id is not None
    assert _num_runs(client) == 1 + len(epochs)
    ids = {run.data.tags[runs.STAGE_TAG]: run.info.run_id for run in runs.children(client, run_id)}
    assert ids.keys() == epochs.keys()
    for stage, last in epochs.items():
        expected = [(step, 1 / step) for step in range(1, last + 1)]
        history = client.get_metric_history(ids[stage], "loss")
        assert sorted((metric.step, metric.value) for metric in history) == expected
        assert len(client.get_metric_history(ids[stage], "nan")) == last
    assert client.get_run(run_id).info.status == "FINISHED"
    for path in folder.glob("journal*.jsonl"):
        assert Journal(folder, path.name).num_pending(uri) == 0


@pytest.mark.slow
def test_a_server_that_fails_in_every_way_has_every_value_once(
    server: Server, proxy: Proxy, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    config, folder = make_config(tmp_path), tmp_path / "runs" / "small"
    proxy.mode = "refuse"
    handle = open_run(config, folder, make_manifest())
    assert handle.run_id is None, "the server is down at the start"
    logger = RunLogger(handle)
    node = Journal(folder, NODE_JOURNALS.replace("*", "node-1"))

    with system_metrics(handle, "node-1"):
        longest = log_epochs(logger, "backbone", 1, 3)
        proxy.mode = "lose"  # requests that create or store something now get a 500 and are retried
        wait_until(lambda: _num_runs(MlflowClient(server.uri)) >= 1, "a run was created whose answer was lost")
        proxy.mode = "hold"
        wait_until(proxy.held.is_set, "the server is held")
        longest = max(longest, log_epochs(logger, "backbone", 4, 5), log_epochs(logger, "predictor", 1, 2))
        assert Journal(folder).num_pending(proxy.uri) > 4, "all of this was logged while the server did not answer"
        proxy.mode = "pass"
        proxy.release.set()
        wait_until(lambda: not Journal(folder).num_pending(proxy.uri), "it has arrived")

        server.kill()
        longest = max(longest, log_epochs(logger, "predictor", 3, 4), log_epochs(logger, "joint", 1, 2))
        before = sum(1 for _ in node.read())
        wait_until(lambda: sum(1 for _ in node.read()) > before + 2, "the node is still measured")
    logger.close()
    (folder / "report").mkdir()
    (folder / "report" / "report.json").write_text("{}")
    close_run(handle, "FINISHED", artifacts=folder / "report")
    assert Journal(folder).num_pending(proxy.uri) > 0, "the server is down at the end"

    server.start()
    # As if the server had died after storing and before answering: everything is sent again.
    (folder / f"{JOURNAL_FILE}.delivered").unlink()
    require_everything_once(config, folder, proxy.uri, dict(zip(STAGES, (5, 4, 2), strict=True)))
    assert list((tmp_path / "artifacts").rglob("report.json"))
    key = "system/node-1/cpu_utilization_percentage"
    steps = [metric.step for metric in MlflowClient(proxy.uri).get_metric_history(_run_id(config, folder), key)]
    assert sorted(steps) == list(range(sum(1 for _ in node.read()))), "no gap is left"
    record(
        Row(
            f"MLflow ({store.partition(':')[0].partition('+')[0]}): 500 at the start, answers lost, no answer, killed, "
            "down at the end",
            "`MLflow at … says: … Values are kept and sent later.`",
            f"every value once after the replay; the longest that training waited for it: {1000 * longest:.0f} ms",
        )
    )


def _num_runs(client: MlflowClient) -> int:
    return sum(len(client.search_runs([each.experiment_id])) for each in client.search_experiments())


def _run_id(config: Config, folder: Path) -> str:
    run_id = replay(config, folder).run_id
    assert run_id is not None
    return run_id
