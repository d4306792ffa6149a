"""The exported programs of one network: a predictor, and a backbone for each candidate resolution."""

from __future__ import annotations

import contextlib
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

WARM_UPS = 2
"""Passes before a recording, which choose algorithms and allocate their workspaces."""


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    images: Tensor
    logits: Tensor


class GraphedProgram:
    """Runs a program on batches of any size: each is padded to one of few sizes, recorded as a graph at first use.

    Args:
        program: uint8 (n, S, S, 3) -> (n, K), row by row, on the device, with the same kernels for the same n.

    A recording takes the time of a few passes. All recordings of a program share memory, so they need little more than
    one pass.
    """

    def __init__(self, program: Callable[[Tensor], Tensor], device: torch.device):
        self._program, self._device = program, device
        self._recordings: dict[int, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, images: Tensor) -> Tensor:
        """Returns logits (n, K) on the device, without waiting, for images (n, S, S, 3) in pinned memory."""
        size = filled_size(len(images))
        with torch.cuda.device(self._device):
            if size not in self._recordings:
                self._recordings[size] = self._record(images.new_zeros(size, *images.shape[1:]))
            recording = self._recordings[size]
            recording.images[: len(images)].copy_(images, non_blocking=True)
            recording.graph.replay()
            # A copy: the next recording that runs writes to the same memory.
            return recording.logits[: len(images)].clone()

    def _record(self, example: Tensor) -> _Recording:
        images = example.to(self._device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._program(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            logits = self._program(images)
        return _Recording(graph, images, logits)


def filled_size(count: int) -> int:
    """Returns the next size with at most 4 significant bits: at most an eighth more than `count`."""
    step = 1 << max(0, (count - 1).bit_length() - 4)
    return -(-count // step) * step


META_FILE, PREDICTOR_FILE, BACKBONE_FILE = "meta.json", "predictor.pt2", "backbone_{side}.pt2"
PRECISIONS = ("float32", "bfloat16")
BATCH_LIMIT = 256
"""Images in one batch; a GPU runs them at once."""
_PIXELS_AT_ONCE = 16 * 224 * 224
CPU = torch.device("cpu")
Program = Callable[[Tensor], Tensor]
"""A function of uint8 (n, S, S, 3) that returns float32 logits (n, K), for any n >= 1."""


@dataclass(frozen=True)
class Placement:
    """The device and the way programs run."""

    device: str = "auto"
    """The device: cpu, cuda or cuda:NUMBER; auto uses a GPU if there is one."""
    precision: str = "float32"
    """The precision: float32, or bfloat16 for convolutions and matrix products (torch.autocast)."""
    compiled: bool = False
    """Whether to use torch.compile: the first images take minutes, later ones less time."""

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.device == "auto":
            object.__setattr__(self, "device", "cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Routed:
    """The result of `RoutedNetwork.classify` for N images."""

    logits_NK: Tensor
    choice_N: Tensor
    """The index of the resolution at which each image ran."""


class RoutedNetwork:
    """Runs the exported programs of a folder. Not thread-safe.

    It is deterministic: the same images in the same call give the same bits.

    Args:
        folder: holds meta.json, a backbone_SIDE.pt2 for each resolution and, with several, predictor.pt2.

    Raises:
        ValueError: a program holds a pickle, which could run any code when it is loaded.
    """

    def __init__(self, folder: Path, placement: Placement | None = None):
        meta = json.loads((folder / META_FILE).read_text())
        self.placement = placement or Placement()
        self.device = torch.empty(0, device=self.placement.device).device  # with its number, unlike the placement's
        self.classes: tuple[str, ...] = tuple(meta["classes"])
        self.resolutions: tuple[int, ...] = tuple(meta["resolutions"])
        self.predictor_size: int = meta["predictor_size"]
        self.crop_fraction: float = meta["validation_crop"]
        self.gflops: tuple[float, ...] = tuple(cost + meta["predictor_gflops"] for cost in meta["backbone_gflops"])
        self._relative_costs = torch.tensor(meta["relative_costs"], dtype=torch.float64)
        self._predictor = self._program(folder / PREDICTOR_FILE) if len(self.resolutions) > 1 else None
        self._backbones = [self._program(folder / BACKBONE_FILE.format(side=side)) for side in self.resolutions]

    @property
    def is_routed(self) -> bool:
        """Whether there are several resolutions, and so a predictor."""
        return self._predictor is not None

    @property
    def first_side(self) -> int:
        """Side in pixels of the images that the resolution is chosen from."""
        return self.predictor_size if self.is_routed else self.resolutions[0]

    def predictor_logits(self, images: Tensor) -> Tensor:
        """Returns logits (N, R) over the resolutions for uint8 (N, S, S, 3), S the predictor's side."""
        assert self._predictor is not None
        return self._run(self._predictor, images).cpu()

    def logits(self, index: int, images: Tensor) -> Tensor:
        """Returns class logits (N, K) at resolution `index` for uint8 (N, S, S, 3), S its side."""
        return self._run(self._backbones[index], images).cpu()

    def choose(self, logits_NR: Tensor, budget_bias: float = 0.0) -> Tensor:
        """Returns argmax_j(logits_j + budget_bias * c_j), int64 (N,); c_j is j's cost, from 0 (cheapest) to 1.

        A bias above 0 spends more, below 0 less; 0 is the network as it was trained. Ties take the first resolution.

        Raises:
            ValueError: the bias is not finite.
        """
        if not math.isfinite(budget_bias):
            raise ValueError(f"budget_bias is {budget_bias}; give a finite number")
        return (logits_NR.double() + budget_bias * self._relative_costs).argmax(dim=1)

    def classify(self, crops: Mapping[int, Tensor], budget_bias: float = 0.0) -> Routed:
        """Choose each image's resolution from the whole batch, then run each group of equal choice once.

        Args:
            crops: side -> uint8 (N, side, side, 3), the same N images at every side.
        """
        choice_N = torch.zeros(len(crops[self.first_side]), dtype=torch.int64)
        if self.is_routed:
            choice_N = self.choose(self.predictor_logits(crops[self.predictor_size]), budget_bias)
        started = []
        for index, side in enumerate(self.resolutions):
            group = (choice_N == index).nonzero().flatten()
            if len(group):
                started.append((group, self._run(self._backbones[index], crops[side][group])))
        logits_NK = torch.empty(len(choice_N), len(self.classes))
        for group, logits in started:  # copied while a GPU computes the next group
            logits_NK[group] = logits.cpu()
        return Routed(logits_NK, choice_N)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which layers compute with this precision."""
        if self.placement.precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _program(self, path: Path) -> Program:
        program = load_program(path, self.device)
        program.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]  # torch's stubs lack it
        if self.placement.compiled:
            program = torch.compile(program, dynamic=True)

        def run(images: Tensor) -> Tensor:
            with self.precision():
                return program(images.to(self.device, non_blocking=True)).float()

        return GraphedProgram(run, self.device) if self.device.type == "cuda" and not self.placement.compiled else run

    @torch.inference_mode()
    def _run(self, program: Program, images: Tensor) -> Tensor:
        """Returns float32 logits on the device for uint8 images on the CPU, without waiting for a GPU."""
        parts = split(images, self.device)
        if self.device.type == "cuda":
            parts = [part.pin_memory() for part in parts]
        return torch.cat([program(part) for part in parts])


def images_at_once(side: int, device: torch.device) -> int:
    """Returns how many images of `side` pixels run fastest together.

    On a CPU their activations should fit its caches: 16 images of 224 px, so 64 of 112 px.
    """
    return max(1, _PIXELS_AT_ONCE // side**2) if device.type == "cpu" else BATCH_LIMIT


def split(images: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Split images (N, S, S, 3) into equal parts of at most `images_at_once` images."""
    return images.chunk(-(-len(images) // images_at_once(images.shape[1], device)))


def load_program(path: Path, device: torch.device = CPU) -> nn.Module:
    """Load a `torch.export` program as a callable; raises ValueError if it holds a pickle.

    It is moved to the device here, because the program asserts the device of its tensors.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.rpartition("/")[2]
            pickled = name.endswith(".pt") or name.startswith(("custom_obj", "opaque_obj"))
            if name.endswith("_config.json"):
                entries = json.loads(archive.read(member))["config"].values()
                pickled = any(entry["use_pickle"] for entry in entries)
            if pickled and member.file_size:
                raise ValueError(f"{path} holds pickled objects ({member.filename}), which jobs.register never writes")
    return move_to_device_pass(torch.export.load(path), str(device)).module()
