"""What prepares, each as a side (harness.Side): one value is images/s from a folder of class folders to finished files.

Counted: finding the images, starting the processes, all work. Not counted: the interpreter's start and imports. What is
done only here is paid for here: every image is proved sound, files have digests and are forced to disk.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

QUALITY = 90

Check = Literal["data", "header"]


def ours(images: str, scratch: str, max_side: int | None, threads: int, check: Check = "data") -> Iterator[float]:
    """This project's; the shorter side of what is stored has at most `max_side` pixels."""
    from datasets.prepare import prepare

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
    os.environ["TQDM_DISABLE"] = "1"  # its progress bar, which nobody could read between ours
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
    """The indexable data set that DatasetWriter takes: (RGB image, label) of FOLDER/CLASS/FILE."""

    def __init__(self, folder: Path):
        classes = sorted(path for path in folder.iterdir() if path.is_dir())
        self.files = [(path, label) for label, one in enumerate(classes) for path in sorted(one.iterdir())]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        from PIL import Image

        path, label = self.files[index]
        return Image.open(path).convert("RGB"), label
