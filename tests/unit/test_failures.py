"""pipeline/cluster/group.py: Ray's errors become one line that says which worker failed, and how."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RaySystemError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.controller.state import InitializingState, ReschedulingState, SchedulingState
from ray.train.v2._internal.execution.scaling_policy import ScalingDecision

from pipeline.cluster.group import FINAL_ERRORS, FailureReporter, WaitReporter, explain_end, explain_workers, run_group
from pipeline.cluster.progress import FAILURES, PROGRESS, append_event, followed
from pipeline.training.monitoring import DivergedError
from tests.conftest import ROOT
from tests.synthetic import config_of

DEAD = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
GLOO = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:12345")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DEAD, "worker 0: its process died"),
        (
            WorkerHealthCheckFailedError("", ActorUnavailableError("The actor is temporarily unavailable", b"0" * 16)),
            "worker 0: its process cannot be reached",
        ),
        (WorkerHealthCheckTimeoutError("hanging"), "worker 0: no answer for cluster.hang_seconds"),
        (OSError(28, "No space left on device"), "worker 0: OSError: [Errno 28] No space left on device"),
        (GLOO, "worker 0: lost its connection to another worker"),
    ],
)
def test_each_kind_of_failure_has_its_own_message(error: Exception, expected: str, tmp_path: Path) -> None:
    assert explain_workers({0: error}, tmp_path).startswith(expected)
    assert "\n" not in explain_workers({0: error}, tmp_path)


def test_the_worker_that_died_is_named_before_those_that_lost_their_connection(tmp_path: Path) -> None:
    assert explain_workers({0: GLOO, 1: DEAD, 2: GLOO}, tmp_path).startswith("worker 1 (and 2 more): its process died")


def test_the_end_names_the_reason_and_what_to_do(tmp_path: Path) -> None:
    full = WorkerGroupError("", {1: OSError(28, "No space left on device")})
    for error, expected in (
        (full, "No space left on device"),
        (ControllerError(OSError(30, "Read-only file system")), "controller: [Errno 30] Read-only file system"),
        (ActorDiedError(), "controller: its process died"),
    ):
        said = explain_end(error, "small", tmp_path, "the last checkpoint")
        assert expected in said
        assert "The run small ended early." in said
        assert said.endswith("rerun the same command; it resumes from the last checkpoint.")


def test_a_followed_run_shows_failures_too_and_skips_what_is_not_a_whole_line(tmp_path: Path) -> None:
    append_event(tmp_path, {"message": "of an earlier attempt"})
    shown: list[str] = []
    with followed(tmp_path, shown.append):
        with (tmp_path / PROGRESS).open("a") as file:
            file.write('{"message": "cut sh' + '{"message": "its disk was full"}\n')
        append_event(tmp_path, {"message": "starting with 2 workers"})
        FailureReporter(tmp_path).after_exception(None, {1: DEAD})
    assert shown[0] == "starting with 2 workers"
    assert shown[1].startswith("worker 1: its process died")
    assert len(shown) == 2


def test_a_run_that_diverges_is_not_retried_and_the_driver_receives_the_error() -> None:
    assert DivergedError in FINAL_ERRORS
    received = pickle.loads(pickle.dumps(DivergedError("loss nan in step 2")))
    assert isinstance(received, DivergedError)
    assert str(received) == "loss nan in step 2"


def test_waiting_for_nodes_is_reported_once(tmp_path: Path) -> None:
    error = ControllerError(WorkerGroupStartupTimeoutError(num_workers=2))
    reporter = WaitReporter(tmp_path)
    reporter.after_controller_state_update(InitializingState(), SchedulingState(ScalingDecision()))
    assert not (tmp_path / FAILURES).exists()
    for _ in range(3):  # as often as Ray Train retries
        reporter.after_controller_state_update(SchedulingState(ScalingDecision()), ReschedulingState(error))
    (line,) = (tmp_path / FAILURES).read_text().splitlines()
    assert "the cluster has no room for 2; waiting for room" in line


def test_a_failure_that_cannot_be_written_raises_nothing(tmp_path: Path) -> None:
    FailureReporter(tmp_path / "gone").after_exception(None, {0: DEAD})
    assert not (tmp_path / "gone").exists()


def test_every_group_of_workers_uses_hang_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", raising=False)
    config = config_of()
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"hang_seconds": 77})})
    with suppress(RaySystemError):  # there is no cluster
        run_group(print, "work", config, storage=tmp_path / "group", event_folder=tmp_path)
    assert os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] == "77"


def traced(work: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """Run Python code as the work of rank 1 in a process."""
    script = (
        "import faulthandler, os, pathlib; from pipeline.cluster.signals import crash_traced\n"
        f"with crash_traced(pathlib.Path({str(folder)!r}), 1): {work}"
    )
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (
            signal.SIGSEGV,
            "worker 1 (and 1 more): its process crashed with SIGSEGV in native code called from <string>:",
        ),
        (signal.SIGBUS, "worker 1 (and 1 more): its process crashed with SIGBUS in native code called from <string>"),
        (signal.SIGABRT, "worker 1 (and 1 more): its process crashed with SIGABRT"),
        (signal.SIGILL, "worker 1 (and 1 more): its process crashed with SIGILL"),
        (signal.SIGFPE, "worker 1 (and 1 more): its process crashed with SIGFPE"),
        (signal.SIGKILL, "worker 1 (and 1 more): its process died without a trace, most likely by SIGKILL"),
    ],
)
def test_a_death_by_signal_names_the_signal_and_what_to_try(
    number: signal.Signals, expected: str, tmp_path: Path
) -> None:
    ended = traced(f"os.kill(os.getpid(), {int(number)})", tmp_path)
    assert ended.returncode == -number
    line = explain_workers({0: GLOO, 1: DEAD}, tmp_path)
    assert line.startswith(expected)
    assert ("out of memory" if number == signal.SIGKILL else "oneDNN") in line
    assert ("loader.batches_ahead" if number == signal.SIGKILL else "cluster.cpus_per_worker=1") in line
    assert "\n" not in line


def test_a_worker_that_does_not_crash_leaves_no_trace(tmp_path: Path) -> None:
    ended = traced("assert faulthandler.is_enabled(); raise OSError('disk full')", tmp_path)
    assert ended.returncode == 1
    assert b"disk full" in ended.stderr
    assert list(tmp_path.iterdir()) == []
    assert traced("print('trained')", tmp_path / "read-only").stdout == b"trained\n", (
        "a trace is not worth the training"
    )
