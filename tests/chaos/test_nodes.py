"""Nodes that die, and runs that continue with fewer workers, on clusters of several nodes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import Config
from tests.chaos.matrix import Row, record
from tests.chaos.runs import config_of, require_same
from tests.conftest import ROOT
from tests.unit.tracking_fixtures import registered_store

pytestmark = [pytest.mark.distributed, pytest.mark.chaos]


@pytest.fixture(scope="module")
def results(folder: Path, undisturbed: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.chaos.nodes", str(folder), registered_store(tmp_path_factory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "results.json").read_text())


def test_a_lost_and_replaced_node_does_not_change_the_result(
    results: dict[str, Any], folder: Path, undisturbed: Config
) -> None:
    """The result also shows that two nodes compute the same as two workers on one node."""
    found = results["lost_and_replaced"]
    require_same(config_of(folder, "node-lost"), undisturbed)
    lost, waiting, *_ = found["failures"]
    assert "no room for 2" in waiting
    ((seconds, steps, name),) = found["losses"]
    seen = f"`{lost}`, `{waiting}`, then `resuming from {name}`"
    record(Row("node killed, another one comes", seen, "same result", seconds, steps))


def test_an_elastic_run_continues_with_fewer_workers_and_then_with_all(results: dict[str, Any]) -> None:
    found = results["elastic"]
    assert [count for count, _ in itertools.groupby(found["workers"])] == [2, 1, 2]
    assert found["epochs"] == list(range(1, found["last_epoch"] + 1)), "every epoch was trained"
    (seconds, _, name), *_ = found["losses"]
    seen = f"`{found['failures'][0]}`, then resumed from {name} `with 1 worker`; later `with 2 workers`"
    outcome = "finished, but not bit for bit: batches are the same, but batch norm sees other parts of them"
    record(Row("cluster.min_workers=1: 2 workers, 1, 2 again", seen, outcome, seconds))


def test_a_model_on_two_nodes_loses_no_answer_with_one_of_them(results: dict[str, Any]) -> None:
    found = results["served"]
    assert found["replicas"] == [2, 1, 2]
    failed = [status for status in found["statuses"] if status != 200]
    assert set(failed) <= {0, 500, 503}
    assert found["repeated"] == [200] * len(failed)
    repeated = f"{len(failed)} failed, and were answered when repeated once" if failed else "none failed"
    outcome = f"{len(found['statuses']):,} requests, {repeated}"
    record(
        Row(
            "node of a served model killed under load, another one comes",
            "errors, or a wait",
            outcome,
            found["answered"],
        )
    )
