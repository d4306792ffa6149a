"""bench recovery: seconds from a killed worker until training continues, against Ray's restart of idle workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import Row, compare, read_events
from benchmarks.runs import prepare_letters, small_config, use_token

NUM_IMAGES, EPOCHS, CHECKPOINT_STEPS = 1024, 3, 4
SETTLED_SECONDS = 2.0
"""The seconds that a worker lives before it is killed: Ray's controller fails if a worker dies during its start."""


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """Measure the row of the table, and return it with notes."""
    use_token()
    from pipeline.cluster.connection import ray_cluster

    with TemporaryDirectory(prefix="bench-recovery-") as scratch, ray_cluster():
        folder, number = Path(scratch), count()
        data = prepare_letters(folder / "data", NUM_IMAGES)
        _bare_restart(folder, f"warm-{next(number)}")  # a cluster's first workers read everything from disk
        rows = [
            compare(
                "from a killed worker until training continues, against Ray's own restart",
                "s",
                lambda: _recovery(data, folder, f"ours-{next(number)}"),
                lambda: _bare_restart(folder, f"bare-{next(number)}"),
                runs,
                more_is_better=False,
            )
        ]
    return rows, [
        "ours: until the workers have model, data and checkpoint, and train; they then repeat at most one checkpoint "
        "interval",
        "Ray's own: two workers of a train function that imports torch",
    ]


def _recovery(data: Path, storage: Path, name: str) -> float:
    """Kill a worker of a small run after its first checkpoint. Return the seconds until training continues."""
    from pipeline.cluster.driver import train_run

    killed: list[float] = []
    ended = threading.Event()

    def kill() -> None:
        import psutil

        while not ended.wait(0.02):
            if any((storage / name).glob("checkpoint_*/state.pt")):
                mine = psutil.Process().children(recursive=True)
                workers = [each for each in mine if "RayTrainWorker" in each.name()]
                killed.append(time.time())
                workers[0].kill()
                return

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        train_run(small_config(data, storage, name, EPOCHS, checkpoint_steps=CHECKPOINT_STEPS))
    finally:
        ended.set()
        thread.join()
    events = read_events(storage / name)
    begun = [event["time"] for event in events if event.get("message", "").startswith(("resuming", "starting"))]
    return min(moment for moment in begun if moment > killed[0]) - killed[0]


def _bare_restart(storage: Path, name: str) -> float:
    """Return the seconds from a worker's death to the next start of all workers, in a run that does nothing else."""
    import ray.train
    from ray.train.torch import TorchTrainer

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")  # as in our runs
    folder = storage / f"{name}-times"
    folder.mkdir()
    TorchTrainer(
        _die_once,
        train_loop_config={"folder": str(folder)},
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(
            name=name, storage_path=str(storage), failure_config=ray.train.FailureConfig(max_failures=1)
        ),
    ).fit()
    times = {path.name: float(path.read_text()) for path in folder.iterdir()}
    return max(times["again-0"], times["again-1"]) - times["died"]


def _die_once(config: Mapping[str, Any]) -> None:
    """Run as the train function: rank 0 kills itself the first time, and every rank records when it starts again."""
    import ray.train
    import torch.distributed as dist

    folder, rank = Path(config["folder"]), ray.train.get_context().get_world_rank()
    died = folder / "died"
    if died.exists():
        (folder / f"again-{rank}").write_text(repr(time.time()))
    dist.barrier()  # every rank has checked whether it is the first time
    if rank == 0 and not (folder / "again-0").exists():
        time.sleep(SETTLED_SECONDS)
        died.write_text(repr(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
