"""Check a run's checkpoints before Ray Train resumes from them, and repair Ray Train's list of checkpoints."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME as SNAPSHOT
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _CheckpointManagerState,
    _TrainingResultState,
)

from datasets.files import write_whole
from pipeline.training import distributed
from pipeline.training.checkpoint import STATE_FILE, TrainingState

Result = TypeVar("Result")


class DamagedCheckpointError(ValueError):
    """The checkpoint to resume from cannot be read. `repair_snapshot` falls back to the checkpoint before it."""


def read_state(checkpoint: Path) -> TrainingState:
    """Read the training state in a checkpoint's folder. Raise DamagedCheckpointError if it is unreadable."""
    try:
        return TrainingState.load(checkpoint / STATE_FILE)
    except ValueError as error:
        raise DamagedCheckpointError(str(error)) from error


def read_state_on_all_ranks(checkpoint: Path) -> TrainingState:
    """Read the training state on every rank. Raise DamagedCheckpointError on every rank if any cannot read it.

    A rank that raised alone would leave the others waiting for its next message.
    """
    state, problem = None, None
    try:
        state = read_state(checkpoint)
    except DamagedCheckpointError as error:
        problem = f"{error} (on {platform.node()})"
    problems = dict.fromkeys(found for found in distributed.gather(problem) if found)
    if state is None or problems:
        raise DamagedCheckpointError("\n".join(problems))
    return state


def with_readable_checkpoints(run_folder: Path, show: Callable[[str], None], attempt: Callable[[], Result]) -> Result:
    """Repair a run's list of checkpoints and return what `attempt` returns. Repeat both if a checkpoint is damaged.

    Args:
        show: called with a line for each damaged file.
        attempt: starts workers, which resume from the last checkpoint.

    Raises:
        DamagedCheckpointError: no checkpoint can be read, or `attempt` cannot read one that this process can read.
    """
    damage: DamagedCheckpointError | None = None
    while True:
        repaired = repair_snapshot(run_folder)
        if damage is not None and not repaired:
            raise DamagedCheckpointError(
                f"A worker cannot read a checkpoint that the driver can read:\n{damage}\n"
                "Check cluster.storage on that node, then rerun the same command."
            ) from damage
        for line in repaired:
            show(line)
        try:
            return attempt()
        except DamagedCheckpointError as error:
            damage = error


def repair_snapshot(run_folder: Path) -> list[str]:
    """Rewrite Ray Train's list of a run's checkpoints so that it contains exactly the readable ones, in order.

    Ray Train overwrites its list in place, and does not start if the list is truncated or names a missing checkpoint. A
    complete checkpoint that is not listed yet is added. Call this only while no other process works on the run.

    Returns:
        One line for each damaged file.

    Raises:
        DamagedCheckpointError: there are checkpoints, but none can be read. Only the user can decide to start over.
    """
    snapshot, found = run_folder / SNAPSHOT, []
    listed = _listed(snapshot) if snapshot.exists() else {}
    if listed is None:
        found.append(f"{snapshot} is damaged; rebuilding it from the checkpoints in the folder")
    known = listed or {}
    unlisted = [path.parent.name for path in sorted(run_folder.glob(f"checkpoint_*/{STATE_FILE}"))]
    positions: dict[str, tuple] = {}
    damaged: dict[str, str] = {}
    for name in dict.fromkeys([*known, *unlisted]):
        try:
            state = read_state(run_folder / name)
        except DamagedCheckpointError as error:
            damaged[name] = str(error)
        else:
            positions[name] = (state.data_epoch, state.step, state.stage == "finished", name)
    if damaged and not positions:
        reasons = "\n".join(f"  - {reason}" for reason in damaged.values())
        raise DamagedCheckpointError(
            f"No checkpoint in {run_folder} can be read:\n{reasons}\n"
            f"Restore one from a backup, or remove {run_folder} to train from the start."
        )
    found += [f"{reason}; using the checkpoint before it" for name, reason in damaged.items() if name in known]
    names = sorted(positions, key=positions.__getitem__)
    if listed is None or list(known) != names:
        _write(snapshot, {name: known.get(name, {}) for name in names})
    return found


def _listed(snapshot: Path) -> dict[str, dict[str, Any]] | None:
    """Return name and metrics of every checkpoint in Ray Train's list, oldest first, or None if the list is damaged."""
    try:
        state = _CheckpointManagerState.model_validate_json(snapshot.read_bytes())
    except ValueError:  # includes pydantic's ValidationError
        return None
    listed = {result.checkpoint_dir_name: result.metrics for result in state.checkpoint_results}
    latest = state.latest_checkpoint_result.checkpoint_dir_name if state.latest_checkpoint_result else None
    whole = len(listed) == len(state.checkpoint_results) == len(state.checkpoint_report_indices)
    return listed if whole and latest == next(reversed(listed), None) else None


def _write(snapshot: Path, checkpoints: dict[str, dict[str, Any]]) -> None:
    if not checkpoints:
        snapshot.unlink(missing_ok=True)
        return
    results = [_TrainingResultState(checkpoint_dir_name=name, metrics=of) for name, of in checkpoints.items()]
    state = _CheckpointManagerState(
        checkpoint_results=results,
        checkpoint_report_indices=list(range(len(results))),
        latest_checkpoint_result=results[-1],
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(results),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    write_whole(snapshot, state.model_dump_json())
