"""Sides of bench step: a step as this project takes it, and as plain PyTorch would. Both end with the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import BackboneStage, JointStage, ModelConfig
from pipeline.models.drnet import DRNet, build_drnet
from pipeline.training.distributed import sum_gradients
from pipeline.training.loop import set_learning_rate
from pipeline.training.stages import StepBatch, build_objective, build_optimizer, trained_parameters

RESOLUTIONS, PREDICTOR_SIZE, NUM_CLASSES = (224, 168, 112), 128, 100
COSTS_R = torch.tensor([1.82, 1.02, 0.46])
"""GFLOPs of ResNet-18 at these resolutions, for the penalty"""
STAGES = {"backbone": BackboneStage(epochs=1), "joint": JointStage(epochs=1, alpha_gflops=1.0)}

Step = Callable[[StepBatch], None]


def ours(stage: str, value: str, batch: int, shares: Sequence[int] = ()) -> Iterator[float]:
    """This project's step: images/s, or megabytes that it takes at most."""
    model, images = _model(), _batch(batch, shares)
    model = model.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]
    yield from _measured(our_step(model, STAGES[stage]), images, value)


def naive(stage: str, value: str, batch: int, shares: Sequence[int] = ()) -> Iterator[float]:
    """The same in plain PyTorch."""
    model, images = _model(), _batch(batch, shares)
    yield from _measured(naive_step(model, STAGES[stage]), images, value)


def our_step(model: DRNet, stage: BackboneStage | JointStage) -> Step:
    """What the loop does with a batch, without what it reports."""
    objective = build_objective(model, stage, COSTS_R)
    optimizer = build_optimizer(model, stage)
    parameters = list(trained_parameters(optimizer))

    def step(batch: StepBatch) -> None:
        set_learning_rate(optimizer, stage.lr)
        sums = objective(batch)
        sum_gradients(parameters, sums["loss"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def naive_step(model: DRNet, stage: BackboneStage | JointStage) -> Step:
    """The stage's loss over all resolutions in one graph, backward, and SGD as torch has it by default."""
    groups = [{"params": model.backbone.parameters()}]
    if isinstance(stage, JointStage):
        groups.append({"params": model.predictor.parameters(), "lr": stage.lr * stage.predictor_lr_scale})
    optimizer = torch.optim.SGD(groups, lr=stage.lr, momentum=stage.momentum, weight_decay=stage.weight_decay)

    def step(batch: StepBatch) -> None:
        optimizer.zero_grad()
        images = {side: _normalized(model, pixels) for side, pixels in batch.images.items()}
        if isinstance(stage, JointStage):
            loss = _joint_loss(model, images, batch, stage)
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


def _joint_loss(model: DRNet, images: Mapping[int, Tensor], batch: StepBatch, stage: JointStage) -> Tensor:
    """Every image at every resolution with gradient; batch norm by running statistics where it was not chosen."""
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
            model.backbone.train(training)
            if len(rows):
                parts.append(model.backbone(images[side][rows], index))
        logits.append(torch.cat(parts)[torch.cat([others, mine]).argsort()])
    output_NK = torch.einsum("nr,nrk->nk", choice_NR, torch.stack(logits, dim=1))
    excess = ((choice_NR @ COSTS_R).mean() - stage.alpha_gflops) / (COSTS_R.max() - COSTS_R.min())
    return functional.cross_entropy(output_NK, batch.labels_N) + stage.eta * excess.relu()


def _normalized(model: DRNet, pixels: Tensor) -> Tensor:
    """(x / 255 - mean) / std, in torch's default layout."""
    mean, std = model.mean.view(1, 3, 1, 1), model.std.view(1, 3, 1, 1)
    return (pixels.permute(0, 3, 1, 2).contiguous().float() / 255 - mean) / std


def _measured(step: Step, batch: StepBatch, value: str) -> Iterator[float]:
    """Values of a step, the first of which is no steady one."""
    baseline = _megabytes("VmRSS")
    while True:
        _forget_peak()
        start = time.perf_counter()
        step(batch)
        seconds = time.perf_counter() - start
        yield len(batch) / seconds if value == "speed" else _megabytes("VmHWM") - baseline


def _megabytes(name: str) -> float:
    """Of this process now (VmRSS), or at most since `_forget_peak` (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(name))
    return int(kilobytes) / 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _model() -> DRNet:
    torch.manual_seed(0)
    config = ModelConfig(backbone="resnet18", resolutions=RESOLUTIONS)
    return build_drnet(config, NUM_CLASSES, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _batch(count: int, shares: Sequence[int]) -> StepBatch:
    """Noise; `shares` of the images choose each resolution, by noise that the predictor cannot overcome."""
    sides = {*RESOLUTIONS, PREDICTOR_SIZE} if shares else {*RESOLUTIONS}
    images = {side: torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8) for side in sides}
    bounds_R = torch.tensor(shares or [1]).cumsum(0)
    chosen_N = torch.bucketize((torch.arange(count) + 0.5) / count * bounds_R[-1], bounds_R)
    gumbel_NR = 1000.0 * functional.one_hot(chosen_N, len(RESOLUTIONS))
    return StepBatch(images, torch.randint(0, NUM_CLASSES, (count,)), gumbel_NR, count)
