"""bench step: images/s and memory of a training step of each stage, against the same step in plain PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import MEAN, NUM_CLASSES, PREDICTOR_SIZE, RESOLUTIONS, STD, Row, Side, compare, memory_mb
from pipeline.config.load import load_config
from pipeline.config.schema import BackboneStage, JointStage, ModelConfig
from pipeline.models.backbone import compile_backbone
from pipeline.models.cost import measure_costs
from pipeline.models.drnet import DRNet, build_drnet
from pipeline.training.distributed import GradientReducer
from pipeline.training.loop import prepare_stage, set_learning_rate, train_epoch
from pipeline.training.monitoring import DivergenceMonitor
from pipeline.training.objectives import StepBatch, build_objective
from pipeline.training.optim import build_optimizer, completion_order
from pipeline.training.run import TABLE, Progress

BATCH = 32
STAGES = {
    "backbone": BackboneStage(epochs=1),
    "joint": JointStage(epochs=1, alpha_gflops=1.0, norm_statistics="routed"),
}
WORK: Mapping[str, Mapping[str, Any]] = {
    "backbone stage": {"stage": "backbone"},
    "joint stage, a third each": {"stage": "joint", "shares": [1, 1, 1]},
    "joint stage, 6:3:1": {"stage": "joint", "shares": [6, 3, 1]},
}
"""The measured stages. `shares` of the images go to 224, 168 and 112 px; 6:3:1 costs 0.8 of 224 px, as the paper's
alpha of 3.0 does."""
WORK_ON_CPU = {**WORK, "backbone stage, bfloat16": {"stage": "backbone", "precision": "bfloat16"}}
"""The stages to measure on a CPU: also bfloat16, in which CPUs with matrix units (AMX) train faster."""
VALUES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("speed", "images/s", {}),
    ("memory", "MB", {}),
    ("memory in use", "MB", {"MALLOC_MMAP_THRESHOLD_": str(2**20)}),
)
NUM_PHOTOGRAPHS, NUM_GLYPHS = 144, 2112
"""The numbers of images for the predictor stage: 2 and 33 batches of training images, and a few validation images."""
STEPS_ON_GPU = 4
"""The number of steps in one measurement, because a GPU works asynchronously."""
MIN_SECONDS = 3.0
"""The minimum duration of one measurement in seconds, in whole epochs."""
Step = Callable[[StepBatch], None]


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """Measure all rows of the table, and return them with notes."""
    notes = [
        f"{threads} threads; backbone and joint stage: ResNet-18, 100 classes, batches of {BATCH}, SGD with momentum, "
        "images in memory; the peers: default memory layout, all resolutions' graphs at once, one backward",
        "memory: the peak growth of the process beyond the built model, in a step after the first; in use: the same "
        "with an allocator that returns every block of 1 MB at once, on both sides",
    ]
    rows = []
    for name, work in WORK_ON_CPU.items():
        for value, unit, variables in VALUES:
            arguments = {**work, "value": value.split()[0], "batch": BATCH}
            ours, peer = (Side(f"{__name__}:{who}", arguments, threads, variables) for who in ("ours", "naive"))
            what = f"{name}, {value}, against all resolutions at once"
            with ours, peer:
                rows.append(compare(what, unit, ours.measure, peer.measure, runs, more_is_better=value == "speed"))
    return [*rows, *_predictor(images, runs, threads, notes)], notes


def _predictor(images: Path | None, runs: int, threads: int, notes: list[str]) -> list[Row]:
    # Import these here, because bench gpu uses this module on machines without the packages that prepare needs.
    from benchmarks.photographs import write_photographs
    from datasets.prepare.prepare import prepare
    from datasets.sources.glyphs import GlyphSettings

    rows = []
    with TemporaryDirectory(prefix="bench-step-") as scratch:
        folder = Path(scratch)
        photographs = write_photographs(folder / "photographs", images, NUM_PHOTOGRAPHS)
        prepare("imagefolder", folder / "data-imagenet100", source=photographs, validation_fraction=0.1)
        glyphs = GlyphSettings(num_train=NUM_GLYPHS, num_validation=NUM_GLYPHS // 10)
        prepare("glyphs", folder / "data-glyphs", glyphs=glyphs)
        for config, what in (("imagenet100", "ResNet-50, 224+168+112"), ("glyphs", "the demo's network, 96+48+32")):
            rows.append(_table(config, what, folder, runs, threads, notes))
    return rows


def _table(config: str, what: str, folder: Path, runs: int, threads: int, notes: list[str]) -> Row:
    with ExitStack() as stack:

        def side(logits: str) -> Side:
            arguments = {"config": config, "data": str(folder / f"data-{config}"), "logits": logits, "threads": threads}
            return stack.enter_context(Side(f"{__name__}:predictor", arguments, threads))

        table, live = side("table"), side("live")
        row = compare(f"predictor stage, {what}, table against live", "images/s", table.measure, live.measure, runs)
    notes.append(_cost_of(what, table.once, row))
    return row


def _cost_of(what: str, filled: float, row: Row) -> str:
    """Return the cost of one crop of every image in the table, and the number of epochs after which it pays off."""
    epochs = (1 / filled) / (1 / row.peer - 1 / row.ours)
    return (
        f"{what}: a crop of every image in the table is computed once, at {filled:.3g} images/s, which takes "
        f"{row.peer / filled:.2f} of an epoch of live training and pays off after {epochs:.1f} epochs"
    )


def predictor(config: str, data: str, logits: Literal["table", "live"], threads: int) -> Iterator[float]:
    """Yield the images/s of epochs of the predictor stage, with decoding. The first value is that of the table."""
    from benchmarks.runs import opened_run  # as in `_predictor`

    changed = [
        f"data.folder={data}",
        f"loader.num_threads={threads}",
        "training.batch_size=64",
        "training.precision=float32",
        f"stages.predictor={{epochs: 1, alpha_gflops: 0.01, logits: {logits}}}",
    ]
    with (
        TemporaryDirectory(prefix="bench-tables-") as folder,
        opened_run(load_config(config, changed), Path(folder)) as run,
    ):
        stage = run.config.stages.predictor
        assert stage is not None
        work = prepare_stage(run, stage, 0, DivergenceMonitor(None), None)
        filled = run.train.num_samples + run.validation.num_samples
        epochs = (Progress("predictor", 0, 1, data_epoch, 0, run.train.num_batches) for data_epoch in count())
        table_seconds = run.goodput.seconds[TABLE]
        train_epoch(run, work, next(epochs))
        yield filled / table_seconds if logits == "table" else 0.0
        while True:
            seconds, images = 0.0, 0
            while seconds < MIN_SECONDS:
                seconds += train_epoch(run, work, next(epochs))["train_epoch_seconds"]
                images += run.train.num_samples
            yield images / seconds


def ours(
    stage: str, value: str, batch: int, shares: Sequence[int] = (), *, compiled: bool = False, **where: Any
) -> Iterator[float]:
    """Yield the images/s, or the peak megabytes, of this project's step. `where`: see `_setting`."""
    model, images, precision = _setting(batch, shares, **where)
    model = model.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]
    if compiled:
        compile_backbone(model.backbone)
    yield from _measured(our_step(model, STAGES[stage], precision), images, value)


def naive(stage: str, value: str, batch: int, shares: Sequence[int] = (), **where: Any) -> Iterator[float]:
    """Yield the images/s, or the peak megabytes, of the same step in plain PyTorch."""
    model, images, precision = _setting(batch, shares, **where)
    yield from _measured(naive_step(model, STAGES[stage], precision), images, value)


def our_step(model: DRNet, stage: BackboneStage | JointStage, precision: str = "float32") -> Step:
    """Return the training loop's step, without its reports."""
    objective = build_objective(model, stage, _costs(model), precision)
    optimizer = build_optimizer(model, stage)
    reducer = GradientReducer(*completion_order(model, objective.own))

    def step(batch: StepBatch) -> None:
        set_learning_rate(optimizer, stage.lr)
        sums = objective(batch, reducer.last_pass)
        reducer.finish(sums["loss"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def naive_step(model: DRNet, stage: BackboneStage | JointStage, precision: str = "float32") -> Step:
    """Return a step with the stage's loss over all resolutions in one graph, one backward pass, and torch's default
    SGD."""
    groups = [{"params": model.backbone.parameters()}]
    if isinstance(stage, JointStage):
        groups.append({"params": model.predictor.parameters(), "lr": stage.lr * stage.predictor_lr_scale})
    optimizer = torch.optim.SGD(groups, lr=stage.lr, momentum=stage.momentum, weight_decay=stage.weight_decay)
    device, costs_R = model.mean.device.type, _costs(model)

    def autocast() -> AbstractContextManager:
        return torch.autocast(device, torch.bfloat16) if precision == "bfloat16" else nullcontext()

    def step(batch: StepBatch) -> None:
        optimizer.zero_grad()
        images = {side: _normalized(model, pixels) for side, pixels in batch.images.items()}
        with autocast():
            if isinstance(stage, JointStage):
                loss = _joint_loss(model, images, batch, stage, costs_R)
            else:
                loss = _backbone_loss(model, images, batch)
        loss.backward()
        optimizer.step()

    return step


def _backbone_loss(model: DRNet, images: Mapping[int, Tensor], batch: StepBatch) -> Tensor:
    model.train()
    losses = [
        functional.cross_entropy(model.backbone(images[side], index), batch.labels_N)
        for index, side in enumerate(model.resolutions)
    ]
    return torch.stack(losses).sum()


def _joint_loss(
    model: DRNet, images: Mapping[int, Tensor], batch: StepBatch, stage: JointStage, costs_R: Tensor
) -> Tensor:
    """Return the loss with every image at every resolution.

    Batch norm uses its running statistics or, with `norm_statistics: routed`, those of the images that chose a
    resolution.
    """
    model.predictor.train()
    perturbed_NR = model.predictor(images[model.predictor_size]).log_softmax(dim=1) + batch.gumbel_NR
    soft_NR = (perturbed_NR / stage.tau).softmax(dim=1)
    chosen_N = perturbed_NR.argmax(dim=1)
    choice_NR = functional.one_hot(chosen_N, len(model.resolutions)) + soft_NR - soft_NR.detach()
    logits = []
    for index, side in enumerate(model.resolutions):
        mine, others = (chosen_N == index).nonzero()[:, 0], (chosen_N != index).nonzero()[:, 0]
        parts = []
        for rows, training in ((others, False), (mine, True)):
            model.backbone.train(training and stage.norm_statistics == "routed")
            if len(rows):
                parts.append(model.backbone(images[side][rows], index).float())
        logits.append(torch.cat(parts)[torch.cat([others, mine]).argsort()])
    output_NK = torch.einsum("nr,nrk->nk", choice_NR, torch.stack(logits, dim=1))
    excess = ((choice_NR.float() @ costs_R).mean() - stage.alpha_gflops) / (costs_R.max() - costs_R.min())
    return functional.cross_entropy(output_NK, batch.labels_N) + stage.eta * excess.relu()


def _normalized(model: DRNet, pixels: Tensor) -> Tensor:
    """Return (x / 255 - mean) / std in torch's default layout."""
    mean, std = model.mean.view(1, 3, 1, 1), model.std.view(1, 3, 1, 1)
    return (pixels.permute(0, 3, 1, 2).contiguous().float() / 255 - mean) / std


def _setting(
    batch: int, shares: Sequence[int], backbone: str = "resnet18", device: str = "cpu", precision: str = "float32"
) -> tuple[DRNet, StepBatch, str]:
    """Return a new network and its images on the device, and the precision of its passes."""
    torch.manual_seed(0)
    config = ModelConfig(backbone=backbone, resolutions=RESOLUTIONS)
    model = build_drnet(config, NUM_CLASSES, MEAN, STD)
    return model.to(device), placed(_batch(batch, shares), device), precision


def _batch(count: int, shares: Sequence[int]) -> StepBatch:
    """Return random images. Noise that the predictor cannot overcome sends `shares` of them to each resolution."""
    sides = {*RESOLUTIONS, PREDICTOR_SIZE} if shares else {*RESOLUTIONS}
    images = {side: torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8) for side in sides}
    bounds_R = torch.tensor(shares or [1]).cumsum(0)
    chosen_N = torch.bucketize((torch.arange(count) + 0.5) / count * bounds_R[-1], bounds_R)
    gumbel_NR = 1000.0 * functional.one_hot(chosen_N, len(RESOLUTIONS))
    return StepBatch(images, torch.randint(0, NUM_CLASSES, (count,)), gumbel_NR, count)


def placed(batch: StepBatch, device: str) -> StepBatch:
    """Move a batch to a device."""
    images = {side: pixels.to(device) for side, pixels in batch.images.items()}
    return replace(batch, images=images, labels_N=batch.labels_N.to(device), gumbel_NR=batch.gumbel_NR.to(device))


def _costs(model: DRNet) -> Tensor:
    """Return the GFLOPs at each resolution, for the penalty."""
    return torch.tensor(measure_costs(model).backbone, device=model.mean.device)


def _measured(step: Step, batch: StepBatch, value: str) -> Iterator[float]:
    """Yield measurements of a step. The first value is not a steady one."""
    if batch.labels_N.is_cuda:
        yield from _measured_on_gpu(step, batch, value)
    baseline = memory_mb("VmRSS")
    while True:
        _forget_peak()
        start = time.perf_counter()
        step(batch)
        seconds = time.perf_counter() - start
        yield len(batch) / seconds if value == "speed" else memory_mb("VmHWM") - baseline


def _measured_on_gpu(step: Step, batch: StepBatch, value: str) -> Iterator[float]:
    """Yield measurements of STEPS_ON_GPU steps, or of the memory that PyTorch allocates on the GPU."""
    while True:
        baseline = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS_ON_GPU):
            step(batch)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = (torch.cuda.max_memory_allocated() - baseline) / 1e6
        yield STEPS_ON_GPU * len(batch) / seconds if value == "speed" else peak


def _forget_peak() -> None:
    """Let the peak of this process's memory (VmHWM) start again."""
    Path("/proc/self/clear_refs").write_text("5")
