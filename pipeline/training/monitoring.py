"""Monitor a run: means over an epoch, collapsed routing, diverging losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.schema import PredictorStage, RoutedStage
from pipeline.evaluation.statistics import COLLAPSED_SHARE
from pipeline.models.cost import Costs
from pipeline.training import distributed
from pipeline.training.run import Progress


class Meter:
    """Sum reported values over images. A mean is the sum over all ranks divided by the number of images on all ranks.

    `fold` sums over the ranks. Afterwards every rank has the same totals, which a checkpoint within an epoch saves.
    When `fold` is called changes the means only by rounding.

    Args:
        state: the state of another meter to continue from.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._sums: dict[str, Tensor] = {}
        self._totals: dict[str, float] = dict(state["totals"]) if state else {}
        self._images: int = state["images"] if state else 0

    def update(self, sums: Mapping[str, Tensor], global_size: int) -> None:
        """Add the sums of one step on this rank, and the number of images of the step on all ranks."""
        for key, value in sums.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value.clone()
        self._images += global_size

    def fold(self) -> None:
        """Add the sums of all ranks since the last call to the totals. Every rank must call this."""
        if not self._sums:
            return
        added = distributed.sum_over_ranks(torch.stack([value.double() for value in self._sums.values()])).tolist()
        for key, value in zip(self._sums, added, strict=True):
            self._totals[key] = self._totals.get(key, 0.0) + value
        self._sums = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the totals over all ranks."""
        assert not self._sums, "fold first"
        return {"totals": dict(self._totals), "images": self._images}

    def means(self) -> dict[str, float]:
        """Return the means over all images on all ranks. Every rank must call this."""
        self.fold()
        return {key: value / self._images for key, value in self._totals.items()}


def collapse_warning(name: str, stage: RoutedStage, costs: Costs, values: Mapping[str, float]) -> str | None:
    """Return a warning if the predictor has collapsed, otherwise None.

    The predictor has collapsed if it sends more than COLLAPSED_SHARE of the validation images to one resolution, and
    the oracle, which uses the cheapest correct resolution, sends fewer.

    Args:
        name: name of the stage.
        values: result of `evaluate`, with `share_SIDE` and `oracle_share_SIDE` for every resolution.
    """
    share, side, cost = max(
        (values[f"share_{side}"], side, cost) for side, cost in zip(costs.resolutions, costs.backbone, strict=True)
    )
    wanted = values[f"oracle_share_{side}"]
    if share <= COLLAPSED_SHARE or wanted > COLLAPSED_SHARE:
        return None
    section, key, alpha = f"stages.{name}", f"alpha_{costs.unit}", stage.target
    said = f"{cost:.3g} {'GFLOPs' if costs.latency is None else 'ms'}"
    by_noise = not (isinstance(stage, PredictorStage) and stage.objective == "correctness")
    if not by_noise and alpha is None:
        return None  # choosing the largest resolution is no collapse: a policy weighs its cost after training
    if cost == min(costs.backbone):
        reason = "the cheapest"
        change = f"Lower {section}.eta ({stage.eta:g}) or raise {key}" if by_noise else f"Raise {section}.{key}"
        change = change if alpha is None else f"{change} ({alpha:g})"
    elif alpha is None:
        reason = f"because no {key} asks for less"
        change = f"Set {section}.{key}"
    elif cost <= alpha:
        reason = f"whose {said} are within {key} ({alpha:g}), so nothing asks for less"
        change = f"Lower {section}.{key} below it, or put model.resolutions further apart"
    else:
        reason = f"though its {said} are above {key} ({alpha:g})"
        change = f"Raise {section}.eta ({stage.eta:g})" if by_noise else f"Lower {section}.{key}"
    if by_noise:
        change += f"; raise tau ({stage.tau:g}) or tau_start, so that unused resolutions keep a gradient"
    return (
        f"{name}: the predictor has collapsed: {100 * share:.1f} % of the validation images go to {side} px, {reason}; "
        f"the oracle sends {100 * wanted:.1f} % there. {change}; or train stages.backbone for longer, so that "
        f"resolutions differ in which images they classify correctly"
    )


CHECK_STEPS = 50
"""Losses are checked at least once in this many steps."""


class DivergedError(ValueError):
    """Training diverged. A retry with the same configuration would diverge in the same way."""


class DivergenceMonitor:
    """Check the loss and gradient norm of every step, some steps later.

    Reading a value from a GPU waits for the GPU, so steps are collected and checked together: after CHECK_STEPS steps,
    and before anything is evaluated or saved. Loss and gradient are sums over the ranks, so every rank raises at the
    same step.

    Args:
        max_loss: largest mean loss that a step may have; None allows every finite loss.
        last_checkpoint: name of the checkpoint from which training resumed.
    """

    def __init__(self, max_loss: float | None, last_checkpoint: str | None = None):
        self.last_checkpoint = last_checkpoint
        self._max_loss = math.inf if max_loss is None else max_loss
        self._unseen: list[tuple[Progress, Tensor, Tensor]] = []

    def step(self, progress: Progress, loss: Tensor, gradient_norm: Tensor, indices_N: Tensor) -> None:
        """Collect a step: its mean loss and gradient norm over all ranks, and this rank's sample indices.

        Raises:
            DivergedError: as in `check`.
        """
        self._unseen.append((progress, torch.stack([loss, gradient_norm.to(loss)]), indices_N))
        if len(self._unseen) >= CHECK_STEPS:
            self.check()

    def check(self) -> None:
        """Check every step since the last call. Every rank must call this.

        Raises:
            DivergedError: names the first diverged step, its images on all ranks, the last checkpoint and what to
                change.
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
        """Check weights and running statistics after the last update. Every rank must call this.

        Raises:
            DivergedError: a weight or a statistic is not finite.
        """
        values = [value for module in modules for value in module.state_dict().values() if value.is_floating_point()]
        if not torch.stack([value.isfinite().all() for value in values]).all():
            found = "weights or batch-norm statistics after it are not finite"
            raise DivergedError(self._message(progress, torch.tensor([], dtype=torch.long), found))

    def _message(self, progress: Progress, indices_N: Tensor, found: str) -> str:
        indices = sorted(itertools.chain.from_iterable(distributed.gather(indices_N.tolist())))
        images = f" Its images are those at {indices} of the training data." if indices else ""
        stage = f"stages.{progress.stage}"
        return (
            f"training diverged in stage {progress.stage}, epoch {progress.epoch + 1} of {progress.epochs}, "
            f"step {progress.step} of {progress.steps}: {found}.{images} The last checkpoint before it: "
            f"{self.last_checkpoint or 'none'}. Start a run with another name and a lower {stage}.lr, a higher "
            f"{stage}.warmup_epochs, a {stage}.clip_grad_norm, or training.precision=float32 instead of bfloat16. "
            "If such a loss is expected, raise training.max_loss and resume."
        )
