"""bench prepare: images/s from JPEGs to betons, where they are kept as they are and where all are resized."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import turbojpeg
from jobs.benchmarks.harness import Row, Side, compare
from jobs.benchmarks.photographs import write_photographs

NUM_IMAGES = 4096
RESIZED = 256
SIDES_FILE = "jobs.benchmarks.prepare_sides"


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """All rows of the table, and notes on them."""
    with TemporaryDirectory(prefix="bench-prepare-") as scratch, ExitStack() as stack:
        folder = write_photographs(Path(scratch) / "images", images, NUM_IMAGES)

        def side(name: str, max_side: int | None, **more: str) -> Side:
            arguments = {"images": str(folder), "scratch": scratch, "max_side": max_side, "threads": threads, **more}
            return stack.enter_context(Side(f"{SIDES_FILE}:{name}", arguments, threads))

        kept, resized = side("ffcv", None), side("ffcv", round(RESIZED * elongation(folder)))
        rows = [
            compare(f"{name}, against FFCV's DatasetWriter", "images/s", ours.measure, peer.measure, runs)
            for name, ours, peer in (
                ("kept, header checked", side("ours", None, check="header"), kept),
                ("kept, all data checked", side("ours", None), kept),
                (f"resized to {RESIZED}", side("ours", RESIZED), resized),
            )
        ]
    return rows, [
        f"{threads} processes, {NUM_IMAGES} images, {'--images ' + str(images) if images else 'generated'}",
        "FFCV decodes and encodes what is kept here",
    ]


def elongation(folder: Path) -> float:
    """Longer by shorter side, the usual one of JPEGs in class folders: FFCV limits the one, this project the other."""
    headers = [turbojpeg.read_header(path.read_bytes()) for path in islice(folder.glob("*/*"), 200)]
    return statistics.median(max(one.width, one.height) / min(one.width, one.height) for one in headers)
