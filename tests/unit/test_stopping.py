"""pipeline/cluster/signals.py: SIGTERM requests a stop; a second one, or the end of a job's time, ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from pipeline.cluster.signals import JOB_VARIABLE, WAIT_VARIABLE, is_stop_requested, seconds_after_sigterm, stoppable
from pipeline.config.run_folder import RunFolder


@pytest.fixture(autouse=True)
def outside_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    monkeypatch.delenv(WAIT_VARIABLE, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_first_signal_requests_a_stop_and_the_second_exits(folder: RunFolder) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stoppable(folder):
        assert not is_stop_requested(folder)
        sigterm()
        assert is_stop_requested(folder)
        with pytest.raises(SystemExit) as ended:
            sigterm()
        assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_next_attempt_ignores_the_signal_of_the_last(folder: RunFolder) -> None:
    with stoppable(folder):
        sigterm()
    with stoppable(folder):
        assert not is_stop_requested(folder)


def test_a_job_without_time_to_stop_ends_at_once(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    assert seconds_after_sigterm() == 0
    with stoppable(folder), pytest.raises(SystemExit):
        sigterm()


def test_a_job_exits_when_its_time_is_over(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    monkeypatch.setenv(WAIT_VARIABLE, "10.05")
    with stoppable(folder):
        sigterm()
        assert is_stop_requested(folder)
        with pytest.raises(SystemExit):
            threading.Event().wait(60)


def test_the_timer_is_cleared_afterwards(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    monkeypatch.setenv(WAIT_VARIABLE, "60")
    with stoppable(folder):
        sigterm()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_another_thread_sets_no_handlers(folder: RunFolder) -> None:
    def body() -> None:
        with stoppable(folder):
            seen.append(is_stop_requested(folder))

    seen: list[bool] = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_folder_without_the_file_requests_no_stop(folder: RunFolder) -> None:
    assert not is_stop_requested(folder)
