"""What a step of each stage computes: forward, loss, backward. The loop around it is the same for all three.

An objective adds the gradient of its loss, *already divided by the global batch's size*, to the parameters; the loop
then sums gradients over ranks. So k ranks and one process take the same step, whatever part of a batch a rank holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config import BackboneStage, JointStage, PredictorStage, Stage
from pipeline.models.drnet import DRNet
from pipeline.training import distributed, losses

# A batch norm in training mode needs two values a channel; a lone image at the smallest resolution may leave just one.
MIN_IMAGES_FOR_STATISTICS: int = 2


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of a global batch, on the model's device."""

    images: Mapping[int, Tensor]
    """side -> uint8 (N, side, side, 3)"""
    labels_N: Tensor
    gumbel_NR: Tensor
    global_size: int
    """images of this step over all ranks"""

    def __len__(self) -> int:
        return len(self.labels_N)


Sums = dict[str, Tensor]
"""Sums over a rank's images of what is reported: loss, correct answers, choices, cost."""
Objective = Callable[[StepBatch], Sums]


def build_objective(model: DRNet, stage: Stage, costs_R: Tensor, precision: str = "float32") -> Objective:
    """The objective of a stage; also freezes what the stage does not train.

    Args:
        costs_R: the backbone's GFLOPs at each resolution, on the model's device.
        precision: float32, or bfloat16 to run forward passes under autocast.
    """
    forward = Forward(model, precision)
    model.requires_grad_(True)
    if isinstance(stage, BackboneStage):
        model.predictor.requires_grad_(False)
        return BackboneObjective(forward, stage)
    if isinstance(stage, PredictorStage):
        model.backbone.requires_grad_(False)
        return PredictorObjective(forward, stage, costs_R)
    assert isinstance(stage, JointStage)
    return JointObjective(forward, stage, costs_R)


def build_optimizer(model: DRNet, stage: Stage) -> torch.optim.Optimizer:
    """The stage's optimiser over the parameters that it trains; `lr_scale` of a group multiplies the schedule."""
    predictor_scale = stage.predictor_lr_scale if isinstance(stage, JointStage) else 1.0
    groups = [
        {"params": parameters, "lr": stage.lr, "lr_scale": scale, "weight_decay": decay}
        for module, scale in ((model.backbone, 1.0), (model.predictor, predictor_scale))
        for parameters, decay in _decay_groups(module, stage)
        if parameters
    ]
    if stage.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=stage.lr, fused=True)
    return torch.optim.SGD(groups, lr=stage.lr, momentum=stage.momentum, nesterov=stage.nesterov, fused=True)


class Forward:
    """The model's two forward passes in the run's precision; logits come back as float32.

    Batch norm runs in inference mode for fewer than MIN_IMAGES_FOR_STATISTICS images, and gradients still flow.
    """

    def __init__(self, model: DRNet, precision: str):
        self.model, self.enabled = model, precision == "bfloat16"

    def backbone(self, images: Mapping[int, Tensor], index: int, *, training: bool) -> Tensor:
        """Logits (N, K) at resolution `index`, for images {side: uint8 (N, side, side, 3)}."""
        side = self.model.resolutions[index]
        self.model.backbone.train(training and len(images[side]) >= MIN_IMAGES_FOR_STATISTICS)
        with torch.autocast(images[side].device.type, torch.bfloat16, enabled=self.enabled):
            return self.model.static_logits(images, index).float()

    def predictor(self, images: Mapping[int, Tensor]) -> Tensor:
        """Logits (N, R) over the candidate resolutions."""
        inputs = images[self.model.predictor_size]
        self.model.predictor.train(len(inputs) >= MIN_IMAGES_FOR_STATISTICS)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.enabled):
            return self.model.predictor_logits(images).float()


class BackboneObjective:
    """The losses of all resolutions, summed. Backward runs per resolution, so activations of one are held at a time."""

    def __init__(self, forward: Forward, stage: BackboneStage):
        self.forward, self.stage = forward, stage

    def __call__(self, batch: StepBatch) -> Sums:
        sums: Sums = {"loss": torch.zeros((), device=batch.labels_N.device)}
        for index, side in enumerate(self.forward.model.resolutions):
            logits_NK = self.forward.backbone(batch.images, index, training=True)
            loss = losses.summed_cross_entropy(logits_NK, batch.labels_N, self.stage.label_smoothing)
            (loss / batch.global_size).backward()
            sums["loss"] += loss.detach()
            sums[f"accuracy_{side}"] = _correct(logits_NK, batch.labels_N)
        return sums


class PredictorObjective:
    """The predictor's choice among the outputs of a frozen backbone (inference mode of batch norm, no gradient)."""

    def __init__(self, forward: Forward, stage: PredictorStage, costs_R: Tensor):
        self.forward, self.stage, self.costs_R = forward, stage, costs_R

    def __call__(self, batch: StepBatch) -> Sums:
        with torch.no_grad():
            logits_NRK = torch.stack(
                [self.forward.backbone(batch.images, index, training=False) for index in range(len(self.costs_R))],
                dim=1,
            )
        choice_NR = losses.straight_through_choice(
            self.forward.predictor(batch.images), batch.gumbel_NR, self.stage.tau
        )
        return _routed_backward(batch, choice_NR, logits_NRK, self.stage, self.costs_R)


class JointObjective:
    """Predictor and backbone together.

    With hard choices the backbone's gradient flows through the chosen resolution only, and the choice's own gradient
    needs just the values of the others. So each image is trained at its chosen resolution in that resolution's
    sub-batch, and evaluated at the others without gradient and with batch-norm statistics untouched.
    """

    def __init__(self, forward: Forward, stage: JointStage, costs_R: Tensor):
        self.forward, self.stage, self.costs_R = forward, stage, costs_R

    def __call__(self, batch: StepBatch) -> Sums:
        choice_NR = losses.straight_through_choice(
            self.forward.predictor(batch.images), batch.gumbel_NR, self.stage.tau
        )
        chosen_N = choice_NR.detach().argmax(dim=1)
        logits_NRK = torch.stack(
            [self._logits_at(index, batch, chosen_N == index) for index in range(len(self.costs_R))], dim=1
        )
        return _routed_backward(batch, choice_NR, logits_NRK, self.stage, self.costs_R)

    def _logits_at(self, index: int, batch: StepBatch, chosen_N: Tensor) -> Tensor:
        """Logits (N, K) at one resolution: with gradient for the images that chose it, without for the rest."""
        side = self.forward.model.resolutions[index]
        images = batch.images[side]
        trained, valued = chosen_N.nonzero().squeeze(1), (~chosen_N).nonzero().squeeze(1)
        parts = []
        if len(valued):  # first, while the running statistics are still those of the step before
            with torch.no_grad():
                parts.append(self.forward.backbone({side: images[valued]}, index, training=False))
        if len(trained) or not len(batch):
            parts.append(self.forward.backbone({side: images[trained]}, index, training=True))
        return torch.cat(parts)[torch.cat([valued, trained]).argsort()]


def _routed_backward(
    batch: StepBatch, choice_NR: Tensor, logits_NRK: Tensor, stage: PredictorStage | JointStage, costs_R: Tensor
) -> Sums:
    """L = L_ce + eta * L_reg, its backward pass, and what to report."""
    logits_NK = losses.mixed_logits(choice_NR, logits_NRK)
    loss = losses.summed_cross_entropy(logits_NK, batch.labels_N, stage.label_smoothing)
    cost_N = choice_NR @ costs_R
    local_cost = cost_N.sum() / batch.global_size
    others_cost = distributed.sum_over_ranks(local_cost) - local_cost.detach()
    penalty = losses.flops_penalty(local_cost, others_cost, costs_R, stage.alpha_gflops)
    (loss / batch.global_size + stage.eta * penalty).backward()
    shares_R = choice_NR.detach().sum(dim=0)
    return {
        "loss": loss.detach() + stage.eta * penalty.detach() * len(batch),
        "accuracy_routed": _correct(logits_NK, batch.labels_N),
        "gflops_backbone": cost_N.detach().sum(),
        **{f"share_{index}": share for index, share in enumerate(shares_R)},
    }


def _decay_groups(module: nn.Module, stage: Stage) -> Iterator[tuple[list[nn.Parameter], float]]:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if stage.decay_norm_and_bias:
        yield trained, stage.weight_decay
        return
    # Weights of convolutions and classifiers have two dimensions or more; batch norm and biases have one.
    yield [parameter for parameter in trained if parameter.ndim > 1], stage.weight_decay
    yield [parameter for parameter in trained if parameter.ndim <= 1], 0.0


def _correct(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    return (logits_NK.detach().argmax(dim=1) == labels_N).sum().float()


def trained_parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    """Every parameter that the optimiser updates, in its order."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
