"""bench inference: the time that routing saves in one process, from JPEG bytes and over HTTP."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

from benchmarks.harness import MEAN, NUM_CLASSES, PREDICTOR_SIZE, RESOLUTIONS, STD, Row, compare, paired
from benchmarks.photographs import write_photographs
from pipeline.config.schema import ModelConfig
from pipeline.models.drnet import build_drnet
from pipeline.serving.export import export_model
from pipeline.serving.runtime import Classifier, RoutedNetwork
from pipeline.serving.runtime.images import Picture
from pipeline.serving.runtime.policy import ALWAYS, NEVER, Policy, confidence
from pipeline.training.checkpoint import LoadedModel

NETWORKS = ("resnet50", "resnet18")
SERVED = "resnet18"
NUM_IMAGES, PASSES = 128, 4
CALLS = {1: 12, 8: 3, 64: 1}
"""The number of calls per run, by batch size."""
ARCHITECTURE, FRACTION = 3, 0.875
"""The predictor's architecture, and the share of the shorter side that a validation crop takes."""
Crops = dict[int, Tensor]
Samples = dict[str, list[list[float]]]
"""The seconds by timed part, run, and call."""


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """Measure all rows of the table, and return them with notes."""
    torch.set_num_threads(threads)
    rows: list[Row] = []
    notes = [f"{threads} threads; 100 classes, a third of the images at each of 224, 168 and 112 px, predictor 3"]
    with TemporaryDirectory(prefix="bench-inference-") as scratch:
        photographs = write_photographs(Path(scratch) / "images", images, NUM_IMAGES)
        files = [path.read_bytes() for path in sorted(photographs.rglob("*.jpg"))]
        for name in NETWORKS:
            folder = Path(scratch) / name
            folder.mkdir()
            export_model(build_model(name), folder)
            found, lines = program_rows(name, FixedMix(folder), runs)
            rows += found
            notes += lines
        name = "decoding and crops, one thread, against whole decodes and all crops"
        as_needed, everything = partial(decode_as_needed, files), partial(decode_everything, files)
        rows.append(compare(name, "images/s", as_needed, everything, runs))
        found, lines = _served(Path(scratch), files, runs, threads)
    return [*rows, *found], [*notes, *lines]


def _served(scratch: Path, files: list[bytes], runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """Measure the model over HTTP against the same classifier in this process, from JPEG bytes."""
    from benchmarks.servers import NUM_CLIENTS, REQUESTS, Server
    from pipeline.serving.package import save_pyfunc

    folder = scratch / "registered"
    save_pyfunc(build_model(SERVED), folder)
    name = f"{SERVED} over HTTP, {NUM_CLIENTS} clients of one image a request, against no HTTP"
    classifier = classifier_rate(folder / "artifacts" / "drnet", files * PASSES)
    with classifier as alone, Server(folder, files, threads) as server:
        server.measure()
        server.latencies.clear()
        row = compare(name, "images/s", server.measure, alone, runs)
    return [row], [f"over HTTP: {runs} x {REQUESTS:,} requests, {server.num_errors} errors; {server.summary()}"]


def build_model(backbone: str) -> LoadedModel:
    """Return an untrained network, which costs the same as a trained one."""
    predictor = {"architecture": ARCHITECTURE, "input_size": PREDICTOR_SIZE}
    config = ModelConfig.model_validate({"backbone": backbone, "resolutions": RESOLUTIONS, "predictor": predictor})
    torch.manual_seed(0)
    model = build_drnet(config, NUM_CLASSES, MEAN, STD).eval()
    return LoadedModel(model, config, tuple(map(str, range(NUM_CLASSES))), MEAN, STD, FRACTION)


class FixedMix(RoutedNetwork):
    """A network that runs its predictor as usual, but sends image i of a batch to resolution (first + i) modulo R."""

    first = 0

    def first_resolution(self, policy: Policy, predictor_logits_NR: Tensor | None, num_images: int) -> Tensor:
        """Return (first + i) modulo R for image i, int64 (N,), or what the policy says if it does not use the
        predictor."""
        if not policy.needs_predictor:
            return super().first_resolution(policy, predictor_logits_NR, num_images)
        return (torch.arange(num_images) + self.first) % len(self.resolutions)

    def routed(self, crops: Crops, first: int = 0) -> None:
        """Run the default policy on the crops, with image i at resolution (first + i) modulo R."""
        self.first = first
        self.classify(crops)

    def cascaded(self, crops: Crops, policy: Policy) -> None:
        """Run a cascade on the crops."""
        self.classify(crops, policy)

    def thirds(self, crops: Crops) -> Policy:
        """Return a cascade in which a third of these images stops at each of the three resolutions."""
        largest, middle, smallest = range(len(RESOLUTIONS))
        smallest_N, middle_N = (confidence(self.logits(j, crops[RESOLUTIONS[j]])) for j in (smallest, middle))
        first = float(smallest_N.quantile(2 / 3))
        second = float(middle_N[smallest_N < first].quantile(1 / 2))
        return Policy((smallest, middle, largest), (first, second))

    def all_with_masks(self, crops: Crops) -> Tensor:
        """Run every image at every resolution and mask the answers, as published implementations do."""
        predictor_NR = self.predictor_logits(crops[self.predictor_size])
        choice_N = self.first_resolution(self.default_policy, predictor_NR, len(predictor_NR))
        mask_NR = torch.nn.functional.one_hot(choice_N, len(self.resolutions)).float()
        logits_NRK = torch.stack([self.logits(j, crops[side]) for j, side in enumerate(self.resolutions)], dim=1)
        return (mask_NR[:, :, None] * logits_NRK).sum(dim=1)


def program_rows(
    name: str, network: FixedMix, runs: int, batches: Mapping[int, int] = CALLS
) -> tuple[list[Row], list[str]]:
    """Measure the rows that need one process and no decoding. Return them with the latencies as notes."""
    rows, notes = [], []
    for batch, calls in batches.items():
        parts = _parts(name, network, batch)
        for part in parts.values():
            part()
        samples: Samples = {what: [] for what in parts}
        for _ in range(runs):
            for what, part in parts.items():
                samples[what].append([_seconds(part) for _ in range(calls)])
        rows += _rows(f"{name}, batch {batch}: ", network, batch, samples)
        notes += [_latencies(f"{name}, batch {batch}, ms an image", batch, samples)]
    return rows, notes


def _parts(name: str, network: FixedMix, batch: int) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(batch)
    sides = sorted({*RESOLUTIONS, PREDICTOR_SIZE})
    crops = {s: torch.randint(0, 256, (batch, s, s, 3), generator=generator, dtype=torch.uint8) for s in sides}
    device = network.device
    plain = torchvision.models.get_model(name, num_classes=NUM_CLASSES).eval()
    plain = plain.to(device, memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]  # torch's stubs lack it
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))

    @torch.inference_mode()
    def torchvision_alone() -> Tensor:
        pixels = crops[RESOLUTIONS[0]].to(device).permute(0, 3, 1, 2)
        with network.precision():
            return plain((pixels.float() / 255 - mean) / std).float().cpu()

    parts: dict[str, Callable[[], object]] = {"torchvision": torchvision_alone}
    parts |= {f"{side} px": partial(network.logits, j, crops[side]) for j, side in enumerate(RESOLUTIONS)}
    parts |= {"predictor": partial(network.predictor_logits, crops[PREDICTOR_SIZE])}
    if batch == 1:
        parts |= {f"routed to {side} px": partial(network.routed, crops, j) for j, side in enumerate(RESOLUTIONS)}
        for side, thresholds in zip(
            RESOLUTIONS[::-1], ((ALWAYS, ALWAYS), (NEVER, ALWAYS), (NEVER, NEVER)), strict=True
        ):
            parts[f"cascade to {side} px"] = partial(network.cascaded, crops, Policy((2, 1, 0), thresholds))
    else:
        parts |= {"routed": partial(network.routed, crops)}
        parts |= {"cascade": partial(network.cascaded, crops, network.thirds(crops))}
    return parts | {"all with masks": partial(network.all_with_masks, crops)}


def _rows(prefix: str, network: FixedMix, batch: int, samples: Samples) -> list[Row]:
    p50 = {what: [statistics.median(run) for run in runs] for what, runs in samples.items()}
    rate = {what: [batch / seconds for seconds in runs] for what, runs in p50.items()}
    static = f"{RESOLUTIONS[0]} px"

    def against(what: str, unit: str, ours: Iterable[float], peer: Iterable[float]) -> Row:
        return paired(prefix + what, unit, list(zip(ours, peer, strict=True)), more_is_better=unit != "ms")

    rows = [against("224 px, against torchvision's", "images/s", rate[static], rate["torchvision"])]
    if batch == 1:
        whole = [
            1e3 * statistics.fmean(run) for run in zip(*(p50[f"routed to {s} px"] for s in RESOLUTIONS), strict=True)
        ]
        backbones = [1e3 * statistics.fmean(run) for run in zip(*(p50[f"{s} px"] for s in RESOLUTIONS), strict=True)]
        parts = [backbone + 1e3 * predictor for backbone, predictor in zip(backbones, p50["predictor"], strict=True)]
        return [*rows, against("routed p50, against its parts' p50", "ms", whole, parts)]
    gflops = network.predictor_gflops + statistics.fmean(
        network.backbone_gflops[j % len(RESOLUTIONS)] for j in range(batch)
    )
    work = [gflops * r for r in rate["routed"]], [network.backbone_gflops[0] * r for r in rate[static]]
    return [
        *rows,
        against("routed, against static 224 px", "GFLOPs/s", *work),
        against("routed, against all with masks", "images/s", rate["routed"], rate["all with masks"]),
    ]


def _latencies(title: str, batch: int, samples: Samples) -> str:
    """Return p50/p95/p99 of every timed part. With few calls, p95 and p99 are the slowest calls."""
    cells = []
    for what, runs in samples.items():
        each = np.concatenate([np.asarray(run) for run in runs]) * 1e3 / batch
        p50, p95, p99 = np.percentile(each, (50, 95, 99), method="higher")
        cells.append(f"{what} {p50:.3g}/{p95:.3g}/{p99:.3g}")
    calls = sum(map(len, next(iter(samples.values()))))
    return f"{title} (p50/p95/p99 of {calls} calls): {', '.join(cells)}"


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def decode_as_needed(files: Sequence[bytes]) -> float:
    """Return the images/s of the predictor's crop and one chosen crop in turn, each from the smallest sufficient
    decode."""
    started = time.perf_counter()
    for number, file in enumerate(files):
        picture = Picture(file, FRACTION, max(*RESOLUTIONS, PREDICTOR_SIZE))
        picture.crop(PREDICTOR_SIZE)
        picture.crop(RESOLUTIONS[number % len(RESOLUTIONS)])
    return len(files) / (time.perf_counter() - started)


def decode_everything(files: Sequence[bytes]) -> float:
    """Return the images/s with every pixel decoded and a crop at each side."""
    started = time.perf_counter()
    for file in files:
        with Image.open(io.BytesIO(file)) as image:
            extent = FRACTION * min(image.size)
            left, top = (image.width - extent) / 2, (image.height - extent) / 2
            box = (left, top, left + extent, top + extent)
            for side in (*RESOLUTIONS, PREDICTOR_SIZE):
                np.array(image.resize((side, side), Image.Resampling.BILINEAR, box=box))
    return len(files) / (time.perf_counter() - started)


@contextmanager
def classifier_rate(folder: Path, files: Sequence[bytes]) -> Iterator[Callable[[], float]]:
    """Yield a function that measures the images/s of the registered classifier in this process, from JPEG bytes."""
    classifier = Classifier(RoutedNetwork(folder))

    def measure() -> float:
        started = time.perf_counter()
        answers = list(classifier.classify(files))
        assert not [answer for answer in answers if answer.error]
        return len(files) / (time.perf_counter() - started)

    measure()
    yield measure
    classifier.close()
