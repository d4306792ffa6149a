"""What a stage reads: which crops in which epoch, at which sides, and with which stored logits of the backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from datasets.beton import TRAIN, VALIDATION
from pipeline.config import PredictorStage, Stage
from pipeline.training.goodput import TABLE
from pipeline.training.logit_table import LogitTable, TableKey
from pipeline.training.stages import Forward
from pipeline.training.table_writer import fill_table

if TYPE_CHECKING:
    from pipeline.training.loop import Batches, Epoch, Run


@dataclass(frozen=True)
class StageData:
    """The loaders as one stage uses them.

    Attributes:
        first_epoch: the data_epoch of the stage's first epoch.
        views: different crops of each training image, taken in turn; those of the stage's epoch e are the crops of
            data_epoch first_epoch + e mod views.
        sides: that are decoded; None is all.
        train_table, validation_table: the frozen backbone's logits; None where it runs.
    """

    train: Batches
    validation: Batches
    first_epoch: int
    views: int
    sides: tuple[int, ...] | None = None
    train_table: LogitTable | None = None
    validation_table: LogitTable | None = None

    def view(self, data_epoch: int) -> int:
        """The number of the epoch whose crops `data_epoch` shows."""
        return self.first_epoch + (data_epoch - self.first_epoch) % self.views

    def epoch(self, data_epoch: int, start_step: int = 0) -> Epoch:
        """Begin a pass over the training images."""
        return self.train.epoch(data_epoch, start_step, view=self.view(data_epoch), sides=self.sides)

    def logits(self, data_epoch: int, indices_N: Tensor) -> Tensor | None:
        """Stored logits (N, R, K), float32 on the CPU, of samples in an epoch; None where the backbone runs."""
        return self.train_table.logits(self.view(data_epoch), indices_N) if self.train_table else None

    def validation_epoch(self) -> Epoch:
        """Begin a pass over the validation images."""
        return self.validation.epoch(0, sides=self.sides)

    @property
    def validation_logits(self) -> Callable[[Tensor], Tensor] | None:
        """Indices (N,) -> stored logits (N, R, K) of validation samples; None where the backbone runs."""
        return partial(self.validation_table.logits, 0) if self.validation_table else None


def open_stage_data(run: Run, stage: Stage, first_epoch: int) -> StageData:
    """The data of a stage of `run`, whose model is the one that the stage begins with or goes on from.

    For a predictor stage with `logits: table` this computes what is missing of the logit tables; every rank must call
    it.

    Raises:
        TableError: from there.
    """
    live = StageData(run.train, run.validation, first_epoch, stage.epochs)
    if not isinstance(stage, PredictorStage):
        return live
    views = stage.views or stage.epochs
    if stage.logits == "live":
        return replace(live, views=views)
    return replace(
        live,
        views=views,
        sides=(run.model.predictor_size,),
        train_table=_table(run, TRAIN, run.train, range(first_epoch, first_epoch + views)),
        validation_table=_table(run, VALIDATION, run.validation, range(1)),
    )


def _table(run: Run, split: str, loader: Batches, views: range) -> LogitTable:
    """The complete table of a split."""
    key = TableKey.of(run.model, run.config, run.manifest, split)
    backbone_logits = Forward(run.model, key.precision).frozen_backbone
    with run.goodput.inside(TABLE):
        fill_table(run.tables, key, views, loader, backbone_logits, device=run.device, tell=run.reporter.message)
    return LogitTable(run.tables, key, views)
