"""A run that is killed after any step, or while it computes a logit table, ends bit for bit as an uninterrupted one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.training.run import TABLE
from tests.conftest import ROOT
from tests.killed_runs import PAIRS, STEPS_OF, Pair

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, Pair | None], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("killed") / "runs"
    command = [sys.executable, "-m", "tests.killed_runs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads((Path(folder) / "results.json").read_text())
    return {(found["ranks"], tuple(found["died_after"]) if found["died_after"] else None): found for found in results}


@pytest.mark.parametrize("ranks", PAIRS)
def test_the_uninterrupted_run_trains_every_step(runs: dict, ranks: int) -> None:
    found = runs[ranks, None]
    assert found["ended"] == [[0] * ranks]
    taken = {tuple(json.loads(event)[0]) for event in found["events"]}
    steps = {(stage, step) for stage, num in STEPS_OF.items() if stage != TABLE for step in range(1, num + 1)}
    assert steps <= taken
    assert len(taken) == len(steps) + 5, "and reports every epoch"
    assert len(set(found["sha256"])) == 1, "ranks end with the same weights"


@pytest.mark.parametrize(("ranks", "pair"), [(ranks, pair) for ranks, pairs in PAIRS.items() for pair in pairs])
def test_a_killed_run_ends_with_the_same_bits(runs: dict, ranks: int, pair: Pair) -> None:
    found, expected = runs[ranks, pair], runs[ranks, None]
    killed, finished = found["ended"]
    assert killed[0] == -signal.SIGKILL
    assert 0 not in killed
    assert finished == [0] * ranks
    assert found["sha256"] == expected["sha256"]
    assert found["events"] == expected["events"], "every step's loss and every epoch's metrics, of both attempts"


def test_runs_resume_within_epochs(runs: dict) -> None:
    names = {found["resumed_from"] for found in runs.values()}
    within = {"checkpoint_0001_000002_backbone", "checkpoint_0003_000002_predictor", "checkpoint_0004_000002_joint"}
    assert {"nothing", "checkpoint_0002_000000_backbone"} | within <= names
