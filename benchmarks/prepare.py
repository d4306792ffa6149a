"""bench prepare: images/s from JPEGs to betons: with JPEGs kept, with all resized, and from shards of both formats."""

from __future__ import annotations

import io
import json
import os
import statistics
import tarfile
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
NUM_IMAGES_IN_SHARDS = {"train": 13_312, "validation": 3_072}
"""The number of images of each split in shards. The splits have files of their own, as in published data sets."""
IMAGES_IN_SHARD, ROWS_IN_GROUP = 2_048, 100
RESIZED = 256
QUALITY = 90
Check = Literal["data", "header"]


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """Measure all rows of the table, and return them with notes."""
    with TemporaryDirectory(prefix="bench-prepare-") as scratch, ExitStack() as stack:
        folder = write_photographs(Path(scratch) / "images", images, NUM_IMAGES)

        def side(name: str, max_side: int | None, **more: str) -> Side:
            arguments = {"images": str(folder), "scratch": scratch, "max_side": max_side, "threads": threads} | more
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
        # Use more images, so that this measures reading them rather than the import of pyarrow in each process.
        many = Path(scratch) / "many"
        for split, count in NUM_IMAGES_IN_SHARDS.items():
            write_photographs(many / split, images, count)
        folders = side("ours", None, images=str(many))
        for name, write in (("Parquet", write_parquet), ("WebDataset", write_tars)):
            shards = side("ours", None, images=str(write(many, Path(scratch) / name)))
            row_name = f"from {name}, against class folders"
            rows.append(compare(row_name, "images/s", shards.measure, folders.measure, runs))
    return rows, [
        f"{threads} processes, {NUM_IMAGES} images, {'--images ' + str(images) if images else 'generated'}",
        "FFCV decodes and encodes the files that this project keeps",
        f"shards: {sum(NUM_IMAGES_IN_SHARDS.values())} images in two splits, {IMAGES_IN_SHARD} in a shard, "
        f"{ROWS_IN_GROUP} in a row group of Parquet",
    ]


def write_parquet(images: Path, folder: Path) -> Path:
    """Write the class folders of each split as Parquet files in the layout of Hugging Face's image data sets."""
    import pyarrow as pa
    from pyarrow import parquet

    names = ClassFolders(images / "train").classes
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata)
    folder.mkdir()
    for name, files in shards_of(images):
        rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}, "label": label} for path, label in files]
        parquet.write_table(
            pa.Table.from_pylist(rows, schema), folder / f"{name}.parquet", row_group_size=ROWS_IN_GROUP
        )
    return folder


def write_tars(images: Path, folder: Path) -> Path:
    """Write the class folders of each split as WebDataset tars of .jpg and .cls."""
    folder.mkdir()
    for name, files in shards_of(images):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for number, (path, label) in enumerate(files):
                for suffix, content in (("jpg", path.read_bytes()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def shards_of(images: Path) -> Iterator[tuple[str, list[tuple[Path, int]]]]:
    """Yield the name of each shard, and its images and labels."""
    for split in NUM_IMAGES_IN_SHARDS:
        files = ClassFolders(images / split).files
        count = -(-len(files) // IMAGES_IN_SHARD)
        for shard in range(count):
            yield f"{split}-{shard:05d}-of-{count:05d}", files[shard::count]


def elongation(folder: Path) -> float:
    """Return the median ratio of longer to shorter side: FFCV limits the longer side, this project the shorter one."""
    headers = [turbojpeg.read_header(path.read_bytes()) for path in islice(folder.glob("*/*"), 200)]
    return statistics.median(max(one.width, one.height) / min(one.width, one.height) for one in headers)


def ours(images: str, scratch: str, max_side: int | None, threads: int, check: Check = "data") -> Iterator[float]:
    """Yield the images/s of this project's `prepare`; a stored image's shorter side has at most `max_side` pixels."""
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
    """Yield the images/s of FFCV's DatasetWriter, which decodes and encodes every image.

    The longer side of a stored image has at most `max_side` pixels.
    """
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
        self.classes = [path.name for path in classes]
        self.files = [(path, label) for label, one in enumerate(classes) for path in sorted(one.iterdir())]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        from PIL import Image

        path, label = self.files[index]
        return Image.open(path).convert("RGB"), label
