"""The optimizer, schedules as pure functions of progress, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import PARAM_LIST, AveragedModel, get_ema_multi_avg_fn

from pipeline.config.schema import JointStage, LayerRates, RoutedStage, Stage
from pipeline.models.backbone import ResolutionBackbone
from pipeline.models.drnet import DRNet
from pipeline.models.norms import resolution_norms

# torch.optim.lr_scheduler.OneCycleLR's defaults (Smith and Topin, "Super-Convergence", 2018).
ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = ONE_CYCLE_START / 10_000


def learning_rate(stage: Stage, epoch: float) -> float:
    """Return the stage's learning rate after `epoch` epochs; a fraction counts the steps within an epoch.

    The rate rises linearly from 0 during the warm-up. Then it follows steps (multiplied by gamma every step_epochs,
    counted from the stage's start, as in the paper), or a half cosine from the end of the warm-up to zero at the end of
    the stage. The one-cycle schedule is a half cosine up during the warm-up and another one down after it, between
    fixed fractions of the peak; the momentum is constant.
    """
    if stage.schedule == "one_cycle":
        return stage.lr * _one_cycle(epoch, stage.warmup_epochs, stage.epochs)
    if epoch < stage.warmup_epochs:
        return stage.lr * epoch / stage.warmup_epochs
    if stage.schedule == "step":
        return stage.lr * stage.gamma ** math.floor(epoch / stage.step_epochs)
    done = (epoch - stage.warmup_epochs) / (stage.epochs - stage.warmup_epochs)
    return stage.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def temperature(stage: RoutedStage, epoch: float) -> float:
    """Return the stage's tau after `epoch` epochs."""
    return _annealed(stage.tau_start, stage.tau, stage, epoch)


def cost_target(stage: RoutedStage, epoch: float) -> float:
    """Return the stage's alpha after `epoch` epochs, in the run's unit of cost."""
    return _annealed(stage.alpha_start, stage.alpha, stage, epoch)


def _annealed(start: float | None, end: float, stage: RoutedStage, epoch: float) -> float:
    """Return a value that moves linearly from `start` to `end` during anneal_epochs, and then stays at `end`."""
    if start is None:
        return end
    return end + (start - end) * max(0.0, 1 - epoch / (stage.anneal_epochs or stage.epochs))


def _one_cycle(epoch: float, rise_epochs: float, epochs: float) -> float:
    """Return the learning rate as a fraction of the peak."""
    if epoch < rise_epochs:
        return _half_cosine(ONE_CYCLE_START, 1.0, epoch / rise_epochs)
    return _half_cosine(1.0, ONE_CYCLE_END, (epoch - rise_epochs) / (epochs - rise_epochs))


def _half_cosine(start: float, end: float, done: float) -> float:
    """Return `start` at done = 0, `end` at done = 1, and a half cosine in between."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


class MovingAverage(AveragedModel):
    """A copy of `model` that `update_parameters(model)` updates: average = decay * average + (1 - decay) * model.

    The first update copies the model. Running statistics of batch norm are averaged like the weights. They describe the
    activations of the weights that they were measured with, so averages of both over the same steps match, while the
    latest statistics would not match averaged weights. If no image chooses a resolution, its statistics stay constant
    and their average approaches them.
    """

    module: DRNet

    def __init__(self, model: DRNet, decay: float):
        super().__init__(model, multi_avg_fn=_update(decay), use_buffers=True)


def _update(decay: float) -> Callable[[PARAM_LIST, PARAM_LIST, Tensor | int], None]:
    average = get_ema_multi_avg_fn(decay)

    def update(averaged: PARAM_LIST, current: PARAM_LIST, num_averaged: Tensor | int) -> None:
        if averaged[0].is_floating_point():
            average(averaged, current, num_averaged)
        else:  # a mean of flags or batch counters makes no sense
            torch._foreach_copy_(averaged, current)

    return update


def build_optimizer(model: DRNet, stage: Stage, own: nn.Module | None = None) -> torch.optim.Optimizer:
    """Build the stage's optimizer over the parameters that it trains. A group's `lr_scale` multiplies the schedule.

    Args:
        own: the objective's own parameters. They get no weight decay, which would make ensemble weights more equal.

    Raises:
        ValueError: the stage has a layer_decay, but timm does not define layer groups for the backbone.
    """
    predictor_scale = stage.predictor_lr_scale if isinstance(stage, JointStage) else 1.0
    groups = [
        {"params": parameters, "lr": stage.lr, "lr_scale": scale, "weight_decay": decay}
        for scales in (
            backbone_scales(model.backbone, stage),
            dict.fromkeys(model.predictor.parameters(), predictor_scale),
        )
        for scale, decay, parameters in _groups(scales, stage)
    ]
    if own is not None and (parameters := [parameter for parameter in own.parameters() if parameter.requires_grad]):
        groups.append({"params": parameters, "lr": stage.lr, "lr_scale": 1.0, "weight_decay": 0.0})
    if stage.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=stage.lr, fused=True)
    return torch.optim.SGD(groups, lr=stage.lr, momentum=stage.momentum, nesterov=stage.nesterov, fused=True)


def trained_parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    """Yield every parameter that the optimizer updates, in its order."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def completion_order(model: DRNet, own: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the trained parameters as GradientReducer's `early` (in the order of a backward pass) and `late`.

    Late parameters are those that the last backward pass may not reach: private batch norms, because no image may
    choose their resolution, and the objective's own parameters.
    """
    late = {p: None for part in (*resolution_norms(model.backbone), own) for p in part.parameters() if p.requires_grad}
    forward = [*model.predictor.parameters(), *model.backbone.parameters()]
    return [p for p in reversed(forward) if p.requires_grad and p not in late], list(late)


def backbone_scales(backbone: ResolutionBackbone, stage: Stage) -> dict[nn.Parameter, float]:
    """Return the factor by which the schedule's learning rate is multiplied for each of the backbone's parameters.

    It is layer_decay ** d for a layer with d layer groups between it and the output, as in BEiT (Bao et al., ICLR
    2022), and also multiplied by head_lr_scale for the classifier.
    """
    scales = dict.fromkeys(backbone.parameters(), 1.0)
    if not isinstance(stage, LayerRates):
        return scales
    if stage.layer_decay < 1:
        scales = {parameter: stage.layer_decay**depth for parameter, depth in backbone.layer_depths().items()}
    for parameter in backbone.classifier_parameters():
        scales[parameter] *= stage.head_lr_scale
    return scales


def _groups(scales: Mapping[nn.Parameter, float], stage: Stage) -> Iterator[tuple[float, float, list[nn.Parameter]]]:
    """Yield the trained parameters in groups, each with its lr_scale and weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, scale in scales.items():
        # Weights of convolutions and classifiers have at least two dimensions; batch norm and biases have one.
        decay = stage.weight_decay if stage.decay_norm_and_bias or parameter.ndim > 1 else 0.0
        if parameter.requires_grad:
            groups.setdefault((scale, decay), []).append(parameter)
    yield from ((*key, parameters) for key, parameters in groups.items())
