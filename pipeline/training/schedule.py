"""Learning rate, temperature and cost target as pure functions of progress: a resumed run has nothing to restore."""

from __future__ import annotations

import math

from pipeline.config import RoutedStage, Stage

# torch.optim.lr_scheduler.OneCycleLR's defaults (Smith and Topin, "Super-Convergence", 2018).
ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = ONE_CYCLE_START / 10_000


def learning_rate(stage: Stage, epoch: float) -> float:
    """The stage's learning rate after `epoch` epochs (a fraction counts the steps within one).

    Linear warm-up from 0, then either steps (times gamma every step_epochs, counted from the stage's start, as in
    the paper) or a half cosine from the end of the warm-up to zero at the end of the stage. One cycle is a half cosine
    up during the warm-up and one down after it, between fixed fractions of the peak; the momentum stays as it is.
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
    """The stage's tau after `epoch` epochs."""
    return _annealed(stage.tau_start, stage.tau, stage, epoch)


def cost_target(stage: RoutedStage, epoch: float) -> float:
    """The stage's alpha after `epoch` epochs, in the run's unit of cost."""
    return _annealed(stage.alpha_start, stage.alpha, stage, epoch)


def _annealed(start: float | None, end: float, stage: RoutedStage, epoch: float) -> float:
    """Linear from `start` to `end` in the stage's anneal_epochs, and `end` from then on."""
    if start is None:
        return end
    return end + (start - end) * max(0.0, 1 - epoch / (stage.anneal_epochs or stage.epochs))


def _one_cycle(epoch: float, rise_epochs: float, epochs: float) -> float:
    """The rate as a fraction of the peak."""
    if epoch < rise_epochs:
        return _half_cosine(ONE_CYCLE_START, 1.0, epoch / rise_epochs)
    return _half_cosine(1.0, ONE_CYCLE_END, (epoch - rise_epochs) / (epochs - rise_epochs))


def _half_cosine(start: float, end: float, done: float) -> float:
    """From `start` at done = 0 to `end` at done = 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
