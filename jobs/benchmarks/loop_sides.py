"""Sides that run the training loop itself: epochs of the predictor stage, and whole runs under Ray Train and torchrun.

As a program, under torchrun: `-m jobs.benchmarks.loop_sides CONFIG FOLDER` trains what a configuration says, without
Ray and MLflow.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from datasets.beton import load_manifest
from pipeline.assembly import build_model, equip_for_training, open_loaders
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.models.cost import measure_costs
from pipeline.training import distributed
from pipeline.training.checkpoint import TrainingState
from pipeline.training.divergence import Watch
from pipeline.training.goodput import TABLE
from pipeline.training.loop import Run, prepare, train, train_epoch
from pipeline.training.reporting import Progress

CPU = torch.device("cpu")
SECONDS = 3.0
"""of a value at least, in whole epochs"""
EVENTS = "progress.jsonl"
"""in a run's folder: what pipeline.cluster.progress writes, and so does FileReporter"""


class FileReporter:
    """The loop's Reporter, on rank 0: epochs as lines of a file, and the last state."""

    def __init__(self, folder: Path):
        self.folder = folder if distributed.rank() == 0 else None

    def step(self, progress: Progress, loss: Tensor) -> None:
        pass

    def epoch(self, progress: Progress, values: Mapping[str, float]) -> None:
        if self.folder:
            with (self.folder / EVENTS).open("a") as file:
                file.write(json.dumps({**vars(progress), "values": dict(values)}) + "\n")

    def message(self, text: str) -> None:
        pass

    def checkpoint(self, state: TrainingState, values: Mapping[str, float]) -> None:
        if self.folder:
            state.save(self.folder / "state.pt")


@contextmanager
def opened_run(config: Config, folder: Path, device: torch.device = CPU) -> Iterator[Run]:
    """What this rank trains with."""
    manifest = load_manifest(config.data.folder)
    threads = config.loader.num_threads or torch.get_num_threads()
    with open_loaders(config, distributed.rank(), distributed.world_size(), threads) as (training, validation):
        model = build_model(config, manifest, device)
        costs, reporter = measure_costs(model), FileReporter(folder)
        equip_for_training(model, config)
        yield Run(config, model, costs, training, validation, device, reporter, manifest, folder / "tables")


def predictor(config: str, data: str, logits: Literal["table", "live"], threads: int) -> Iterator[float]:
    """Epochs of the predictor stage, decoding included: images/s. The first value is that of computing the table."""
    changed = [
        f"data.folder={data}",
        f"loader.num_threads={threads}",
        "training.batch_size=64",
        "training.precision=float32",
        f"stages.predictor={{epochs: 1, alpha_gflops: 0.01, logits: {logits}}}",
    ]
    with (
        TemporaryDirectory(prefix="bench-tables-") as folder,
        opened_run(load_config(config, changed), Path(folder)) as run,
    ):
        stage = run.config.stages.predictor
        assert stage is not None
        work = prepare(run, stage, 0, Watch(None), None)
        filled = run.train.num_samples + run.validation.num_samples
        epochs = (Progress("predictor", 0, 1, data_epoch, 0, run.train.num_batches) for data_epoch in count())
        table_seconds = run.goodput.seconds[TABLE]
        train_epoch(run, work, next(epochs))
        yield filled / table_seconds if logits == "table" else 0.0
        while True:
            seconds, images = 0.0, 0
            while seconds < SECONDS:
                seconds += train_epoch(run, work, next(epochs))["train_epoch_seconds"]
                images += run.train.num_samples
            yield images / seconds


def ray_train(config: str, changed: list[str], scratch: str) -> Iterator[float]:
    """Whole runs as `jobs.train` does them, each on a Ray of its own: seconds of the steady epochs."""
    from pipeline.cluster.launch import train_run

    for number in count():
        name = f"ray-{number}"
        with Path(scratch, "ray.log").open("a") as log, contextlib.redirect_stdout(log):
            train_run(load_config(config, [*changed, f"name={name}"]))
        yield steady_seconds(Path(scratch) / name)


def torchrun(config: str, changed: list[str], scratch: str, world_size: int) -> Iterator[float]:
    """The same runs by processes that torchrun starts."""
    for number in count():
        folder = Path(scratch) / f"torchrun-{number}"
        folder.mkdir()
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        program = ["-m", __name__, config, str(folder), *changed]
        subprocess.run([sys.executable, "-m", *launcher, *program], check=True)
        yield steady_seconds(folder)


def steady_seconds(folder: Path) -> float:
    """What a run's epochs took together, without each stage's first one, which compiles and warms up."""
    return sum(values["train_epoch_seconds"] for _, values in steady_epochs(folder))


def steady_epochs(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Stage and values of a run's epochs, without each stage's first one."""
    events = [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]
    return [(event["stage"], event["values"]) for event in events if "values" in event and event["epoch"] > 0]


def main(config: str, folder: str, *changed: str) -> None:
    dist.init_process_group("gloo")
    with opened_run(load_config(config, changed), Path(folder)) as run:
        train(run)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
