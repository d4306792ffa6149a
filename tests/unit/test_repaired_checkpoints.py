"""Damage Ray Train's list of a run's checkpoints, repair it, and let Ray Train itself read it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from ray.train import CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

from pipeline.cluster.checkpoints import (
    SNAPSHOT,
    STATE_FILE,
    DamagedCheckpointError,
    read_state,
    repair_snapshot,
    with_readable_checkpoints,
)
from pipeline.training.checkpoint import TrainingState
from tests.small import small_model
from tests.synthetic import config_of


def save(run: Path, epoch: int, step: int = 0) -> str:
    """Write a checkpoint's folder as a worker does, and return its name."""
    finished = TrainingState.finished(small_model(), config_of(), "digest")
    state = dataclasses.replace(finished, stage="backbone", data_epoch=epoch, step=step)
    (run / state.name).mkdir()
    state.save(run / state.name / STATE_FILE)
    return state.name


def listed_by_ray(run: Path) -> list[str]:
    """Return the checkpoints that Ray Train's manager reads from its list; it resumes from the last."""
    manager = CheckpointManager(CheckpointConfig(num_to_keep=2), StorageContext(str(run.parent), run.name))
    latest = manager.latest_checkpoint_result
    names = [Path(result.checkpoint.path).name for result in manager.best_checkpoint_results]
    assert latest is not None
    assert Path(latest.checkpoint.path).name == names[-1]
    return names


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints that Ray Train lists."""
    run = tmp_path / "run"
    run.mkdir()
    save(run, 1), save(run, 2)
    assert repair_snapshot(run) == []
    return run


def test_a_valid_list_is_unchanged(run: Path) -> None:
    before = (run / SNAPSHOT).stat()
    assert repair_snapshot(run) == []
    assert (run / SNAPSHOT).stat() == before
    assert listed_by_ray(run) == ["checkpoint_0001_000000_backbone", "checkpoint_0002_000000_backbone"]


def test_an_empty_folder_stays_empty(tmp_path: Path) -> None:
    assert repair_snapshot(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"ray_version": "1"}', "\x00\x00"])
def test_a_damaged_list_is_rebuilt(run: Path, content: str) -> None:
    (run / SNAPSHOT).write_text(content)
    (line,) = repair_snapshot(run)
    assert "is damaged" in line
    assert listed_by_ray(run) == ["checkpoint_0001_000000_backbone", "checkpoint_0002_000000_backbone"]


def test_a_missing_list_is_rebuilt(run: Path) -> None:
    (run / SNAPSHOT).unlink()
    assert repair_snapshot(run) == []
    assert listed_by_ray(run) == ["checkpoint_0001_000000_backbone", "checkpoint_0002_000000_backbone"]


def test_a_truncated_checkpoint_is_replaced_by_the_one_before(run: Path) -> None:
    state = run / "checkpoint_0002_000000_backbone" / STATE_FILE
    state.write_bytes(state.read_bytes()[:1000])
    (line,) = repair_snapshot(run)
    assert "checkpoint_0002_000000_backbone" in line
    assert "using the checkpoint before it" in line
    assert listed_by_ray(run) == ["checkpoint_0001_000000_backbone"]
    assert repair_snapshot(run) == [], "it is reported once"


def test_a_missing_checkpoint_is_replaced_by_the_one_before(run: Path) -> None:
    shutil.rmtree(run / "checkpoint_0002_000000_backbone")
    assert len(repair_snapshot(run)) == 1
    assert listed_by_ray(run) == ["checkpoint_0001_000000_backbone"]


def test_a_complete_checkpoint_that_is_not_listed_yet_is_added(run: Path) -> None:
    save(run, 2, step=4)
    (run / "checkpoint_0003_000000_backbone").mkdir()  # a worker died before it wrote
    assert repair_snapshot(run) == []
    assert listed_by_ray(run)[-1] == "checkpoint_0002_000004_backbone"


def test_the_metrics_in_rays_list_are_kept(run: Path) -> None:
    content = json.loads((run / SNAPSHOT).read_text())
    content["checkpoint_results"][0]["metrics"] = {"train_loss": 0.5}
    (run / SNAPSHOT).write_text(json.dumps(content))
    shutil.rmtree(run / "checkpoint_0002_000000_backbone")
    repair_snapshot(run)
    (kept,) = json.loads((run / SNAPSHOT).read_text())["checkpoint_results"]
    assert kept["metrics"] == {"train_loss": 0.5}


def test_a_run_without_a_readable_checkpoint_does_not_start_over(run: Path) -> None:
    for state in run.glob(f"*/{STATE_FILE}"):
        state.write_bytes(b"")
    before = (run / SNAPSHOT).read_bytes()
    with pytest.raises(DamagedCheckpointError, match=r"(?s)No checkpoint in .* can be read.*0001.*0002.*remove"):
        repair_snapshot(run)
    assert (run / SNAPSHOT).read_bytes() == before


def test_a_damaged_checkpoint_is_replaced_and_the_attempt_repeated(run: Path) -> None:
    newest, told = run / "checkpoint_0002_000000_backbone", []

    def attempt() -> str:
        if not told:  # it breaks after the driver has read it
            (newest / STATE_FILE).write_text("broken")
        return read_state(run / listed_by_ray(run)[-1]).name

    assert with_readable_checkpoints(run, told.append, attempt) == "checkpoint_0001_000000_backbone"
    assert len(told) == 1


def test_a_checkpoint_that_only_a_worker_cannot_read_ends_the_run(run: Path) -> None:
    attempts = []

    def attempt() -> None:
        attempts.append("started")
        read_state(run / "not-mounted")

    with pytest.raises(DamagedCheckpointError, match=r"a checkpoint that the driver can read:\n.*not-mounted"):
        with_readable_checkpoints(run, print, attempt)
    assert len(attempts) == 1
