"""Drivers that die, are stopped, or run twice; and a killed controller of Ray Train."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from pipeline.cluster.checkpoints import SNAPSHOT, STATE_FILE
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import Config
from tests.chaos.matrix import Row, record
from tests.chaos.runs import (
    Driver,
    Saboteur,
    checkpoints,
    config_of,
    failures,
    in_stage,
    ray_processes,
    require_same,
    summed,
)

pytestmark = [pytest.mark.distributed, pytest.mark.chaos]


def test_a_killed_driver_resumes_with_the_same_command(undisturbed: Config, folder: Path, ray_cluster: str) -> None:
    """If the command is run twice by mistake, the second one is refused."""
    config = config_of(folder, "driver-killed")
    run = RunFolder.of(config).path
    driver = Driver(config, ray_cluster)
    with Saboteur(run, (in_stage(run, "backbone"), driver.process.kill)) as saboteur:
        assert driver.ended() == -signal.SIGKILL
    drivers = [Driver(config, ray_cluster), Driver(config, ray_cluster)]
    ended = {each.ended(): each.output.strip() for each in drivers}
    assert sorted(ended) == [0, 2], ended
    refused = ended[2]
    assert "another driver is at work on" in refused
    require_same(config, undisturbed)
    ((lost, steps, name),) = saboteur.losses()
    record(Row("driver killed (SIGKILL), same command again", f"`resuming from {name}`", "same result", lost, steps))
    record(Row("second driver on the same run", f"`{refused}`", "the first continues unaffected"))


def test_damaged_checkpoints_and_a_truncated_list_cost_one_interval(
    undisturbed: Config, folder: Path, ray_cluster: str
) -> None:
    config = config_of(folder, "damaged")
    run = RunFolder.of(config).path
    driver = Driver(config, ray_cluster)
    # Preemption and `ray job stop` send SIGTERM.
    with Saboteur(run, (lambda: len(checkpoints(run)) >= 2, driver.process.terminate)) as saboteur:
        assert driver.ended() == 130, driver.output
    stopped = next(line for line in driver.output.splitlines() if line.startswith("stopped after checkpoint_"))
    assert "Traceback" not in driver.output
    newest = checkpoints(run)[-1]
    state = run / newest / STATE_FILE
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    snapshot = run / SNAPSHOT
    snapshot.write_text(snapshot.read_text()[:100])
    driver = Driver(config, ray_cluster)
    assert driver.ended() == 0, driver.output
    require_same(config, undisturbed)
    truncated, *_ = failures(run)
    assert SNAPSHOT in truncated
    resumed = next(line for line in driver.output.splitlines() if line.startswith(("resuming", "starting")))
    assert newest not in resumed
    lost, steps = summed(saboteur.losses())
    record(Row("SIGTERM to the driver (preemption), same command again", f"`{stopped}`", "same result", lost, steps))
    record(Row("newest checkpoint truncated", f"`{resumed}`", "same result, from the one before"))
    record(Row("Ray Train's list of checkpoints truncated", f"`{truncated}`", "same result"))


def test_a_controller_that_is_killed_ends_the_driver_with_a_message(
    undisturbed: Config, folder: Path, ray_cluster: str
) -> None:
    config = config_of(folder, "controller-killed")
    run = RunFolder.of(config).path

    def kill_controller() -> None:
        (controller,) = ray_processes("TrainController")
        controller.kill()

    driver = Driver(config, ray_cluster)
    with Saboteur(run, (in_stage(run, "backbone"), kill_controller)) as saboteur:
        assert driver.ended() == 2, driver.output
    said = driver.output[driver.output.index("error:") :].strip()
    assert "it resumes from the last checkpoint" in said
    assert "Traceback" not in said
    driver = Driver(config, ray_cluster)
    assert driver.ended() == 0, driver.output
    require_same(config, undisturbed)
    lost, steps = summed(saboteur.losses())
    record(Row("Ray Train's controller killed, same command again", f"`{said}`", "same result", lost, steps))
