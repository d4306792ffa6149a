"""bench search: a trial on logit tables against the same predictor trained live, and two trials at once against one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets.glyphs import GlyphSettings
from datasets.prepare import prepare
from jobs.benchmarks.harness import Row, Side, compare
from jobs.benchmarks.photographs import write_photographs

NUM_PHOTOGRAPHS, NUM_GLYPHS = 128, 1024
TRIALS = 40
SIDES_FILE = "jobs.benchmarks.search_sides"


@dataclass(frozen=True)
class Case:
    """What is searched for.

    Attributes:
        model: sections of the configuration.
        epochs: of one measured value, on the table and live.
    """

    name: str
    model: dict[str, Any]
    batch_size: int
    epochs: tuple[int, int]


RESNET50 = Case(
    "ResNet-50 at 224, 168, 112, architecture 3 at 128",
    {"backbone": "resnet50", "resolutions": [224, 168, 112], "predictor": {"architecture": 3, "input_size": 128}},
    batch_size=32,
    epochs=(4, 1),
)
GLYPHS = Case(
    "glyphs, small_resnet at 96, 48, 32, architecture 2 at 32",
    {
        "backbone": "small_resnet",
        "resolutions": [96, 48, 32],
        "predictor": {"architecture": 2, "input_size": 32, "width": 0.25, "dropout": 0.0},
    },
    batch_size=64,
    epochs=(4, 2),
)


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """All rows of the table, and notes on them."""
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
                "epochs": case.epochs[name == "live"],
            }
            given |= {"data": str(folder / data), "scratch": str(folder / scratch_name), "threads": num_threads}
            return stack.enter_context(Side(f"{SIDES_FILE}:{name}", given, num_threads))

        for case, data in ((RESNET50, "photographs"), (GLYPHS, "glyphs")):
            ours, peer = side("on_table", case, data, threads, f"{data}-tables"), side("live", case, data, threads, "")
            name = f"{case.name}: a trial on the table, 1/{TRIALS} of its cost included, against live"
            rows.append(compare(name, "images/s", ours.measure, peer.measure, runs))
        pair = [side("on_table", GLYPHS, "glyphs", 1, f"trial-{number}") for number in range(2)]
        name = "glyphs: two trials at once, of one thread each, against one"
        rows.append(compare(name, "images/s", lambda: at_once([one.measure for one in pair]), pair[0].measure, runs))
    return rows, [
        f"{threads} threads on each side of the first two rows; both train by the same loop, from the same crops",
        "on the table: the predictor's inputs are decoded before, once for all trials, as jobs.tune has them",
        "the table has a view for every epoch; with fewer views its share is smaller",
    ]


def at_once(measures: list[Callable[[], float]]) -> float:
    """The sum of what is measured at the same time."""
    with ThreadPoolExecutor(len(measures)) as threads:
        return sum(threads.map(lambda measure: measure(), measures))
