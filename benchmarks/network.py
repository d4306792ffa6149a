"""bench network: a step over a slow network against its formula, next to DistributedDataParallel.

Two nodes in network namespaces have one worker each; `tc` limits their link to three rates. This needs root and
iproute2.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import get_model

from benchmarks.harness import MEAN, NUM_CLASSES, ROOT, STD, Row, paired, progress
from benchmarks.namespaces import Network, limit
from pipeline.config.schema import BackboneStage, JointStage, ModelConfig, PredictorStage
from pipeline.models.cost import measure_costs
from pipeline.models.drnet import build_drnet, place_model
from pipeline.training.distributed import GradientReducer
from pipeline.training.objectives import StepBatch, build_objective, gumbel_noise
from pipeline.training.optim import build_optimizer, completion_order

SUBNET, PORT, NUM_NODES = "10.214.77", 29611, 2
NETWORKS = ("resnet18", "resnet50")
SIDES, PREDICTOR_SIDE, NUM_IMAGES = (128, 96, 64), 64, 4
"""The images of a worker in a step. Their sides are small so that the whole bench takes minutes on two CPU cores."""
GRADIENT_BYTES, PLAN_IMAGES, PLAN_RATE = 102_653_088, 64, 1317
"""The plan of docs/scaling.md: ResNet-50's gradients in bytes, images per GPU and step, and images/s in the stage."""
APART, TOGETHER = 2 / 3 * 4.089 / 7.670, 2 / 3
"""The share of a step that overlaps messages: the largest resolution's backward pass, or that of all resolutions."""
SHARES = (1 / 3, 1.0, 2.0)
"""The time of the messages at each rate, as a share of the computing time of the backbone, joint or predictor stage."""
STAGES = {
    "backbone": BackboneStage(epochs=1),
    "joint": JointStage(epochs=1, alpha_gflops=1.0),
    "predictor": PredictorStage(epochs=1, alpha_gflops=1.0),
}


@dataclass(frozen=True)
class Variant:
    """One way to train: a stage of this project, or DistributedDataParallel with one resolution.

    Attributes:
        overlap: False sends all messages after the last backward pass.
    """

    name: str
    stage: str
    backward: str = "apart"
    dtype: str = "float32"
    overlap: bool = True


STATIC = "static"
VARIANTS = (
    Variant("backbone, after the last pass", "backbone", overlap=False),
    Variant("backbone, apart", "backbone"),
    Variant("backbone, together", "backbone", "together"),
    Variant("backbone, apart, bfloat16", "backbone", dtype="bfloat16"),
    Variant("backbone, together, bfloat16", "backbone", "together", "bfloat16"),
    Variant("DDP, one resolution", STATIC),
    Variant("joint", "joint"),
    Variant("predictor", "predictor"),
)
"""Variants of one stage are neighbors, because they share the rates of the first one. DDP has the backbone's."""


@dataclass(frozen=True)
class Measured:
    """The measurements of one variant at one rate, in seconds, by run.

    Attributes:
        compute: a step without messages.
        hidden: the part of it that can overlap with messages, its last backward pass.
        reduce: all messages alone.
        step: the whole step.
    """

    compute: float
    hidden: float
    reduce: float
    step: float

    @property
    def predicted(self) -> float:
        """The step's predicted seconds, by run."""
        return step_seconds(self.compute, self.hidden, self.reduce)


def step_seconds(compute: float, hidden: float, reduce: float) -> float:
    """Return the duration of a step if messages of `reduce` seconds overlap with `hidden` seconds of it."""
    return compute + max(0.0, reduce - hidden)


def plan() -> list[str]:
    """Return the lines of a table of efficiencies on A100 GPUs in the backbone stage, by the formula."""
    compute = PLAN_IMAGES / PLAN_RATE
    names = ("after the last pass", *(f"{way}{dtype}" for dtype in ("", ", bfloat16") for way in ("apart", "together")))
    lines = [f"| network of a node | GPUs | t_reduce | {' | '.join(names)} |", "|---|---:|---:|" + "---:|" * len(names)]
    for gigabits in (25, 100, 400):
        for num_gpus in (8, 64, 512):
            reduce = 2 * (num_gpus - 1) / num_gpus * GRADIENT_BYTES / (gigabits * 1e9 / 8)
            steps = [
                step_seconds(compute, hidden * compute, message * reduce)
                for message, hidden in ((1, 0.0), (1, APART), (1, TOGETHER), (0.5, APART), (0.5, TOGETHER))
            ]
            cells = [f"{gigabits} Gb/s", str(num_gpus), f"{1000 * reduce:.1f} ms"]
            cells += [f"{100 * compute / step:.0f} %" for step in steps]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """Measure all rows of the table, and return them with notes.

    Raises:
        ValueError: `images` is given, or this machine allows no namespaces.
    """
    if images is not None:
        raise ValueError(f"--images {images} is not possible: bench network draws random images; omit --images")
    rows: list[Row] = []
    lines = [
        "| network | variant | Mbit/s | compute | hidden | messages | formula | step | exposed | step / compute "
        "| step / formula |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    with ExitStack() as stack:
        network = Network(stack, SUBNET)
        spaces = [network.join(2 + rank) for rank in range(NUM_NODES)]
        each = max(1, threads // NUM_NODES)
        alone = stack.enter_context(Workers([None] * NUM_NODES, each))
        joined = stack.enter_context(Workers(spaces, each))
        for name in NETWORKS:
            rates: dict[float, float] = {}
            for variant in VARIANTS:
                alone.build(name, variant), joined.build(name, variant)
                if variant.stage != STATIC and (not rates or variant.stage != "backbone"):
                    rates = _rates(alone, joined)
                for share, rate in rates.items():
                    found = [_measure(alone, joined, variant, spaces, rate) for _ in range(runs)]
                    pairs = [(each.step, each.predicted) for each in found]
                    what = f"{name}, {variant.name}, messages {share:.2g} x compute, against the formula"
                    rows.append(paired(what, "s", pairs, more_is_better=False))
                    lines.append(_line(name, variant, rate, found))
                    progress(lines[-1])
    sides = ", ".join(map(str, SIDES))
    notes = [
        f"{NUM_NODES} nodes in network namespaces, each with 1 worker of {each} threads and {NUM_IMAGES} images at "
        f"{sides} px, gloo, {NUM_CLASSES} classes; medians of {runs} runs; the slower worker counts",
        "formula: compute + max(0, messages - hidden); hidden is the last backward pass of a step, measured without "
        "messages; the goal is at most 1.08 of it",
        "the table for docs/scaling.md, in milliseconds:\n" + "\n".join(lines),
        "the plan for docs/scaling.md:\n" + "\n".join(plan()),
    ]
    return rows, notes


def _rates(alone: Workers, joined: Workers) -> dict[float, float]:
    """Return, for each of SHARES, the bits/s at which the messages take this share of the computing time."""
    compute = statistics.median(alone.ask("compute")[0] for _ in range(3))
    (num_bytes,) = joined.ask("bytes")
    # In a ring over two nodes, each node sends as many bytes as the gradients have.
    return {share: 8 * num_bytes / (share * compute) for share in SHARES}


def _measure(alone: Workers, joined: Workers, variant: Variant, spaces: Sequence[str], rate: float) -> Measured:
    for space in spaces:
        limit(space, rate)
    compute, hidden = alone.ask("compute")
    (reduce,), (step,) = joined.ask("reduce"), joined.ask("step")
    return Measured(compute, hidden if variant.overlap else 0.0, reduce, step)


def _line(network: str, variant: Variant, rate: float, found: Sequence[Measured]) -> str:
    """Return a row of the page's table, of medians."""

    def median(value: Callable[[Measured], float]) -> float:
        return statistics.median(map(value, found))

    seconds = [
        median(value)
        for value in (
            lambda each: each.compute,
            lambda each: each.hidden,
            lambda each: each.reduce,
            lambda each: each.predicted,
            lambda each: each.step,
            lambda each: each.step - each.compute,
        )
    ]
    ratios = median(lambda each: each.step / each.compute), median(lambda each: each.step / each.predicted)
    cells = [network, variant.name, f"{rate / 1e6:.0f}", *(f"{1000 * value:.0f}" for value in seconds)]
    return f"| {' | '.join([*cells, *(f'{ratio:.2f}' for ratio in ratios)])} |"


class Workers:
    """One process per rank, each in a namespace or, for None, without other ranks. They work at the same time."""

    def __init__(self, spaces: Sequence[str | None], threads: int):
        address = f"tcp://{SUBNET}.2:{PORT}"
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": str(threads)}
        self._processes = [
            subprocess.Popen(
                [
                    *(["ip", "netns", "exec", space] if space else []),
                    *[sys.executable, "-m", __name__, str(rank), address if space else "", str(threads)],
                ],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, space in enumerate(spaces)
        ]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream
                stream.close()

    def build(self, network: str, variant: Variant) -> None:
        """Make all workers build what they measure next, and warm it up."""
        self.ask("build", network=network, **vars(variant))

    def ask(self, what: str, **arguments: Any) -> list[float]:
        """Return the largest of the workers' answers, value by value.

        Raises:
            ChildProcessError: a worker ended instead; its output is on standard error.
        """
        for process in self._processes:
            assert process.stdin
            process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
            process.stdin.flush()
        answers = []
        for process in self._processes:
            assert process.stdout
            line = process.stdout.readline()
            if not line:
                raise ChildProcessError(f"a worker of bench network ended with exit code {process.wait()}")
            answers.append(json.loads(line))
        return [max(values) for values in zip(*answers, strict=True)]


LastPass = Callable[[], AbstractContextManager[None]]


class Training:
    """A worker's network and its step."""

    def __init__(self, stack: ExitStack, rank: int, network: str, variant: Variant):
        torch.manual_seed(0)
        self.variant, self.hidden = variant, 0.0
        if variant.stage == STATIC:
            model = get_model(network, weights=None, num_classes=NUM_CLASSES)
            model = model.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]
            self._reducer = GradientReducer([*model.parameters()][::-1])
            self._optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
            static = DistributedDataParallel(model) if dist.is_initialized() else model
            pixels = torch.randn(NUM_IMAGES, 3, SIDES[0], SIDES[0]).contiguous(memory_format=torch.channels_last)
            self._pass = lambda last_pass: _static_pass(static, pixels, last_pass)
        else:
            config = ModelConfig.model_validate(
                {"backbone": network, "resolutions": SIDES, "predictor": {"input_size": PREDICTOR_SIDE}}
            )
            drnet = place_model(build_drnet(config, NUM_CLASSES, MEAN, STD), torch.device("cpu"), channels_last=True)
            stage, costs_R = STAGES[variant.stage], torch.tensor(measure_costs(drnet).backbone)
            objective = build_objective(drnet, stage, costs_R, backward=variant.backward)
            wire = getattr(torch, variant.dtype)
            self._reducer = GradientReducer(*completion_order(drnet, objective.own), wire=wire)
            self._optimizer = build_optimizer(drnet, stage, objective.own)
            batch = _batch(rank, stored_logits=variant.stage == "predictor")
            self._pass = lambda last_pass: objective(batch, last_pass)["loss"]
        self._parameters = [value for group in self._optimizer.param_groups for value in group["params"]]
        stack.enter_context(self._reducer)

    def step(self) -> None:
        """Run a step, with messages if there are other ranks."""
        static = self.variant.stage == STATIC  # DistributedDataParallel sends its own messages
        loss = self._pass(self._reducer.last_pass if self.variant.overlap and not static else nullcontext)
        if not static:
            self._reducer.finish(loss)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def compute(self) -> list[float]:
        """Return the seconds of a step without messages, and of its last backward pass."""
        assert not dist.is_initialized()
        self.hidden, started = 0.0, time.perf_counter()
        loss = self._pass(self._timed)
        self._reducer.finish(loss)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return [time.perf_counter() - started, self.hidden]

    def reduce(self) -> list[float]:
        """Return the seconds of all messages of a step, without computing."""
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        dist.barrier()
        started = time.perf_counter()
        self._reducer.finish(torch.zeros(()))
        seconds = time.perf_counter() - started
        self._optimizer.zero_grad(set_to_none=True)
        return [seconds]

    def num_bytes(self) -> int:
        """Return the bytes of the gradients."""
        return sum(parameter.nbytes for parameter in self._parameters)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.hidden += time.perf_counter() - started


def _static_pass(model: nn.Module, pixels: torch.Tensor, last_pass: LastPass) -> torch.Tensor:
    loss = functional.cross_entropy(model(pixels), torch.arange(len(pixels)))
    with last_pass():
        loss.backward()
    return loss


def _batch(rank: int, *, stored_logits: bool) -> StepBatch:
    """Return a worker's random images. The predictor stage has enough of them to take a measurable time."""
    count = 32 * NUM_IMAGES if stored_logits else NUM_IMAGES
    sides = (PREDICTOR_SIDE,) if stored_logits else {*SIDES, PREDICTOR_SIDE}
    images = {side: torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8) for side in sides}
    indices_N = torch.arange(count) + rank * count
    logits_NRK = torch.randn(count, len(SIDES), NUM_CLASSES) if stored_logits else None
    noise_NR = gumbel_noise(0, 0, indices_N, len(SIDES))
    return StepBatch(images, indices_N % NUM_CLASSES, noise_NR, NUM_NODES * count, logits_NRK)


def work(rank: int, address: str, threads: int) -> None:
    """Run a worker: answer each line of standard input, a JSON object, with a list of numbers."""
    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr
    if address:
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=NUM_NODES)
    with ExitStack() as stack:
        training: Training | None = None
        for line in sys.stdin:
            request = json.loads(line)
            answer: list[float] = []
            match request.pop("what"):
                case "build":
                    stack.close()
                    training = Training(stack, rank, request.pop("network"), Variant(**request))
                    training.step()
                case "compute":
                    assert training
                    answer = training.compute()
                case "bytes":
                    assert training
                    answer = [training.num_bytes()]
                case "reduce":
                    assert training
                    answer = training.reduce()
                case "step":
                    assert training
                    dist.barrier()
                    started = time.perf_counter()
                    training.step()
                    answer = [time.perf_counter() - started]
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
