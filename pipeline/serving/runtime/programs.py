"""The exported programs of one network: a predictor, and a backbone for each candidate resolution."""

from __future__ import annotations

import contextlib
import json
import math
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from .policy import (
    Policy,
    can_stop,
    confidence,
    first_resolution,
    next_resolution,
    predictor_policy,
    static_policy,
)

WARM_UPS = 2
"""The number of passes before a CUDA graph is recorded. They choose algorithms and allocate workspaces."""


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    images: Tensor
    logits: Tensor


class GraphedProgram:
    """Run a program with CUDA graphs. Batches of any size are padded to a few sizes; each size is recorded at its first
    use.

    Recording takes as long as a few passes. All recordings of a program share memory, so they need little more than one
    pass.

    Args:
        program: a function uint8 (n, S, S, 3) -> (n, K) on the device. It must treat each row independently and use the
            same kernels whenever n is the same.
    """

    def __init__(self, program: Callable[[Tensor], Tensor], device: torch.device):
        self._program, self._device = program, device
        self._recordings: dict[int, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits (n, K) on the device for images (n, S, S, 3) in pinned memory, without waiting for the GPU."""
        size = filled_size(len(images))
        with torch.cuda.device(self._device):
            if size not in self._recordings:
                self._recordings[size] = self._record(images.new_zeros(size, *images.shape[1:]))
            recording = self._recordings[size]
            recording.images[: len(images)].copy_(images, non_blocking=True)
            recording.graph.replay()
            # Copy the result, because the next recording that runs overwrites this memory.
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
    """Return the smallest size >= `count` with at most 4 significant bits: at most an eighth larger than `count`."""
    step = 1 << max(0, (count - 1).bit_length() - 4)
    return -(-count // step) * step


FORMAT = 2
"""The version of this package's interface, stored in meta.json. jobs.serve needs version 2."""
META_FILE, PREDICTOR_FILE, BACKBONE_FILE = "meta.json", "predictor.pt2", "backbone_{side}.pt2"
PRECISIONS = ("float32", "bfloat16")
BATCH_LIMIT = 256
"""The largest number of images that a GPU runs in one batch."""
_PIXELS_AT_ONCE = 16 * 224 * 224
CPU = torch.device("cpu")
Program = Callable[[Tensor], Tensor]
"""A function of uint8 (n, S, S, 3) that returns float32 logits (n, K), for any n >= 1."""


@dataclass(frozen=True)
class Placement:
    """The device and the way in which programs run.

    Raises:
        ValueError: the precision is unknown.
    """

    device: str = "auto"
    """The device: cpu, cuda or cuda:NUMBER; auto uses a GPU if there is one."""
    precision: str = "float32"
    """The precision: float32, or bfloat16 for convolutions and matrix products (torch.autocast)."""
    compiled: bool = False
    """Whether to use torch.compile: the first images take minutes, later ones are faster."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.device == "auto":
            object.__setattr__(self, "device", "cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Routed:
    """The result of `RoutedNetwork.classify` for N images."""

    logits_NK: Tensor
    choice_N: Tensor
    """The index of the resolution whose answer counts for each image, int64."""
    ran_NR: Tensor
    """Which resolutions ran for each image, bool."""


@dataclass(frozen=True)
class FittedPolicy:
    """A policy on the model's Pareto front."""

    policy: Policy
    gflops: float
    """The mean cost per held-out image, including the predictor if the policy uses it."""
    accuracy: float
    """The expected accuracy on the images that the policy was fitted on, as a fraction of 1."""


class RoutedNetwork:
    """Run the exported programs in a folder. Not thread-safe.

    It is deterministic: the same images in the same call give the same bits.

    Args:
        folder: contains meta.json, a backbone_SIDE.pt2 for each resolution and, with several resolutions,
            predictor.pt2.
        files: names of the programs to load if others run elsewhere; None loads all.

    Raises:
        ValueError: a program contains a pickle, which could run arbitrary code when it is loaded.
    """

    def __init__(self, folder: Path, placement: Placement | None = None, files: Collection[str] | None = None):
        meta = json.loads((folder / META_FILE).read_text())
        self.placement = placement or Placement()
        self.device = torch.empty(0, device=self.placement.device).device  # with a number, unlike the placement's
        # A folder's name on disk may contain bytes that are not UTF-8, but an answer must be valid text.
        names = (name.encode("utf-8", "surrogateescape") for name in meta["classes"])
        self.classes = tuple(name.decode("utf-8", "backslashreplace") for name in names)
        self.resolutions: tuple[int, ...] = tuple(meta["resolutions"])
        self.predictor_size: int = meta["predictor_size"]
        self.crop_fraction: float = meta["validation_crop"]
        self.backbone_gflops: tuple[float, ...] = tuple(meta["backbone_gflops"])
        self.predictor_gflops: float = meta["predictor_gflops"]
        self._relative_costs = torch.tensor(meta["relative_costs"], dtype=torch.float64)
        self.policies = [
            FittedPolicy(Policy(**found["policy"]), found["gflops"], found["accuracy"])
            for found in meta.get("policies", [])
        ]
        self.predictor_is_trained: bool = meta.get("predictor_is_trained", self.is_routed)
        self.default_policy = Policy(**meta["policy"]) if "policy" in meta else self.predictor_policy()
        present = [PREDICTOR_FILE] * self.is_routed + [self.backbone_file(j) for j in range(len(self.resolutions))]
        self._programs = {name: self._program(folder / name) for name in present if files is None or name in files}

    @property
    def is_routed(self) -> bool:
        """Whether there are several resolutions and therefore a predictor."""
        return len(self.resolutions) > 1

    @property
    def largest_side(self) -> int:
        """The largest side of the images that the programs take, in pixels."""
        return max(self.predictor_size if self.is_routed else 0, *self.resolutions)

    def backbone_file(self, index: int) -> str:
        """Return the name of the file with the program of resolution `index`."""
        return BACKBONE_FILE.format(side=self.resolutions[index])

    def predictor_logits(self, images: Tensor) -> Tensor:
        """Return the predictor's logits (N, R) for uint8 images (N, S, S, 3), where S is the predictor's input size."""
        return self._run(self._programs[PREDICTOR_FILE], images).cpu()

    def logits(self, index: int, images: Tensor) -> Tensor:
        """Return class logits (N, K) at resolution `index` for uint8 images (N, S, S, 3), with S this resolution."""
        return self._run(self._programs[self.backbone_file(index)], images).cpu()

    def predictor_policy(self, budget_bias: float = 0.0) -> Policy:
        """Return the policy that runs each image once, at the resolution that the predictor chooses.

        Args:
            budget_bias: a positive bias spends more, a negative one less; 0 is the network as it was trained.

        Raises:
            ValueError: the bias is not finite, or the predictor was not trained.
        """
        if self.is_routed and not self.predictor_is_trained:
            raise ValueError("this model's predictor was not trained; omit budget_bias")
        if not math.isfinite(budget_bias):
            raise ValueError(f"budget_bias is {budget_bias}; give a finite number")
        cheapest_first = sorted(range(len(self.resolutions)), key=lambda index: self.backbone_gflops[index])
        return predictor_policy(cheapest_first, budget_bias)

    def policy_for(
        self, budget_bias: float = 0.0, budget_gflops: float | None = None, max_accuracy_drop: float | None = None
    ) -> Policy:
        """Return the policy that a request asks for, by default the one that the model was registered with.

        Args:
            budget_bias: run each image once, at the predictor's choice with this bias (see `predictor_policy`).
            budget_gflops: use the most accurate policy whose mean cost is at most this.
            max_accuracy_drop: use the cheapest policy that loses at most this many percentage points of accuracy
                compared with the model's most accurate policy.

        Raises:
            ValueError: a value is invalid, two values are given, or the model has no such policy.
        """
        given = [budget_bias != 0, budget_gflops is not None, max_accuracy_drop is not None]
        if sum(given) > 1:
            raise ValueError("give one of budget_bias, budget_gflops and max_accuracy_drop, not several")
        if budget_bias != 0:
            return self.predictor_policy(budget_bias)
        if budget_gflops is None and max_accuracy_drop is None:
            return self.default_policy
        if not self.policies:
            raise ValueError("this model has no fitted policies; register its run again, or give budget_bias")
        if budget_gflops is not None:
            within = [found for found in self.policies if found.gflops <= budget_gflops]
            if not within:
                cheapest = min(found.gflops for found in self.policies)
                raise ValueError(f"budget_gflops is {budget_gflops}; give at least {cheapest:.4g}, the cheapest policy")
            return max(within, key=lambda found: found.accuracy).policy
        assert max_accuracy_drop is not None
        if not max_accuracy_drop >= 0:
            raise ValueError(f"max_accuracy_drop is {max_accuracy_drop}; give points, 0 or more")
        lowest = max(found.accuracy for found in self.policies) - max_accuracy_drop / 100
        return min(
            (found for found in self.policies if found.accuracy >= lowest), key=lambda found: found.gflops
        ).policy

    def named_policy(self, name: str) -> Policy:
        """Return the policy named `registered`, `predictor`, or a resolution that runs alone, such as `224`.

        Raises:
            ValueError: there is no policy of this name.
        """
        named = {"registered": self.default_policy}
        if self.predictor_is_trained:
            named["predictor"] = self.predictor_policy()
        named |= {str(side): static_policy(index) for index, side in enumerate(self.resolutions)}
        if name not in named:
            raise ValueError(f"policy is {name!r}; give one of {', '.join(named)}")
        return named[name]

    def first_resolution(self, policy: Policy, predictor_logits_NR: Tensor | None, num_images: int) -> Tensor:
        """Return the index of the resolution at which each image starts, int64 (N,)."""
        return first_resolution(policy, predictor_logits_NR, self._relative_costs, num_images)

    def cost(self, policy: Policy, ran: Sequence[int]) -> float:
        """Return the GFLOPs of an image that ran at these resolutions, plus the predictor's if the policy uses it."""
        predictor = self.predictor_gflops if policy.needs_predictor else 0.0
        return sum((self.backbone_gflops[index] for index in ran), predictor)

    def classify(
        self, crops: Mapping[int, Tensor], policy: Policy | None = None, extents_N: Tensor | None = None
    ) -> Routed:
        """Apply a policy to a batch. Images that run at the same resolution run together.

        Args:
            crops: maps a side to uint8 (N, side, side, 3): the same N images at every side that the network uses.
            policy: None is the policy that the model was registered with.
            extents_N: side of each image's crop before it was resized, in pixels; None if unknown: then no image is
                exhausted.
        """
        policy = policy or self.default_policy
        N = len(next(iter(crops.values())))
        predictor_NR = self.predictor_logits(crops[self.predictor_size]) if policy.needs_predictor else None
        now_N = self.first_resolution(policy, predictor_NR, N)
        logits_NK, choice_N = torch.empty(N, len(self.classes)), now_N.clone()
        ran_NR = torch.zeros(N, len(self.resolutions), dtype=torch.bool)
        started = []
        for index in policy.members:
            group = (now_N == index).nonzero().flatten()
            if not len(group):
                continue
            rows = self._run(self._programs[self.backbone_file(index)], crops[self.resolutions[index]][group])
            ran_NR[group, index], choice_N[group] = True, index
            if can_stop(policy, index):
                logits_NK[group] = rows.cpu()
                exhausted_N = None if extents_N is None else extents_N[group] <= self.resolutions[index]
                now_N[group] = next_resolution(policy, index, confidence(logits_NK[group]), exhausted_N)
            else:
                started.append((group, rows))
        for group, rows in started:  # copy a group while the GPU computes the next one
            logits_NK[group] = rows.cpu()
        return Routed(logits_NK, choice_N, ran_NR)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which layers compute with the placement's precision."""
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
        """Return float32 logits on the device for uint8 images on the CPU. This does not wait for a GPU."""
        parts = split(images, self.device)
        if self.device.type == "cuda":
            parts = [part.pin_memory() for part in parts]
        return torch.cat([program(part) for part in parts])


def images_at_once(side: int, device: torch.device) -> int:
    """Return the batch size that runs fastest for images of `side` pixels.

    On a CPU, a batch's activations should fit the caches: 16 images of 224 px, or 64 of 112 px.
    """
    return max(1, _PIXELS_AT_ONCE // side**2) if device.type == "cpu" else BATCH_LIMIT


def split(images: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Split images (N, S, S, 3) into equal parts of at most `images_at_once` images."""
    return images.chunk(-(-len(images) // images_at_once(images.shape[1], device)))


def load_program(path: Path, device: torch.device = CPU) -> nn.Module:
    """Load a `torch.export` program as a callable on `device`. Raise ValueError if it contains a pickle.

    The program checks that its tensors are on its device, so it is moved there when it is loaded.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.rpartition("/")[2]
            pickled = name.endswith(".pt") or name.startswith(("custom_obj", "opaque_obj"))
            if name.endswith("_config.json"):
                entries = json.loads(archive.read(member))["config"].values()
                pickled = any(entry["use_pickle"] for entry in entries)
            if pickled and member.file_size:
                raise ValueError(
                    f"{path} contains pickled objects ({member.filename}), which jobs.register never writes"
                )
    return move_to_device_pass(torch.export.load(path), str(device)).module()
