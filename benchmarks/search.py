"""bench search: a trial on logit tables against live training, and two trials at once against one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.harness import Row, Side, compare
from benchmarks.photographs import write_photographs
from benchmarks.runs import opened_run
from datasets.beton import TRAIN, beton_path, load_manifest
from datasets.loading.decoded import DecodedCrops, Ordered
from datasets.prepare.prepare import prepare
from datasets.sources.glyphs import GlyphSettings
from pipeline.config.load import parse_config
from pipeline.training.logit_table import LogitTable, TableKey, fill_table
from pipeline.training.loop import StageData, prepare_stage, train_epoch
from pipeline.training.monitoring import DivergenceMonitor
from pipeline.training.objectives import Forward
from pipeline.training.run import Progress, Run

STAGE = "predictor"
NUM_PHOTOGRAPHS, NUM_GLYPHS = 128, 1024
TRIALS = 40


@dataclass(frozen=True)
class Case:
    """One model to measure.

    Attributes:
        model: the model section of the configuration.
        table_epochs, live_epochs: numbers of epochs of one measurement, on the table and live.
    """

    name: str
    model: dict[str, Any]
    batch_size: int
    table_epochs: int
    live_epochs: int


RESNET50 = Case(
    "ResNet-50 at 224, 168, 112, architecture 3 at 128",
    {"backbone": "resnet50", "resolutions": [224, 168, 112], "predictor": {"architecture": 3, "input_size": 128}},
    batch_size=32,
    table_epochs=4,
    live_epochs=1,
)
GLYPHS = Case(
    "glyphs, small_resnet at 96, 48, 32, architecture 2 at 32",
    {
        "backbone": "small_resnet",
        "resolutions": [96, 48, 32],
        "predictor": {"architecture": 2, "input_size": 32, "width": 0.25, "dropout": 0.0},
    },
    batch_size=64,
    table_epochs=4,
    live_epochs=2,
)


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """Measure all rows of the table, and return them with notes."""
    rows = []
    with TemporaryDirectory(prefix="bench-search-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        photographs = write_photographs(folder / "images", images, NUM_PHOTOGRAPHS)
        prepare("imagefolder", folder / "photographs", source=photographs, validation_fraction=0.25)
        glyphs = GlyphSettings(num_train=NUM_GLYPHS, num_validation=64)
        prepare("glyphs", folder / "glyphs", glyphs=glyphs, show_progress=False)

        def side(name: str, case: Case, data: str, num_threads: int, scratch_name: str) -> Side:
            given: dict[str, Any] = {
                "model": case.model,
                "batch_size": case.batch_size,
                "epochs": case.live_epochs if name == "live" else case.table_epochs,
            }
            given |= {"data": str(folder / data), "scratch": str(folder / scratch_name), "threads": num_threads}
            return stack.enter_context(Side(f"{__name__}:{name}", given, num_threads))

        for case, data in ((RESNET50, "photographs"), (GLYPHS, "glyphs")):
            ours, peer = side("on_table", case, data, threads, f"{data}-tables"), side("live", case, data, threads, "")
            name = f"{case.name}: a trial on the table, 1/{TRIALS} of its cost included, against live"
            rows.append(compare(name, "images/s", ours.measure, peer.measure, runs))
        pair = [side("on_table", GLYPHS, "glyphs", 1, f"trial-{number}") for number in range(2)]
        name = "glyphs: two trials at once, of one thread each, against one"
        rows.append(compare(name, "images/s", lambda: at_once([one.measure for one in pair]), pair[0].measure, runs))
    return rows, [
        f"{threads} threads on each side of the first two rows; both use the same loop and the same crops",
        "on the table: the predictor's inputs are decoded before, once for all trials, as in jobs.tune",
        "the table has a crop for every epoch; with fewer crops its share of the time is smaller",
    ]


def at_once(measures: list[Callable[[], float]]) -> float:
    """Run all measurements at the same time and return the sum."""
    with ThreadPoolExecutor(len(measures)) as threads:
        return sum(threads.map(lambda measure: measure(), measures))


def on_table(**given: Any) -> Iterator[float]:
    """Yield the images/s of a trial, including its share of the table's cost."""
    with _opened(**given) as run:
        scratch, crop_epochs = Path(given["scratch"]), range(1)
        key = TableKey.of(run.model, run.config, run.manifest, TRAIN)
        started = time.perf_counter()
        backbone_logits = Forward(run.model, key.precision).frozen_backbone
        fill_table(scratch, key, crop_epochs, run.train, backbone_logits, device=run.device, show=lambda _: None)
        table_seconds = (time.perf_counter() - started) / run.train.num_samples
        sides = (run.model.predictor_size,)
        decoded = DecodedCrops(scratch, beton_path(run.config.data.folder, TRAIN), {}, crop_epochs, sides)
        decoded.fill(run.train)
        ordered = Ordered(decoded, given["batch_size"], shuffle=True, seed=run.config.seed)
        data = StageData(ordered, run.validation, 0, 1, sides, LogitTable(scratch, key, crop_epochs))
        for speed in _speeds(replace(run, train=ordered), data, given["epochs"]):
            yield 1 / (1 / speed + table_seconds / TRIALS)


def live(**given: Any) -> Iterator[float]:
    """Yield the images/s of the same predictor if every step runs the backbone."""
    with _opened(**given) as run:
        yield from _speeds(run, StageData(run.train, run.validation, 0, 1), given["epochs"])


def _opened(
    model: Mapping[str, Any], batch_size: int, data: str, threads: int, scratch: str, **_: Any
) -> AbstractContextManager[Run]:
    torch.set_num_threads(threads)
    stage = {"epochs": 1000, "optimizer": "adamw", "lr": 0.001, "alpha_gflops": 1.0}
    config = parse_config(
        {
            "name": "bench",
            "data": {"dataset": load_manifest(Path(data)).dataset, "folder": data, "source": "images"},
            "model": dict(model),
            "training": {"batch_size": batch_size},
            "stages": {STAGE: stage},
        }
    )
    return opened_run(config, Path(scratch))


def _speeds(run: Run, data: StageData, epochs: int) -> Iterator[float]:
    """Yield the images/s, over `epochs` epochs at a time."""
    stage = run.config.stages.predictor
    assert stage is not None
    work, epoch = prepare_stage(run, stage, 0, DivergenceMonitor(None), data=data), 0
    while True:
        speeds = []
        for _ in range(epochs):
            progress = Progress(STAGE, epoch, stage.epochs, epoch, 0, run.train.num_batches)
            speeds.append(train_epoch(run, work, progress)["train_images_per_second"])
            epoch += 1
        yield statistics.harmonic_mean(speeds)
