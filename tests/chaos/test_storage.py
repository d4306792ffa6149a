"""Full and read-only disks, and data that changes during a run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.cluster.driver import train_run
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import Config
from tests.chaos.matrix import Row, record
from tests.chaos.runs import Saboteur, checkpoints, config_of, failures, in_stage, require_same, signal_worker, summed

pytestmark = [pytest.mark.distributed, pytest.mark.chaos]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 24 MB, which needs root."""
    assert os.geteuid() == 0, "run `make chaos` as root, for instance in a container: this test mounts a file system"
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> Callable[[], None]:
    """Return an act that fills the disk."""

    def act() -> None:
        with (disk / "filler").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass

    return act


def test_a_full_disk_ends_the_run_with_the_reason_and_it_resumes_when_there_is_room(
    undisturbed: Config, small_disk: Path, folder: Path
) -> None:
    config = config_of(folder, "full", cluster={"storage": str(small_disk), "max_failures": 1})
    run = RunFolder.of(config).path
    with (
        Saboteur(run, (in_stage(run, "backbone"), fill(small_disk))) as saboteur,
        pytest.raises(ChildProcessError) as end,
    ):
        train_run(config)
    assert "No space left on device" in str(end.value)
    assert checkpoints(run), "earlier checkpoints are complete"
    (small_disk / "filler").unlink()
    train_run(config)
    require_same(config, undisturbed)
    _, steps = summed(saboteur.losses())
    seen = " ".join(str(end.value).split())
    record(
        Row(
            "disk full while checkpointing, same command again with room",
            f"`error: {seen}`",
            "same result",
            None,
            steps,
        )
    )


def test_read_only_storage_ends_the_run_with_the_reason(undisturbed: Config, small_disk: Path, folder: Path) -> None:
    config = config_of(folder, "read-only", cluster={"storage": str(small_disk), "max_failures": 1})
    run = RunFolder.of(config).path

    def become_read_only() -> None:
        # A mount cannot become read-only while the driver's lock in it is open for writing, so cover it.
        subprocess.run(["mount", "--bind", str(small_disk), str(small_disk)], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(small_disk)], check=True)

    with (
        Saboteur(run, (in_stage(run, "backbone"), become_read_only)),
        pytest.raises((ChildProcessError, OSError)) as end,
    ):
        train_run(config)
    assert "Read-only file system" in str(end.value)
    subprocess.run(["umount", "--lazy", str(small_disk)], check=True)
    train_run(config)
    require_same(config, undisturbed)
    seen = " ".join(str(end.value).split())
    record(Row("storage becomes read-only, same command again when it is not", f"`error: {seen}`", "same result"))


@pytest.mark.parametrize("what", ["changed", "deleted"])
def test_data_that_changes_during_a_run_is_never_used(
    undisturbed: Config, folder: Path, tmp_path: Path, what: str
) -> None:
    """A run keeps reading its open file; a restarted worker refuses the changed one."""
    shutil.copytree(folder / "data", tmp_path / "data")
    beton = tmp_path / "data" / "train.beton"
    config = config_of(folder, f"data-{what}", data={"folder": str(tmp_path / "data")}, cluster={"max_failures": 1})
    run = RunFolder.of(config).path

    def replace() -> None:
        content = beton.read_bytes()
        beton.unlink()
        if what == "changed":
            beton.write_bytes(content[:-4096] + bytes(4096))

    acts = ((in_stage(run, "backbone"), replace), (in_stage(run, "backbone"), signal_worker(0)))
    with Saboteur(run, *acts), pytest.raises((ChildProcessError, ValueError)) as end:
        train_run(config)
    assert "train.beton" in str(end.value)
    shutil.copy(folder / "data" / "train.beton", beton)
    train_run(config)
    require_same(config, undisturbed)
    seen = " ".join(str(end.value).split())
    record(
        Row(
            f"train.beton {what} during the run, then a worker killed; same command again with the file back",
            f"`error: {seen}`",
            "open files stay readable; the restarted worker refuses the file; same result",
        )
    )


def test_a_full_object_store_does_not_affect_training(undisturbed: Config, folder: Path) -> None:
    import ray

    full = [ray.put(bytes(16 * 1024**2)) for _ in range(24)]  # 384 MB for a store of 256 MB: Ray spills
    config = config_of(folder, "object-store")
    train_run(config)
    require_same(config, undisturbed)
    assert len(full) == 24
    assert not failures(RunFolder.of(config).path)
    record(Row("Ray's object store full", "nothing", "same result"))
