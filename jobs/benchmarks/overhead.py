"""bench overhead: seconds of an epoch under Ray Train beside the same loop under torchrun, and the wait for data."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets.glyphs import GlyphSettings
from datasets.prepare import prepare
from jobs.benchmarks.harness import Row, Side, compare

MAX_RANKS = 2
EPOCHS = {"backbone": 4, "predictor": 4, "joint": 4}
NUM_TRAIN, NUM_VALIDATION = 1500, 300
"""images: training ones for each rank"""
SIDES_FILE = "jobs.benchmarks.loop_sides"


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """All rows of the table, and notes on them. `threads` are those of all ranks; with one of them there is one rank.

    Raises:
        ValueError: there are images.
    """
    if images is not None:
        raise ValueError(f"--images {images}: bench overhead trains on generated letters; leave --images out")
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
        # OMP_NUM_THREADS is set for both: Ray and torchrun would each choose a default of their own.
        ray_train = Side(f"{SIDES_FILE}:ray_train", arguments, each)
        torchrun = Side(f"{SIDES_FILE}:torchrun", arguments | {"world_size": ranks}, each)
        with ray_train, torchrun:
            what = "epochs of the demo's three stages, Ray Train against torchrun"
            rows = [compare(what, "s", ray_train.measure, torchrun.measure, runs, more_is_better=False)]
        notes = [
            f"ranks: {ranks}, {each} compute and {each} decoding thread each, gloo; {num_train} images; steps and "
            "waiting of all epochs but a stage's first, without evaluation and checkpoints",
            *_by_stage(Path(scratch)),
        ]
    return rows, notes


def _by_stage(scratch: Path) -> Iterator[str]:
    """Medians over the epochs of all measured runs."""
    from jobs.benchmarks.loop_sides import steady_epochs

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
