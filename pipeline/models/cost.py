"""The cost of a forward pass: multiply-adds (MACs, as in the paper) from torch's own counter, or measured time."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from datasets.files import write_whole
from pipeline.models.drnet import DRNet
from pipeline.models.dry_run import meta_forward, meta_images, training_mode

ROUNDS = 15
WARM_UP_ROUNDS = 3
MIN_SECONDS = 0.02
"""The shortest timing, so that the clock's resolution and kernel launches do not matter."""


@dataclass(frozen=True)
class Latency:
    """Measured milliseconds per image in batches of `batch_size`, and the conditions of the measurement.

    `backbone_milliseconds` lists the candidate resolutions, largest first. Decoding and resizing are not included.
    """

    backbone_milliseconds: tuple[float, ...]
    predictor_milliseconds: float
    batch_size: int
    precision: str
    device: str
    num_threads: int
    torch: str

    def __str__(self) -> str:
        return (
            f"median of {ROUNDS} rounds in batches of {self.batch_size}, {self.precision}, on {self.device} "
            f"({self.num_threads} CPU threads), torch {self.torch}"
        )

    def save(self, path: Path) -> None:
        """Write the measurement to a JSON file, atomically. `load` restores the numbers exactly."""
        write_whole(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> Latency:
        """Read a file that `save` wrote. Raise ValueError if it is missing or damaged."""
        try:
            content = json.loads(path.read_text())
            return cls(**content | {"backbone_milliseconds": tuple(content["backbone_milliseconds"])})
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist: this run has not measured its latency in milliseconds.") from None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}). It contains the costs that the run measured.") from None


def measure_latency(model: DRNet, batch_size: int, precision: str = "float32") -> Latency:
    """Measure the latency of the predictor and of the backbone at every resolution, on the model's device.

    Networks run in inference mode with torch's current number of threads. The networks take turns in every round, so
    that a temporary slowdown of the machine affects all of them. Each figure is the median of ROUNDS rounds. The model
    and the random state do not change.

    Args:
        batch_size: images per batch.
        precision: float32, or bfloat16 under autocast, as in training.
    """
    device = next(model.parameters()).device
    images = {
        side: torch.full((batch_size, side, side, 3), 128, dtype=torch.uint8, device=device) for side in model.sides
    }
    passes: list[Callable[[], object]] = [
        lambda index=index: model.static_logits(images, index) for index in range(len(model.resolutions))
    ]
    passes.append(lambda: model.predictor_logits(images))
    with (
        training_mode(model, False),
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        repeats = [_repeats(run, device) for run in passes]
        rounds = [
            [_seconds(run, count, device) for run, count in zip(passes, repeats, strict=True)] for _ in range(ROUNDS)
        ]
    *backbone, predictor = (1e3 * statistics.median(times) / batch_size for times in zip(*rounds, strict=True))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type.upper()}"
    return Latency(tuple(backbone), predictor, batch_size, precision, name, torch.get_num_threads(), torch.__version__)


def seconds_per_call(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the median seconds of a call over `rounds` timings, after a warm-up."""
    repeats = _repeats(run, device)
    return statistics.median(_seconds(run, repeats, device) for _ in range(rounds))


def _repeats(run: Callable[[], object], device: torch.device) -> int:
    """Warm up, and return how often to call `run` for one timing."""
    fastest = min(_seconds(run, 1, device) for _ in range(WARM_UP_ROUNDS))
    return max(1, round(MIN_SECONDS / fastest))


def _seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the seconds of one call, as the mean over `repeats` calls."""
    _finish(device)
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    _finish(device)
    return (time.perf_counter() - started) / repeats


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Costs:
    """The cost of one image in GFLOPs (1e9 multiply-adds) and, if it was measured, in milliseconds.

    `backbone_gflops[j]` is the backbone's cost at `resolutions[j]`. The predictor's cost is paid once for every image.
    Attributes without a unit in their name are in `unit`, the unit in which decisions are made: milliseconds if
    `latency` is given, otherwise GFLOPs.
    """

    resolutions: tuple[int, ...]
    backbone_gflops: tuple[float, ...]
    predictor_gflops: float
    latency: Latency | None = None

    @property
    def unit(self) -> str:
        """The unit in which decisions are made: gflops or milliseconds."""
        return "gflops" if self.latency is None else "milliseconds"

    @property
    def unit_name(self) -> str:
        """The name of `unit` in text: GFLOPs or ms."""
        return "GFLOPs" if self.unit == "gflops" else "ms"

    @property
    def backbone(self) -> tuple[float, ...]:
        """The backbone's cost at each resolution (R,), in `unit`."""
        return self.backbone_gflops if self.latency is None else self.latency.backbone_milliseconds

    @property
    def predictor(self) -> float:
        """The predictor's cost, in `unit`."""
        return self.predictor_gflops if self.latency is None else self.latency.predictor_milliseconds

    def mean(self, shares_R: Sequence[float], with_predictor: bool = True) -> float:
        """Return the mean cost as in `mean_gflops`, but in `unit`."""
        return _mean(shares_R, self.backbone, self.predictor if with_predictor else 0.0)

    def mean_gflops(self, shares_R: Sequence[float], with_predictor: bool = True) -> float:
        """Return the mean cost in GFLOPs if the share `shares_R[j]` of the images runs at resolution j. Shares sum to
        1."""
        return _mean(shares_R, self.backbone_gflops, self.predictor_gflops if with_predictor else 0.0)

    @property
    def relative(self) -> tuple[float, ...]:
        """The resolutions' GFLOPs (R,) on a scale from 0 (cheapest) to 1 (most expensive), or all 0 if they are equal.

        This uses GFLOPs even if `unit` is milliseconds, so that a `budget_bias` has the same meaning on every machine.
        """
        low, high = min(self.backbone_gflops), max(self.backbone_gflops)
        return tuple((cost - low) / ((high - low) or 1.0) for cost in self.backbone_gflops)

    @property
    def min_backbone_gflops(self) -> float:
        """The backbone's GFLOPs if every image runs at the cheapest resolution."""
        return min(self.backbone_gflops)

    @property
    def max_backbone_gflops(self) -> float:
        """The backbone's GFLOPs if every image runs at the most expensive resolution."""
        return max(self.backbone_gflops)


def _mean(shares_R: Sequence[float], costs_R: Sequence[float], more: float) -> float:
    return float(sum(share * cost for share, cost in zip(shares_R, costs_R, strict=True))) + more


def count_macs(module: nn.Module, *inputs: Any) -> int:
    """Count the multiply-adds of `module(*inputs)` in eval mode, without computing it or changing the module.

    As in the paper, convolutions and matrix products count; normalization, activations and pooling do not. Only the
    shapes of the tensors in `inputs` matter.
    """
    with FlopCounterMode(display=False) as counter:
        meta_forward(module, *inputs)
    return counter.get_total_flops() // 2  # torch counts a multiply-add as two operations


def measure_costs(model: DRNet) -> Costs:
    """Count the multiply-adds of backbone and predictor for one image at every candidate resolution.

    Raises:
        ValueError: an input size is too small for its network.
    """
    return Costs(
        resolutions=model.resolutions,
        backbone_gflops=tuple(
            _gflops(model.backbone, "backbone", side, index) for index, side in enumerate(model.resolutions)
        ),
        predictor_gflops=_gflops(model.predictor, "predictor", model.predictor_size),
    )


def frozen_gflops(model: DRNet, num_groups: int) -> tuple[float, ...]:
    """Count the multiply-adds of the backbone's `num_groups` layer groups next to the input, at every resolution.

    Products of activations, as in attention, are not counted.
    """
    if num_groups == 0:
        return (0.0,) * len(model.resolutions)
    frozen = set(model.backbone.first_layers(num_groups))
    names = [
        name
        for name, layer in model.backbone.named_modules()
        # Only leaves: a module's count includes its children, and a transformer's root has parameters of its own.
        if not any(layer.children()) and frozen.intersection(layer.parameters(recurse=False))
    ]
    gflops = []
    for index, side in enumerate(model.resolutions):
        with FlopCounterMode(display=False) as counter:
            meta_forward(model.backbone, meta_images(side), index)
        counts = counter.get_flop_counts()
        root = type(model.backbone).__name__
        gflops.append(sum(sum(counts.get(f"{root}.{name}", {}).values()) for name in names) / 2e9)
    return tuple(gflops)


def _gflops(module: nn.Module, role: str, side: int, *arguments: int) -> float:
    try:
        return count_macs(module, meta_images(side), *arguments) / 1e9
    except RuntimeError as error:
        raise ValueError(f"the {role} cannot run on images of {side} px ({error}). Give a larger size.") from error
