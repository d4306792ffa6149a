"""bench loader: images/s of data loaders on photographs, and the memory that epochs and interrupted epochs take."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import PREDICTOR_SIZE, RESOLUTIONS, Row, Side, compare, memory_mb

# Memory and the first batch of a process are measured, so a side imports only what it needs.

NUM_IMAGES = 2048
BATCH = 64
SIDES = (*RESOLUTIONS, PREDICTOR_SIZE)
NUM_BREAKS = 10


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """Measure all rows of the table, and return them with notes."""
    from benchmarks.photographs import write_photographs
    from datasets.beton import TRAIN, VALIDATION, beton_path
    from datasets.prepare.prepare import prepare

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
            return stack.enter_context(Side(f"{__name__}:{name}", arguments, threads))

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
    for use, name in (("half", "half an epoch"), ("all", "an epoch"), ("breaks", f"{NUM_BREAKS} interrupted epochs")):
        arguments = {"beton": beton, "threads": threads, "use": use}
        ours, peer = (Side(f"{__name__}:{who}_memory", arguments, threads) for who in ("ours", "ffcv"))
        what = f"memory after {name}, against FFCV"
        with ours, peer:
            first = ours.measure(), peer.measure()
            rows.append(compare(what, "MB", ours.measure, peer.measure, runs, more_is_better=False))
            grown = (ours.measure() - first[0], peer.measure() - first[1])
        notes.append(f"{name}, {runs + 1} times more: {grown[0]:+.1f} MB here, {grown[1]:+.1f} MB with FFCV")
    return rows


def _first_batch(beton: str, runs: int, threads: int) -> Row:
    sides = []
    for name in ("ours", "ffcv"):
        arguments = {"side": name, "arguments": {"beton": beton, "sides": [SIDES[0]]}, "threads": threads}
        sides.append(Side(f"{__name__}:first_batch", arguments, threads))
    ours, peer = sides
    with ours, peer:  # entering measures once; after that, everything that can stay compiled is compiled
        return compare("process start to first batch", "s", ours.measure, peer.measure, runs, more_is_better=False)


def ours(beton: str, sides: list[int], threads: int) -> Iterator[float]:
    """Yield the images/s of this project's loader: one decode and one crop of each image for all sides."""
    loader = _our_loader(beton, sides, threads)
    epoch = 0
    while True:
        yield _rate(loader.epoch(epoch), lambda batch: batch.labels)
        epoch += 1


def _our_loader(beton: str, sides: list[int], threads: int) -> Any:
    from datasets.loading.loader import MultiResolutionLoader, RandomResizedCrop

    return MultiResolutionLoader(Path(beton), sides, BATCH, crop=RandomResizedCrop(), shuffle=True, num_threads=threads)


def ffcv(beton: str, sides: list[int], threads: int) -> Iterator[float]:
    """Yield the images/s of FFCV as shipped: a pipeline for each side, each with its own decode and crop."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    images = {
        f"image_{side}": PipelineSpec(
            "image",
            decoder=RandomResizedCropRGBImageDecoder((side, side)),
            transforms=[RandomHorizontalFlip(), ToTensor()],
        )
        for side in sides
    }
    loader = _ffcv_loader(beton, threads, {**images, "image": None}, drop_last=False)
    while True:
        yield _rate(loader, lambda batch: batch[0])


def _ffcv_loader(beton: str, threads: int, images: Mapping[str, Any], **options: Any) -> Any:
    from ffcv.fields.decoders import IntDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    return Loader(
        beton,
        batch_size=BATCH,
        num_workers=threads,
        order=OrderOption.RANDOM,
        os_cache=True,
        pipelines={**images, "checksum": None, "label": [IntDecoder(), ToTensor()]},
        **options,
    )


def torchvision(folder: str, sides: list[int], threads: int) -> Iterator[float]:
    """Yield the images/s of torchvision's ImageFolder and transforms in torch's DataLoader, one process per thread."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    (side,) = sides
    transform = v2.Compose([v2.RandomResizedCrop(side), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    torch.set_num_threads(1)
    loader = DataLoader(
        ImageFolder(folder, transform),
        batch_size=BATCH,
        shuffle=True,
        num_workers=threads,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    while True:
        yield _rate(loader, lambda batch: batch[1])


def dali(folder: str, sides: list[int], threads: int) -> Iterator[float]:
    """Yield the images/s of NVIDIA DALI's CPU pipeline: one decode and one crop for all sides, as in this project."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None, seed=0)
    def pipeline():
        jpegs, labels = fn.readers.file(file_root=folder, random_shuffle=True, name="reader")
        area, ratio = [0.08, 1.0], [3 / 4, 4 / 3]
        crops = fn.decoders.image_random_crop(jpegs, random_area=area, random_aspect_ratio=ratio)
        mirrored = fn.random.coin_flip()
        images = [fn.flip(fn.resize(crops, size=(side, side)), horizontal=mirrored) for side in sides]
        return (*images, labels)

    built = pipeline()
    built.build()
    steps = -(-built.epoch_size("reader") // BATCH)
    while True:
        yield _rate((built.run() for _ in range(steps)), lambda batch: batch[-1])


def decoding(beton: str, sides: list[int], threads: int) -> Iterator[float]:
    """Yield the limit of every loader that decodes all pixels: the images/s of libjpeg-turbo alone, on all threads."""
    from concurrent.futures import ThreadPoolExecutor

    from datasets import turbojpeg
    from datasets.beton import read_jpeg, read_layout

    path = Path(beton)
    jpegs = [read_jpeg(path, index) for index in range(len(read_layout(path).metadata))]
    headers = [turbojpeg.read_header(jpeg) for jpeg in jpegs]
    with ThreadPoolExecutor(threads) as pool:
        while True:
            start = time.perf_counter()
            for _ in pool.map(turbojpeg.decode, jpegs, headers):
                pass
            yield len(jpegs) / (time.perf_counter() - start)


def _rate(epoch: Iterable, labels) -> float:
    """Return the images/s of an epoch."""
    start = time.perf_counter()
    count = sum(len(labels(batch)) for batch in epoch)
    return count / (time.perf_counter() - start)


def ours_memory(beton: str, threads: int, use: str) -> Iterator[float]:
    """Yield the MB after using this project's loader for `half` an epoch, `all` of it, or interrupted epochs."""
    import numpy as np

    loader = _our_loader(beton, [SIDES[0]], threads)
    batches = np.array_split(np.arange(loader.num_samples), loader.num_batches)
    while True:
        if use == "breaks":
            for epoch in range(NUM_BREAKS):
                for _ in loader.epoch(epoch):
                    break
        else:
            _rate(loader.read(0, batches[: len(batches) // (2 if use == "half" else 1)]), lambda batch: batch.labels)
        yield memory_mb("RssAnon")


def ffcv_memory(beton: str, threads: int, use: str) -> Iterator[float]:
    """Yield the MB after the same use of FFCV's loader as shipped."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.transforms import ToTensor

    from datasets.beton import read_layout

    count = len(read_layout(Path(beton)).metadata)
    image = [RandomResizedCropRGBImageDecoder((SIDES[0], SIDES[0])), ToTensor()]
    indices = range(count // 2 if use == "half" else count)
    loader = _ffcv_loader(beton, threads, {"image": image}, indices=indices)
    while True:
        if use == "breaks":
            for _ in range(NUM_BREAKS):
                for _ in loader:
                    break
        else:
            _rate(loader, lambda batch: batch[0])
        yield memory_mb("RssAnon")


def first_batch(side: str, arguments: dict[str, Any], threads: int) -> Iterator[float]:
    """Yield the seconds from the start of a new process to the end of a side's first epoch, which has one batch."""
    while True:
        start = time.perf_counter()
        with Side(f"{__name__}:{side}", arguments | {"threads": threads}, threads):
            seconds = time.perf_counter() - start
        yield seconds
