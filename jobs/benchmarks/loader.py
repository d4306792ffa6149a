"""bench loader: images/s of loaders over photographs, and what an epoch and a break out of it leave behind."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets.beton import TRAIN, VALIDATION, beton_path
from datasets.prepare import prepare
from jobs.benchmarks.harness import Row, Side, compare
from jobs.benchmarks.photographs import write_photographs

NUM_IMAGES = 2048
SIDES = (224, 168, 112, 128)
SIDES_FILE = "jobs.benchmarks.loader_sides"


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """All rows of the table, and notes on them."""
    notes = [f"{threads} threads, {NUM_IMAGES} images, {'--images ' + str(images) if images else 'generated'}"]
    with TemporaryDirectory(prefix="bench-loader-") as scratch:
        folder, data = Path(scratch) / "images", Path(scratch) / "data"
        write_photographs(folder, images, NUM_IMAGES)
        prepare("imagefolder", data, source=folder, validation_fraction=0.03)
        rows = [
            *_speed(str(folder), str(beton_path(data, TRAIN)), runs, threads, notes),
            *_memory(str(beton_path(data, TRAIN)), runs, threads, notes),
            _first_batch(str(beton_path(data, VALIDATION)), runs, threads),
        ]
    return rows, notes


def _speed(folder: str, beton: str, runs: int, threads: int, notes: list[str]) -> list[Row]:
    names = "+".join(map(str, SIDES))
    with ExitStack() as stack:

        def side(name: str, sides: tuple[int, ...], **source: str) -> Side:
            arguments = {"sides": list(sides), "threads": threads, **source}
            return stack.enter_context(Side(f"{SIDES_FILE}:{name}", arguments, threads))

        one, four = side("ours", SIDES[:1], beton=beton), side("ours", SIDES, beton=beton)
        decoding = side("decoding", (), beton=beton)
        peers = [
            ("224, against FFCV", one, side("ffcv", SIDES[:1], beton=beton)),
            ("224, against torchvision", one, side("torchvision", SIDES[:1], folder=folder)),
            (f"{names}, against FFCV", four, side("ffcv", SIDES, beton=beton)),
            ("224, against decoding alone", one, decoding),
            (f"{names}, against decoding alone", four, decoding),
        ]
        if find_spec("nvidia") and find_spec("nvidia.dali"):
            peers.append((f"{names}, against DALI", four, side("dali", SIDES, folder=folder)))
        else:
            notes.append("NVIDIA DALI is not installed, so it is not measured")
        return [compare(name, "images/s", ours.measure, peer.measure, runs) for name, ours, peer in peers]


def _memory(beton: str, runs: int, threads: int, notes: list[str]) -> list[Row]:
    rows = []
    for use, name in (("half", "half an epoch"), ("all", "an epoch"), ("breaks", "10 breaks out of an epoch")):
        arguments = {"beton": beton, "sides": [SIDES[0]], "threads": threads, "use": use}
        ours, peer = (Side(f"{SIDES_FILE}:{who}_memory", arguments, threads) for who in ("ours", "ffcv"))
        with ours, peer:
            first = ours.measure(), peer.measure()
            rows.append(
                compare(
                    f"memory after {name}, against FFCV", "MB", ours.measure, peer.measure, runs, more_is_better=False
                )
            )
            grown = (ours.measure() - first[0], peer.measure() - first[1])
        notes.append(f"{name}, {runs + 1} times more: {grown[0]:+.1f} MB here, {grown[1]:+.1f} MB with FFCV")
    return rows


def _first_batch(beton: str, runs: int, threads: int) -> Row:
    sides = []
    for name in ("ours", "ffcv"):
        arguments = {"side": name, "arguments": {"beton": beton, "sides": [SIDES[0]]}, "threads": threads}
        sides.append(Side(f"{SIDES_FILE}:first_batch", arguments, threads))
    ours, peer = sides
    with ours, peer:  # entering measures once: from then on what can be kept compiled is
        return compare("process start to first batch", "s", ours.measure, peer.measure, runs, more_is_better=False)
