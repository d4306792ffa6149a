"""What the training loop tells, and to whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pipeline.training.checkpoint import TrainingState


@dataclass(frozen=True)
class Progress:
    """How far a run is. `epoch` counts within the stage; `data_epoch` over all stages, and keys every random draw."""

    stage: str
    epoch: int
    epochs: int
    data_epoch: int
    step: int = 0
    steps: int = 0

    @property
    def epochs_done(self) -> float:
        """Epochs of the stage that are done; a fraction counts the steps within one."""
        return self.epoch + self.step / self.steps


class Reporter(Protocol):
    """Where the loop tells what happens; every rank calls it, most of it matters on rank 0 only."""

    def step(self, progress: Progress, loss: Tensor) -> None:
        """A step is done; `loss` is the mean over the global batch, still on the device."""
        ...

    def epoch(self, progress: Progress, values: Mapping[str, float]) -> None:
        """An epoch is done, with what was measured in it."""
        ...

    def message(self, text: str) -> None:
        """A line for whoever follows the run."""
        ...

    def checkpoint(self, state: TrainingState, values: Mapping[str, float]) -> None:
        """Keep the state. It is a view of what trains: who keeps it beyond this call keeps `state.copy()`.

        Args:
            values: the epoch's, for a checkpoint at its end; empty for one within an epoch.
        """
        ...
