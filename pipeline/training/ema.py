"""Exponential moving average of the weights (Polyak averaging), by torch's own AveragedModel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.swa_utils import PARAM_LIST, AveragedModel, get_ema_multi_avg_fn

from pipeline.models.drnet import DRNet


class MovingAverage(AveragedModel):
    """A copy of `model` that `update_parameters(model)` moves: average = decay * average + (1 - decay) * model.

    The first update copies the model. Batch norms' running statistics are averaged as the weights are: they belong to
    the activations of the weights that they were measured with, and the average of both lies in the middle of the
    same window, while the latest statistics beside averaged weights would fit neither. It holds for the resolutions'
    private statistics one by one: those of a resolution that nobody chose stay, and the average comes to them.
    """

    module: DRNet

    def __init__(self, model: DRNet, decay: float):
        super().__init__(model, multi_avg_fn=_update(decay), use_buffers=True)


def _update(decay: float) -> Callable[[PARAM_LIST, PARAM_LIST, Tensor | int], None]:
    average = get_ema_multi_avg_fn(decay)

    def update(averaged: PARAM_LIST, current: PARAM_LIST, num_averaged: Tensor | int) -> None:
        if averaged[0].is_floating_point():
            average(averaged, current, num_averaged)
        else:  # the batch norms' counts of batches have no mean
            torch._foreach_copy_(averaged, current)

    return update
