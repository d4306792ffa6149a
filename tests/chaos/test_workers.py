"""Workers that die, hang or diverge."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from pipeline.cluster.checkpoints import SNAPSHOT, STATE_FILE
from pipeline.cluster.driver import train_run
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import Config
from tests.chaos.matrix import Row, record
from tests.chaos.runs import (
    CHECKPOINT_STEPS,
    Saboteur,
    checkpoints,
    config_of,
    failures,
    in_stage,
    position,
    ray_processes,
    reported,
    require_same,
    signal_worker,
)

pytestmark = pytest.mark.ray


def test_workers_killed_in_every_stage_do_not_change_the_result(undisturbed: Config, folder: Path) -> None:
    config = config_of(folder, "workers-killed")
    run = RunFolder.of(config).path
    acts = {
        "worker killed (SIGKILL) in the backbone stage": (in_stage(run, "backbone"), signal_worker(0)),
        "worker killed while the logit table is computed": (reported(run, "logit table"), signal_worker(1)),
        "worker crashes (SIGSEGV) in the predictor stage": (
            in_stage(run, "predictor"),
            signal_worker(1, signal.SIGSEGV),
        ),
        "worker crashes (SIGBUS) in the joint stage": (in_stage(run, "joint"), signal_worker(0, signal.SIGBUS)),
    }
    # A process that a shell started in the background ignores SIGINT.
    on_interrupt = signal.getsignal(signal.SIGINT)
    with Saboteur(run, *acts.values()) as saboteur:
        train_run(config)
    require_same(config, undisturbed)
    assert signal.getsignal(signal.SIGINT) is on_interrupt, "Ctrl-C works again in this process"
    losses, seen = saboteur.losses(), failures(run)
    assert len(losses) == len(acts)
    assert len(seen) == len(acts), "each was reported once"
    for name, line in zip(("SIGKILL", "SIGKILL", "SIGSEGV", "SIGBUS"), seen, strict=True):
        assert f"of {name}" in line or f"by {name}" in line
    for fault, (seconds, steps, name), line in zip(acts, losses, seen, strict=True):
        record(Row(fault, f"`{line}`, then `resuming from {name}`", "same result", seconds, steps))


@pytest.mark.chaos
def test_a_worker_that_hangs_is_replaced(undisturbed: Config, folder: Path) -> None:
    config = config_of(folder, "worker-stopped", cluster={"hang_seconds": 8})
    run, stopped = RunFolder.of(config).path, []

    def stop() -> None:
        stopped.append(ray_processes("RayTrainWorker")[0])
        stopped[0].send_signal(signal.SIGSTOP)

    with Saboteur(run, (in_stage(run, "backbone"), stop)) as saboteur:
        train_run(config)
    require_same(config, undisturbed)
    (line,) = failures(run)
    assert "no answer for cluster.hang_seconds" in line
    assert not stopped[0].is_running(), "the hanging worker was killed, so it holds no GPU"
    ((seconds, steps, name),) = saboteur.losses()
    fault = "worker hangs (SIGSTOP), cluster.hang_seconds 8"
    record(Row(fault, f"`{line}`, then `resuming from {name}`", "same result", seconds, steps))


@pytest.mark.chaos
def test_a_checkpoint_damaged_during_a_run_is_replaced_by_the_one_before(undisturbed: Config, folder: Path) -> None:
    """The restarted workers find it; the driver repairs the list and resumes."""
    config = config_of(folder, "damaged-meanwhile")
    run = RunFolder.of(config).path

    def kill_all() -> None:
        for worker in ray_processes("RayTrainWorker"):
            worker.kill()

    def damage() -> None:
        latest = json.loads((run / SNAPSHOT).read_text())["latest_checkpoint_result"]["checkpoint_dir_name"]
        (run / latest / STATE_FILE).write_bytes(b"")

    def has_three() -> bool:
        return any(position(name) >= 3 * CHECKPOINT_STEPS for name in checkpoints(run))

    acts = ((has_three, kill_all), (lambda: bool(failures(run)), damage))
    with Saboteur(run, *acts):
        train_run(config)
    require_same(config, undisturbed)
    _, found, *_ = failures(run)
    assert "using the checkpoint before it" in found
    record(Row("newest checkpoint emptied while workers restart", f"`{found}`", "same result"))
