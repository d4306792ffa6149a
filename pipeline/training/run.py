"""What a training run works with: model, data, costs, clock and reporter."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from datasets.beton import Manifest
from datasets.files import write_whole
from pipeline.config.load import ConfigError
from pipeline.config.schema import Config, ModelConfig, RoutedStage
from pipeline.models.backbone import build_backbone
from pipeline.models.cost import Costs, Latency, measure_costs, measure_latency
from pipeline.models.drnet import DRNet
from pipeline.training import distributed
from pipeline.training.checkpoint import OtherRunError, TrainingState


@dataclass(frozen=True)
class Progress:
    """The position of a run. `epoch` counts within the stage. `data_epoch` counts over all stages, and seeds random
    draws."""

    stage: str
    epoch: int
    epochs: int
    data_epoch: int
    step: int = 0
    steps: int = 0

    @property
    def epochs_done(self) -> float:
        """The finished epochs of the stage. A fraction counts the steps within an epoch."""
        return self.epoch + self.step / self.steps


AFTER_BACKBONE, BEFORE_JOINT = "backbone", "before-joint"
"""The points of a run at which the model is kept."""


class Reporter(Protocol):
    """Receives the progress of the training loop. Every rank calls it; most calls have an effect on rank 0 only."""

    def step(self, progress: Progress, loss: Tensor) -> None:
        """Report a finished step. `loss` is the mean over the global batch, still on the device."""
        ...

    def epoch(self, progress: Progress, values: Mapping[str, float]) -> None:
        """Report a finished epoch with its measured values."""
        ...

    def message(self, text: str) -> None:
        """Show a line of text to the user."""
        ...

    def keep(self, name: str, model: DRNet) -> None:
        """Keep a copy of the model's current state.

        Args:
            name: AFTER_BACKBONE or BEFORE_JOINT.
        """
        ...

    def checkpoint(self, state: TrainingState, values: Mapping[str, float]) -> None:
        """Save the state. Training changes it afterwards, so use `state.copy()` to keep it beyond this call.

        Args:
            values: measured values at the end of an epoch; empty within an epoch.
        """
        ...


def costs_of_run(model: DRNet, config: Config, file: Path, *, resumed: bool) -> Costs:
    """Count GFLOPs and, if the run's costs are in milliseconds, measure those too. Every rank must call this.

    Rank 0 measures milliseconds once and stores them in `file`.

    Args:
        resumed: whether the run resumes; then `file` must exist.

    Raises:
        OtherRunError: on all ranks, if `file` is missing and new measurements would differ.
    """
    costs = measure_costs(model)
    if config.cost == "flops":
        return costs
    found = distributed.from_first_rank(_latency(model, config, file, resumed) if distributed.rank() == 0 else None)
    if isinstance(found, ValueError):
        raise found
    return replace(costs, latency=found)


CPUINFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}
"""The CPU flags by which Linux reports native bfloat16 multiplication on Intel, AMD and Arm CPUs."""


@dataclass(frozen=True)
class Precision:
    """The precision of a run's forward passes, and the reason for it."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}, because {self.reason}"

    @classmethod
    def load(cls, file: Path) -> Precision:
        """Read the choice that `precision_of_run` stored."""
        return cls(**json.loads(file.read_text()))


def native_bfloat16(device: torch.device, cpuinfo: Path = CPUINFO) -> tuple[bool, str]:
    """Return whether a device computes bfloat16 natively, and a clause that gives the reason."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return native, f"the GPU {torch.cuda.get_device_name(device)} {'has' if native else 'lacks'} bfloat16"
    lines = cpuinfo.read_text().lower().splitlines() if cpuinfo.exists() else []
    flags = {flag for line in lines if line.startswith(("flags", "features")) for flag in line.split()}
    found = sorted(flags & BFLOAT16_FLAGS)
    return bool(found), f"the CPU has {' and '.join(found)}" if found else "the CPU has no bfloat16 arithmetic"


def has_depthwise_convolutions(config: ModelConfig) -> bool:
    """Return whether the backbone has a depthwise convolution, in which each channel has its own filter."""
    with torch.device("meta"):
        network = build_backbone(config.backbone, 2, 1, width=config.backbone_width)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    return any(layer.groups == layer.in_channels > 1 for layer in layers)


def choose_precision(found: Sequence[tuple[bool, str]]) -> Precision:
    """Return bfloat16 if every worker's device supports it natively, given each worker's `native_bfloat16`."""
    lacking = [reason for native, reason in found if not native]
    return Precision("float32", lacking[0]) if lacking else Precision("bfloat16", found[0][1])


def precision_of_run(
    config: Config, device: torch.device, file: Path, *, keep: bool = True, cpuinfo: Path = CPUINFO
) -> Precision:
    """Return the precision that training.precision means in this run. Every rank must call this, and gets the same.

    Args:
        file: where rank 0 stores the first choice, so that the run resumes with it on other machines too.
        keep: False only reads the file.
        cpuinfo: Linux's list of CPU features.
    """
    if config.training.precision != "auto":
        return Precision(config.training.precision, "it is configured")
    found = native_bfloat16(device, cpuinfo)
    if found[0] and device.type == "cpu" and has_depthwise_convolutions(config.model):
        found = False, f"a CPU is faster with the depthwise convolutions of {config.model.backbone} in float32"
    chosen = choose_precision(distributed.gather(found))
    if distributed.rank() == 0:
        if file.exists():
            chosen = Precision.load(file)
        elif keep:
            write_whole(file, json.dumps(asdict(chosen)))
    return distributed.from_first_rank(chosen)


def with_precision(config: Config, precision: Precision) -> Config:
    """Return the configuration with auto replaced by the chosen precision."""
    return config.model_copy(update={"training": config.training.model_copy(update={"precision": precision.name})})


def refuse_unreachable(config: Config, costs: Costs) -> None:
    """Raise ConfigError, on every rank, if a stage's alpha cannot be reached with the run's costs."""
    problems = alpha_problems(config, costs)
    if problems:
        raise ConfigError(problems, f"the run {config.name}")


def alpha_problems(config: Config, costs: Costs) -> list[str]:
    """Return a problem for each stage whose alpha is below all resolutions' costs or above all of them.

    Alpha is a target for the backbone's mean cost, without the predictor. In milliseconds it can be checked only with
    measured costs.
    """
    low, high = min(costs.backbone), max(costs.backbone)
    key, unit = f"alpha_{costs.unit}", "GFLOPs" if costs.latency is None else f"ms ({costs.latency})"
    problems = []
    for name, stage in config.stages.present():
        alpha = getattr(stage, key) if isinstance(stage, RoutedStage) else None
        if alpha is None or low <= alpha <= high:
            continue
        effect = (
            "even the smallest resolution costs more"
            if alpha < low
            else "even the largest resolution costs less, so nothing would be saved"
        )
        problems.append(
            f"stages.{name}.{key} is {alpha:g}, but {effect}; {config.model.backbone} at "
            f"{list(costs.resolutions)} px reaches {low:.4g} to {high:.4g} {unit}"
        )
    return problems


def _latency(model: DRNet, config: Config, file: Path, resumed: bool) -> Latency | ValueError:
    if resumed and not file.exists():
        return OtherRunError(
            f"{file} with the run's measured milliseconds is missing, and new measurements would differ. Restore the "
            "file, or start a run with another name (name=...)."
        )
    if not file.exists():
        measure_latency(model, config.cost_batch_size, config.training.precision).save(file)
    try:
        return Latency.load(file)
    except ValueError as error:
        return error


SET_UP, TABLE, COMPILE, DATA_WAIT, STEP, EVALUATE, CHECKPOINT = PHASES = (
    "set_up",
    "table",
    "compile",
    "data_wait",
    "step",
    "evaluate",
    "checkpoint",
)


class Goodput:
    """A clock that is always in exactly one phase, so that the phases' seconds add up to the total.

    It measures this process; a GPU may still be busy with an earlier phase. Everything that a stage's first step
    compiles, allocates or tunes counts as `compile`, with or without torch.compile. The clock starts in `set_up`.

    Args:
        now: returns seconds since an arbitrary time.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._seconds = now, dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = SET_UP, now()

    @property
    def seconds(self) -> Mapping[str, float]:
        """The seconds spent in each phase so far."""
        self.enter(self._phase)
        return MappingProxyType(dict(self._seconds))

    def enter(self, phase: str) -> None:
        """Switch the clock to `phase`, one of PHASES."""
        now = self._now()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now
        assert phase in self._seconds, phase

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """Switch to `phase` for the `with` block, then back."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def metrics(self) -> dict[str, float]:
        """Return `goodput_PHASE_seconds`, and `goodput_PHASE_share`, its share of the total, 0 to 1."""
        seconds = self.seconds
        total = sum(seconds.values()) or 1.0
        return {f"goodput_{phase}_seconds": value for phase, value in seconds.items()} | {
            f"goodput_{phase}_share": value / total for phase, value in seconds.items()
        }


class Epoch(Protocol):
    """One pass over a loader's batches. It may be closed before its end."""

    def __iter__(self) -> Iterator: ...

    def __next__(self) -> Any: ...

    def close(self) -> None:
        """End the pass, and free its memory."""
        ...


class Batches(Protocol):
    """The interface of a loader that the loop uses, implemented by datasets.loading.loader.MultiResolutionLoader."""

    @property
    def num_samples(self) -> int:
        """The number of samples."""
        ...

    @property
    def num_batches(self) -> int:
        """The number of steps of an epoch, the same on every rank."""
        ...

    def global_size(self, step: int) -> int:
        """Return the number of images of batch `step` over all ranks."""
        ...

    def epoch(
        self, epoch: int, start_step: int = 0, *, crop_epoch: int | None = None, sides: Collection[int] | None = None
    ) -> Epoch: ...

    def read(
        self, crop_epoch: int, batches: Sequence[NDArray[np.int64]], *, sides: Collection[int] | None = None
    ) -> Epoch: ...


@dataclass(frozen=True)
class Run:
    """Everything that a training run works with.

    Attributes:
        manifest: describes the prepared data that the loaders read.
        tables: folder of logit tables, the same for every rank.
    """

    config: Config
    model: DRNet
    costs: Costs
    train: Batches
    validation: Batches
    device: torch.device
    reporter: Reporter
    manifest: Manifest
    tables: Path
    goodput: Goodput = field(default_factory=Goodput)
