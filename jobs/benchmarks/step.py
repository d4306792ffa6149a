"""bench step: images/s and memory of a training step of each stage, beside a plain PyTorch step that does the same."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets.glyphs import GlyphSettings
from datasets.prepare import prepare
from jobs.benchmarks.harness import Row, Side, compare
from jobs.benchmarks.photographs import write_photographs
from jobs.benchmarks.step_sides import WORK

BATCH = 32
WORK_ON_CPU = {**WORK, "backbone stage, bfloat16": {"stage": "backbone", "precision": "bfloat16"}}
"""in bfloat16 as well: CPUs with matrix units (AMX) train in it faster"""
VALUES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("speed", "images/s", {}),
    ("memory", "MB", {}),
    ("memory in use", "MB", {"MALLOC_MMAP_THRESHOLD_": str(2**20)}),
)
NUM_PHOTOGRAPHS, NUM_GLYPHS = 144, 2112
"""for the predictor stage: two batches and 33 of training images, and a small validation part"""
SIDES_FILE = "jobs.benchmarks.step_sides"


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """All rows of the table, and notes on them."""
    notes = [
        f"{threads} threads; backbone and joint stage: ResNet-18, 100 classes, batches of {BATCH}, SGD with momentum, "
        "images in memory; the peers: default memory layout, all resolutions' graphs at once, one backward",
        "memory: what the process grows by at most, from the built model on, during a step that is not its first; "
        "in use: the same with an allocator that returns every block of 1 MB at once and keeps none, on both sides",
    ]
    rows = []
    for name, work in WORK_ON_CPU.items():
        for value, unit, variables in VALUES:
            arguments = {**work, "value": value.split()[0], "batch": BATCH}
            ours, peer = (Side(f"{SIDES_FILE}:{who}", arguments, threads, variables) for who in ("ours", "naive"))
            what = f"{name}, {value}, against all resolutions at once"
            with ours, peer:
                rows.append(compare(what, unit, ours.measure, peer.measure, runs, more_is_better=value == "speed"))
    return [*rows, *_predictor(images, runs, threads, notes)], notes


def _predictor(images: Path | None, runs: int, threads: int, notes: list[str]) -> list[Row]:
    rows = []
    with TemporaryDirectory(prefix="bench-step-") as scratch:
        folder = Path(scratch)
        photographs = write_photographs(folder / "photographs", images, NUM_PHOTOGRAPHS)
        prepare("imagefolder", folder / "data-imagenet100", source=photographs, validation_fraction=0.1)
        glyphs = GlyphSettings(num_train=NUM_GLYPHS, num_validation=NUM_GLYPHS // 10)
        prepare("glyphs", folder / "data-glyphs", glyphs=glyphs)
        for config, what in (("imagenet100", "ResNet-50, 224+168+112"), ("glyphs", "the demo's network, 96+48+32")):
            rows.append(_table(config, what, folder, runs, threads, notes))
    return rows


def _table(config: str, what: str, folder: Path, runs: int, threads: int, notes: list[str]) -> Row:
    with ExitStack() as stack:

        def side(logits: str) -> Side:
            arguments = {"config": config, "data": str(folder / f"data-{config}"), "logits": logits, "threads": threads}
            return stack.enter_context(Side("jobs.benchmarks.loop_sides:predictor", arguments, threads))

        table, live = side("table"), side("live")
        row = compare(f"predictor stage, {what}, table against live", "images/s", table.measure, live.measure, runs)
    notes.append(_cost_of(what, table.once, row))
    return row


def _cost_of(what: str, filled: float, row: Row) -> str:
    """What a view of the table costs, and how many epochs have to show it to have it back."""
    epochs = (1 / filled) / (1 / row.peer - 1 / row.ours)
    return (
        f"{what}: a view of the table is computed once, at {filled:.3g} images/s, which takes {row.peer / filled:.2f} "
        f"of an epoch of live training, and has paid for itself when {epochs:.1f} epochs have shown it"
    )
