"""bench prepare: images/s from JPEGs to betons, with the files kept as they are and with all images resized."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from benchmarks.harness import Row, Side, compare
from benchmarks.photographs import write_photographs
from datasets import turbojpeg

NUM_IMAGES = 4096
RESIZED = 256
QUALITY = 90
Check = Literal["data", "header"]


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """Measure all rows of the table; return them with notes."""
    with TemporaryDirectory(prefix="bench-prepare-") as scratch, ExitStack() as stack:
        folder = write_photographs(Path(scratch) / "images", images, NUM_IMAGES)

        def side(name: str, max_side: int | None, **more: str) -> Side:
            arguments = {"images": str(folder), "scratch": scratch, "max_side": max_side, "threads": threads, **more}
            return stack.enter_context(Side(f"{__name__}:{name}", arguments, threads))

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
        "FFCV decodes and encodes the files that this project keeps",
    ]


def elongation(folder: Path) -> float:
    """The median ratio of longer to shorter side: FFCV limits the longer side, this project the shorter one."""
    headers = [turbojpeg.read_header(path.read_bytes()) for path in islice(folder.glob("*/*"), 200)]
    return statistics.median(max(one.width, one.height) / min(one.width, one.height) for one in headers)


def ours(images: str, scratch: str, max_side: int | None, threads: int, check: Check = "data") -> Iterator[float]:
    """This project's `prepare`; the shorter side of a stored image has at most `max_side` pixels."""
    from datasets.prepare.prepare import prepare

    while True:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            done = prepare(
                "imagefolder",
                Path(folder),
                source=Path(images),
                max_side=max_side,
                jpeg_quality=QUALITY,
                check_images=check,
                num_processes=threads,
            )
        yield done.num_images / done.seconds


def ffcv(images: str, scratch: str, max_side: int | None, threads: int) -> Iterator[float]:
    """FFCV's DatasetWriter, which decodes and encodes every image; the longer side has at most `max_side` pixels."""
    os.environ["TQDM_DISABLE"] = "1"  # no progress bars
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    while True:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            start = time.perf_counter()
            data = ClassFolders(Path(images))
            image = RGBImageField(write_mode="jpg", max_resolution=max_side, jpeg_quality=QUALITY)
            writer = DatasetWriter(f"{folder}/ffcv.beton", {"image": image, "label": IntField()}, num_workers=threads)
            writer.from_indexed_dataset(data)
            seconds = time.perf_counter() - start
        yield len(data) / seconds


class ClassFolders:
    """The indexable data set that DatasetWriter reads: (RGB image, label) of FOLDER/CLASS/FILE."""

    def __init__(self, folder: Path):
        classes = sorted(path for path in folder.iterdir() if path.is_dir())
        self.files = [(path, label) for label, one in enumerate(classes) for path in sorted(one.iterdir())]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        from PIL import Image

        path, label = self.files[index]
        return Image.open(path).convert("RGB"), label
