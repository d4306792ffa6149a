"""Workers that die, hang or diverge."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from pipeline.cluster.checkpoints import SNAPSHOT, STATE_FILE
from pipeline.cluster.driver import train_run
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import Config
from tests.chaos.matrix import Row, record
from tests.chaos.runs import (
    CHECKPOINT_STEPS,
    Driver,
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
    starts,
)

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("num_stages", [1, pytest.param(4, marks=pytest.mark.chaos)])
def test_workers_killed_in_every_stage_do_not_change_the_result(
    undisturbed: Config, folder: Path, num_stages: int
) -> None:
    config = config_of(folder, f"workers-killed-{num_stages}")
    run = RunFolder.of(config).path
    faults = [
        ("worker crashes (SIGBUS) in the joint stage", in_stage(run, "joint"), 0, signal.SIGBUS),
        ("worker crashes (SIGSEGV) in the predictor stage", in_stage(run, "predictor"), 1, signal.SIGSEGV),
        ("worker killed while the logit table is computed", reported(run, "logit table"), 1, signal.SIGKILL),
        ("worker killed (SIGKILL) in the backbone stage", in_stage(run, "backbone"), 0, signal.SIGKILL),
    ]
    faults = faults[:num_stages][::-1]
    acts = {name: (condition, signal_worker(rank, number)) for name, condition, rank, number in faults}
    # A process that a shell started in the background ignores SIGINT.
    on_interrupt = signal.getsignal(signal.SIGINT)
    with Saboteur(run, *acts.values()) as saboteur:
        train_run(config)
    require_same(config, undisturbed)
    assert signal.getsignal(signal.SIGINT) is on_interrupt, "Ctrl-C works again in this process"
    losses, seen = saboteur.losses(), failures(run)
    assert len(losses) == len(acts)
    assert len(seen) == len(acts), "each was reported once"
    for (*_, number), line in zip(faults, seen, strict=True):
        assert f"with {number.name}" in line or f"by {number.name}" in line
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


@pytest.mark.chaos
def test_eight_workers_on_few_cores_resume_as_four_and_as_eight(folder: Path) -> None:
    counts, shares = [8, 4, 8], []
    store = {"object_store_memory": 100 * 1024**2}
    cluster = Cluster(initialize_head=True, shutdown_at_exit=False, head_node_args={"num_cpus": max(counts), **store})
    try:
        for attempt, count in enumerate(counts, 1):
            config = config_of(
                folder,
                "eight-workers",
                stages={"predictor": None, "joint": None},
                training={"batch_size": 16},
                cluster={"num_workers": count, "hang_seconds": 300},
            )
            run = RunFolder.of(config).path
            driver = Driver(config, cluster.address)
            if attempt == len(counts):
                assert driver.ended(900) == 0, driver.output
                break

            def stop(driver: Driver = driver) -> None:
                (controller,) = ray_processes("TrainController")
                shares.append(sum(controller.cpu_times()[:2]) / (time.time() - controller.create_time()))
                driver.process.terminate()

            with Saboteur(run, (lambda run=run, least=2 * attempt: len(checkpoints(run)) >= least, stop)):
                assert driver.ended(900) == 130, driver.output
    finally:
        cluster.shutdown()
    started = [event["message"] for event in starts(run)]
    assert [message.partition(" with ")[2] for message in started] == [f"{count} workers" for count in counts]
    assert [message.split()[0] for message in started] == ["starting", "resuming", "resuming"]
    percent = " and ".join(
        f"{100 * share:.1f} % of a CPU with {count} workers" for share, count in zip(shares, counts, strict=False)
    )
    outcome = f"finished; Ray Train's controller uses {percent}"
    record(Row("8 workers on few cores, stopped twice", "; ".join(f"`{message}`" for message in started), outcome))
