"""Learning rate as a pure function of progress, so a resumed run has nothing to restore."""

from __future__ import annotations

import math

from pipeline.config import Stage


def learning_rate(stage: Stage, epoch: float) -> float:
    """The stage's learning rate after `epoch` epochs (a fraction counts the steps within one).

    Linear warm-up from 0, then either steps (times gamma every step_epochs, counted from the stage's start, as in
    the paper) or a half cosine from the end of the warm-up to zero at the end of the stage.
    """
    if epoch < stage.warmup_epochs:
        return stage.lr * epoch / stage.warmup_epochs
    if stage.schedule == "step":
        return stage.lr * stage.gamma ** math.floor(epoch / stage.step_epochs)
    done = (epoch - stage.warmup_epochs) / (stage.epochs - stage.warmup_epochs)
    return stage.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
