"""A loss that is not finite, or explodes, ends the run before it costs more, and before it reaches a checkpoint."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from pipeline.training import distributed
from pipeline.training.reporting import Progress

CHECK_STEPS = 50
"""steps after which a step's loss is looked at, at the latest"""


class DivergedError(ValueError):
    """Loss, gradient or weights are beyond repair: with this configuration, going on gives the same again."""


class Watch:
    """Looks at the loss and gradient norm of every step, some steps later.

    To look at a value on a GPU is to wait for it, so steps are kept and looked at together: every CHECK_STEPS, before
    anything is evaluated or saved. Loss and gradient are sums over the ranks, so every rank raises at the same step.

    Args:
        max_loss: largest mean loss of a step that is not called exploding; None allows every finite one.
        last_checkpoint: name of the checkpoint that training goes on from.
    """

    def __init__(self, max_loss: float | None, last_checkpoint: str | None = None):
        self.last_checkpoint = last_checkpoint
        self._max_loss = math.inf if max_loss is None else max_loss
        self._unseen: list[tuple[Progress, Tensor, Tensor]] = []

    def step(self, progress: Progress, loss: Tensor, gradient_norm: Tensor, indices_N: Tensor) -> None:
        """Keep a step: its mean loss and gradient norm over all ranks, and this rank's sample indices.

        Raises:
            DivergedError: as `check`.
        """
        self._unseen.append((progress, torch.stack([loss, gradient_norm.to(loss)]), indices_N))
        if len(self._unseen) >= CHECK_STEPS:
            self.check()

    def check(self) -> None:
        """Look at every step that was not looked at yet. Every rank must call it.

        Raises:
            DivergedError: naming the first bad step, all ranks' images of it, the last checkpoint and what to change.
        """
        if not self._unseen:
            return
        values = torch.stack([loss_and_norm for _, loss_and_norm, _ in self._unseen]).tolist()
        for (progress, _, indices_N), (loss, norm) in zip(self._unseen, values, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise DivergedError(self._message(progress, indices_N, f"loss {loss:.4g}, gradient norm {norm:.4g}"))
            if loss > self._max_loss:
                found = f"loss {loss:.4g}, above training.max_loss {self._max_loss:g}"
                raise DivergedError(self._message(progress, indices_N, found))
        self._unseen = []

    def check_weights(self, progress: Progress, *modules: nn.Module) -> None:
        """Look at weights and running statistics, which the last update may have spoilt. Every rank must call it.

        Raises:
            DivergedError: one of them is not finite.
        """
        values = [value for module in modules for value in module.state_dict().values() if value.is_floating_point()]
        if not torch.stack([value.isfinite().all() for value in values]).all():
            found = "weights or batch-norm statistics after it are not finite"
            raise DivergedError(self._message(progress, torch.tensor([], dtype=torch.long), found))

    def _message(self, progress: Progress, indices_N: Tensor, found: str) -> str:
        indices = sorted(itertools.chain.from_iterable(distributed.gather(indices_N.tolist())))
        images = f" Its images are those at {indices} of the training data." if indices else ""
        return (
            f"training diverged in stage {progress.stage}, epoch {progress.epoch + 1} of {progress.epochs}, "
            f"step {progress.step} of {progress.steps}: {found}.{images} The last checkpoint, from before it: "
            f"{self.last_checkpoint or 'none'}. To change, in a run of another name: lower stages.{progress.stage}.lr, "
            "raise its warmup_epochs, set its clip_grad_norm, or take training.precision=float32 where it is bfloat16; "
            "where such a loss is to be expected, go on with a larger training.max_loss"
        )
