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
"""passes before one is recorded, which choose algorithms and allocate their workspaces"""


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    images: Tensor
    logits: Tensor


class GraphedProgram:
    """`program` for batches of any size, each filled up to one of few sizes, which are recorded when first needed.

    Args:
        program: uint8 (n, S, S, 3) -> (n, K), row by row, on the device, always the same kernels for the same n.

    A recording takes some passes' time and, as all of a program share their memory, little more than a pass's memory.
    """

    def __init__(self, program: Callable[[Tensor], Tensor], device: torch.device):
        self._program, self._device = program, device
        self._recordings: dict[int, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (n, K) on the device, not waited for, of images (n, S, S, 3) in pinned memory."""
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
    """The next size with at most 4 significant bits: at most an eighth more than `count`."""
    step = 1 << max(0, (count - 1).bit_length() - 4)
    return -(-count // step) * step


META_FILE, PREDICTOR_FILE, BACKBONE_FILE = "meta.json", "predictor.pt2", "backbone_{side}.pt2"
PRECISIONS = ("float32", "bfloat16")
BATCH_LIMIT = 256
"""images of one batch; a GPU runs them at once"""
_PIXELS_AT_ONCE = 16 * 224 * 224
CPU = torch.device("cpu")
Program = Callable[[Tensor], Tensor]
"""uint8 (n, S, S, 3) -> float32 logits (n, K), for any n >= 1"""


@dataclass(frozen=True)
class Placement:
    """Where and how programs run."""

    device: str = "auto"
    """cpu, cuda or cuda:NUMBER; auto is a GPU where there is one"""
    precision: str = "float32"
    """bfloat16 runs convolutions and matrix products in it (torch.autocast)"""
    compiled: bool = False
    """through torch.compile: minutes at the first images, faster from then on"""

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.device == "auto":
            object.__setattr__(self, "device", "cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Routed:
    """What `RoutedNetwork.classify` finds for N images."""

    logits_NK: Tensor
    choice_N: Tensor
    """index of the resolution that each image was run at"""


class RoutedNetwork:
    """The programs in a folder, loaded and placed. Not for two threads at once.

    Nothing random is in it: the same images in the same call give the same bits.

    Args:
        folder: holds meta.json, a backbone_SIDE.pt2 for each resolution and, for more than one, predictor.pt2.

    Raises:
        ValueError: a program holds a pickle, which could run anything when loaded.
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
        """There is more than one resolution, and so a predictor."""
        return self._predictor is not None

    @property
    def first_side(self) -> int:
        """Side of the images that a choice is made from, pixels."""
        return self.predictor_size if self.is_routed else self.resolutions[0]

    def predictor_logits(self, images: Tensor) -> Tensor:
        """Logits (N, R) over the candidates for uint8 (N, S, S, 3), S the predictor's side."""
        assert self._predictor is not None
        return self._run(self._predictor, images).cpu()

    def logits(self, index: int, images: Tensor) -> Tensor:
        """Class logits (N, K) at candidate `index` for uint8 (N, S, S, 3), S its side."""
        return self._run(self._backbones[index], images).cpu()

    def choose(self, logits_NR: Tensor, budget_bias: float = 0.0) -> Tensor:
        """argmax_j(logits_j + budget_bias * c_j), int64 (N,); c_j is j's cost, 0 for the cheapest to 1.

        A bias above 0 spends more, below 0 less; 0 is the network as it was trained. The first of equals is taken.

        Raises:
            ValueError: the bias is not finite.
        """
        if not math.isfinite(budget_bias):
            raise ValueError(f"budget_bias is {budget_bias}; give a finite number")
        return (logits_NR.double() + budget_bias * self._relative_costs).argmax(dim=1)

    def classify(self, crops: Mapping[int, Tensor], budget_bias: float = 0.0) -> Routed:
        """Choose each image's resolution from the whole batch, then run each group of equal choice once.

        Args:
            crops: side -> uint8 (N, side, side, 3), the same N images at each side that is needed.
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
        for group, logits in started:  # a GPU is at work meanwhile
            logits_NK[group] = logits.cpu()
        return Routed(logits_NK, choice_N)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """In which a network's layers compute as they do here."""
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
        """float32 logits, where they are computed, of uint8 images on the CPU; a GPU is not waited for."""
        parts = split(images, self.device)
        if self.device.type == "cuda":
            parts = [part.pin_memory() for part in parts]
        return torch.cat([program(part) for part in parts])


def images_at_once(side: int, device: torch.device) -> int:
    """How many images of `side` pixels run fastest together.

    On a CPU activations of all of them are to stay near its caches: 16 images of 224 px, so 64 of 112 px.
    """
    return max(1, _PIXELS_AT_ONCE // side**2) if device.type == "cpu" else BATCH_LIMIT


def split(images: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Equal parts of images (N, S, S, 3), each of at most `images_at_once`."""
    return images.chunk(-(-len(images) // images_at_once(images.shape[1], device)))


def load_program(path: Path, device: torch.device = CPU) -> nn.Module:
    """Load a `torch.export` program that holds no pickle, as a callable; raises ValueError for one that does.

    Its weights alone could be moved later: the program itself asserts where its tensors are.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.rpartition("/")[2]
            pickled = name.endswith(".pt") or name.startswith(("custom_obj", "opaque_obj"))
            if name.endswith("_config.json"):
                entries = json.loads(archive.read(member))["config"].values()
                pickled = any(entry["use_pickle"] for entry in entries)
            if pickled and member.file_size:
                raise ValueError(f"{path} holds pickled objects ({member.filename}), which this model never has")
    return move_to_device_pass(torch.export.load(path), str(device)).module()
