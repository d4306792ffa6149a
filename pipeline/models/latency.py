"""Measured milliseconds as cost: what an image takes on the device at hand, at each resolution."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from datasets.files import write_whole
from pipeline.models.drnet import DRNet
from pipeline.models.meta import training_mode

ROUNDS = 15
WARM_UP_ROUNDS = 3
MIN_SECONDS = 0.02
"""that one timing spans, so that clocks and launches do not matter"""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one image in batches of `batch_size`, and where they were measured.

    `backbone_milliseconds` are for the candidate resolutions, largest first. Decoding and resizing are not in them.
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
        """Write it as JSON, atomically. Its numbers are read back to the last bit."""
        write_whole(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> Latency:
        """Read what `save` wrote; raises ValueError where it is not there or damaged."""
        try:
            content = json.loads(path.read_text())
            return cls(**content | {"backbone_milliseconds": tuple(content["backbone_milliseconds"])})
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist: the milliseconds of this run were not measured") from None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}); it holds the run's measured costs") from None


def measure_latency(model: DRNet, batch_size: int, precision: str = "float32") -> Latency:
    """Time the predictor and the backbone at every resolution on the model's device.

    Inference mode, batch norm with its running statistics, as many threads as torch has here. The candidates take
    turns in every round, so that a machine that is slower for a while is slower for all; each figure is the median of
    ROUNDS rounds. Nothing of the model, and no random state, is changed.

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
    """Warm up; how often `run` is called for one timing."""
    fastest = min(_seconds(run, 1, device) for _ in range(WARM_UP_ROUNDS))
    return max(1, round(MIN_SECONDS / fastest))


def _seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Of one call, over `repeats` of them."""
    _finish(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        run()
    _finish(device)
    return (time.perf_counter() - begun) / repeats


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
