"""bench overhead: seconds of an epoch under Ray Train and under torchrun, with the same loop."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist

from benchmarks.harness import Row, Side, compare, read_events
from benchmarks.runs import opened_run
from datasets.prepare.prepare import prepare
from datasets.sources.glyphs import GlyphSettings
from pipeline.config.load import load_config
from pipeline.training.loop import train

MAX_RANKS = 2
EPOCHS = {"backbone": 4, "predictor": 4, "joint": 4}
NUM_TRAIN, NUM_VALIDATION = 1500, 300
"""The numbers of training images per rank and of validation images."""


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """Measure all rows of the table, and return them with notes. All ranks share `threads`; one thread means one rank.

    Raises:
        ValueError: `images` is given.
    """
    if images is not None:
        raise ValueError(
            f"--images {images} is not possible: bench overhead trains on generated letters; omit --images"
        )
    ranks = min(threads, MAX_RANKS)
    each, num_train = threads // ranks, ranks * NUM_TRAIN
    with TemporaryDirectory(prefix="bench-overhead-") as scratch:
        glyphs = GlyphSettings(num_train=num_train, num_validation=NUM_VALIDATION)
        prepare("glyphs", Path(scratch) / "data", glyphs=glyphs)
        changed = [
            f"data.folder={scratch}/data",
            f"loader.num_threads={each}",
            *(f"stages.{stage}.epochs={epochs}" for stage, epochs in EPOCHS.items()),
            f"cluster={{num_workers: {ranks}, cpus_per_worker: {each}, use_gpu: false, storage: {scratch}}}",
            f"tracking.uri=sqlite:///{scratch}/mlflow.db",
        ]
        arguments = {"config": "glyphs", "changed": changed, "scratch": scratch}
        # OMP_NUM_THREADS is set for both: Ray and torchrun have different defaults.
        ray_train = Side(f"{__name__}:ray_train", arguments, each)
        torchrun = Side(f"{__name__}:torchrun", arguments | {"world_size": ranks}, each)
        with ray_train, torchrun:
            what = "epochs of the demo's three stages, Ray Train against torchrun"
            rows = [compare(what, "s", ray_train.measure, torchrun.measure, runs, more_is_better=False)]
        notes = [
            f"{ranks} ranks, each with {each} compute and {each} decoding threads, gloo; {num_train} images; steps and "
            "waiting of all epochs except each stage's first, without evaluation and checkpoints",
            *_by_stage(Path(scratch)),
        ]
    return rows, notes


def _by_stage(scratch: Path) -> Iterator[str]:
    """Yield lines with the medians over the epochs of all measured runs."""
    for stage in EPOCHS:
        parts = []
        for side in ("ray", "torchrun"):
            folders = [folder for folder in scratch.glob(f"{side}-*") if folder.name != f"{side}-0"]
            found = [values for folder in folders for name, values in steady_epochs(folder) if name == stage]
            seconds, waiting = (
                statistics.median(values[key] for values in found)
                for key in ("train_epoch_seconds", "train_data_wait_share")
            )
            parts.append(f"{side} {seconds:.2f} s, of which {100 * waiting:.1f} % waiting for data")
        yield f"{stage}, an epoch: {'; '.join(parts)}"


def ray_train(config: str, changed: list[str], scratch: str) -> Iterator[float]:
    """Yield the seconds of the steady epochs of whole runs, as `jobs.train` starts them, each with a new Ray."""
    from pipeline.cluster.driver import train_run

    for number in count():
        name = f"ray-{number}"
        with Path(scratch, "ray.log").open("a") as log, contextlib.redirect_stdout(log):
            train_run(load_config(config, [*changed, f"name={name}"]))
        yield steady_seconds(Path(scratch) / name)


def torchrun(config: str, changed: list[str], scratch: str, world_size: int) -> Iterator[float]:
    """Yield the seconds of the same epochs in processes that torchrun starts."""
    for number in count():
        folder = Path(scratch) / f"torchrun-{number}"
        folder.mkdir()
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        program = ["-m", __name__, config, str(folder), *changed]
        subprocess.run([sys.executable, "-m", *launcher, *program], check=True)
        yield steady_seconds(folder)


def steady_seconds(folder: Path) -> float:
    """Return the total seconds of a run's epochs, without each stage's first one, which compiles and warms up."""
    return sum(values["train_epoch_seconds"] for _, values in steady_epochs(folder))


def steady_epochs(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the stage and values of each epoch of a run, without each stage's first one."""
    events = read_events(folder)
    return [(event["stage"], event["values"]) for event in events if "values" in event and event["epoch"] > 0]


def main(config: str, folder: str, *changed: str) -> None:
    dist.init_process_group("gloo")
    with opened_run(load_config(config, changed), Path(folder)) as run:
        train(run)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
