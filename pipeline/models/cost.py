"""The cost of a forward pass: multiply-adds (MACs, as in the paper) by torch's own counter, or measured time."""

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
    """Milliseconds of one image in batches of `batch_size`, and where they were measured.

    `backbone_milliseconds` are for the candidate resolutions, largest first. Decoding and resizing are not included.
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
        """Write it as JSON, atomically. `load` reads the same numbers to the last bit."""
        write_whole(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> Latency:
        """Read what `save` wrote. Raises ValueError where the file is missing or damaged."""
        try:
            content = json.loads(path.read_text())
            return cls(**content | {"backbone_milliseconds": tuple(content["backbone_milliseconds"])})
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist: this run has not measured its milliseconds") from None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}). It holds the costs that the run has measured.") from None


def measure_latency(model: DRNet, batch_size: int, precision: str = "float32") -> Latency:
    """Time the predictor and the backbone at every resolution on the model's device.

    Networks run in inference mode with as many threads as torch has here. The candidates take turns in every round, so
    that a machine that slows down for a while slows all of them; each figure is the median of ROUNDS rounds. The model
    and the random state do not change.

    Args:
        batch_size: images at once.
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


def _repeats(run: Callable[[], object], device: torch.device) -> int:
    """Warm up; returns how often to call `run` for one timing."""
    fastest = min(_seconds(run, 1, device) for _ in range(WARM_UP_ROUNDS))
    return max(1, round(MIN_SECONDS / fastest))


def _seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Returns the seconds of one call, as the mean of `repeats` calls."""
    _finish(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        run()
    _finish(device)
    return (time.perf_counter() - begun) / repeats


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Costs:
    """Cost of one image, in GFLOPs (1e9 multiply-adds) and, where it was measured, in milliseconds.

    `backbone_gflops[j]` is the backbone's cost at `resolutions[j]`; the predictor's is paid once for every image.
    Names without a unit are in milliseconds where there is a `latency`, else in GFLOPs: decisions use those.
    """

    resolutions: tuple[int, ...]
    backbone_gflops: tuple[float, ...]
    predictor_gflops: float
    latency: Latency | None = None

    @property
    def unit(self) -> str:
        """The unit of the costs that decide: gflops or milliseconds."""
        return "gflops" if self.latency is None else "milliseconds"

    @property
    def backbone(self) -> tuple[float, ...]:
        """The backbone's cost at each resolution (R,), in `unit`."""
        return self.backbone_gflops if self.latency is None else self.latency.backbone_milliseconds

    @property
    def predictor(self) -> float:
        """The predictor's cost, in `unit`."""
        return self.predictor_gflops if self.latency is None else self.latency.predictor_milliseconds

    def mean(self, shares_R: Sequence[float], with_predictor: bool = True) -> float:
        """Mean cost as in `mean_gflops`, in `unit`."""
        return _mean(shares_R, self.backbone, self.predictor if with_predictor else 0.0)

    def mean_gflops(self, shares_R: Sequence[float], with_predictor: bool = True) -> float:
        """Mean cost where the share `shares_R[j]` of the images runs at resolution j (shares sum to 1)."""
        return _mean(shares_R, self.backbone_gflops, self.predictor_gflops if with_predictor else 0.0)

    @property
    def relative(self) -> tuple[float, ...]:
        """The candidates' GFLOPs (R,) on a scale from 0, the lowest, to 1, the highest; all 0 where they are equal.

        GFLOPs even where the unit is milliseconds, so that a `budget_bias` means the same wherever the model runs.
        """
        low, high = min(self.backbone_gflops), max(self.backbone_gflops)
        return tuple((cost - low) / ((high - low) or 1.0) for cost in self.backbone_gflops)

    @property
    def min_backbone_gflops(self) -> float:
        """Mean cost of the backbone where every image takes the cheapest candidate."""
        return min(self.backbone_gflops)

    @property
    def max_backbone_gflops(self) -> float:
        """Mean cost of the backbone where every image takes the most expensive candidate."""
        return max(self.backbone_gflops)


def _mean(shares_R: Sequence[float], costs_R: Sequence[float], more: float) -> float:
    return float(sum(share * cost for share, cost in zip(shares_R, costs_R, strict=True))) + more


def count_macs(module: nn.Module, *inputs: Any) -> int:
    """Count the multiply-adds of `module(*inputs)` in eval mode, without computing it or changing the module.

    Convolutions and matrix products count; normalization, activations and pooling do not, as in the paper. Only the
    shapes of tensors in `inputs` matter.
    """
    with FlopCounterMode(display=False) as counter:
        meta_forward(module, *inputs)
    return counter.get_total_flops() // 2  # torch counts a multiply-add as two operations


def measure_costs(model: DRNet) -> Costs:
    """Count backbone and predictor for one image at every candidate resolution.

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


def _gflops(module: nn.Module, role: str, side: int, *arguments: int) -> float:
    try:
        return count_macs(module, meta_images(side), *arguments) / 1e9
    except RuntimeError as error:
        raise ValueError(f"the {role} cannot run on images of {side} px ({error}); give a larger size") from error
