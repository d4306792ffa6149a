"""What an operator sees of a worker: gauges for Prometheus, and log lines that say whose they are."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ray.util.metrics import Gauge

from pipeline.training.goodput import DATA_WAIT, STEP, Goodput

LOGGERS = ("datasets", "pipeline")
TAGS = ("run", "stage", "rank")
GAUGES = {
    "drnet_images_per_second": ("training images a second, over all workers", ()),
    "drnet_loss": ("mean loss of a step, over all workers", ()),
    "drnet_epochs_done": ("epochs of the stage that are done", ()),
    "drnet_data_wait_share": ("share of the last steps' time that this worker waited for images", ()),
    "drnet_share": ("share of the validation images for which the predictor chose a resolution", ("resolution",)),
    "drnet_accuracy": ("top-1 of the validation images at a resolution, or routed", ("resolution",)),
}
"""name: meaning, and tags besides TAGS; Ray exports them with `ray_` before the name"""


class Gauges:
    """A worker's gauges, at the metrics port of its node's Ray."""

    def __init__(self, run: str, rank: int, goodput: Goodput):
        self._gauges = {name: Gauge(name, meaning, (*TAGS, *more)) for name, (meaning, more) in GAUGES.items()}
        self._tags, self._goodput = {"run": run, "rank": str(rank)}, goodput
        self._before: Mapping[str, float] = goodput.seconds

    def set(self, name: str, value: float, stage: str, **more: str) -> None:
        self._gauges[name].set(value, {**self._tags, "stage": stage, **more})

    def waiting(self, stage: str) -> None:
        """The share of waiting in the time since this was called last."""
        now = self._goodput.seconds
        spent = {phase: now[phase] - self._before[phase] for phase in (DATA_WAIT, STEP)}
        self._before = now
        if total := sum(spent.values()):
            self.set("drnet_data_wait_share", spent[DATA_WAIT] / total, stage)

    def epoch(self, stage: str, epochs_done: float, values: Mapping[str, float]) -> None:
        """What an epoch has measured."""
        self.set("drnet_epochs_done", epochs_done, stage)
        for key, value in values.items():
            for name, prefix in (("drnet_share", "share_"), ("drnet_accuracy", "accuracy_")):
                if key.startswith(prefix):
                    self.set(name, value, stage, resolution=key.removeprefix(prefix))


class Labels(logging.Filter):
    """Puts run, stage and rank of a worker on its log records; the stage is told as it changes."""

    def __init__(self, run: str, rank: int):
        super().__init__()
        self.run, self.rank, self.stage = run, rank, "-"

    def filter(self, record: logging.LogRecord) -> bool:
        record.run, record.rank, record.stage = self.run, self.rank, self.stage
        return True


@contextmanager
def labelled_logs(run: str, rank: int) -> Iterator[Labels]:
    """This project's log lines to standard error, which Ray keeps in a file for each worker, labelled."""
    labels, handler = Labels(run, rank), logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s run=%(run)s stage=%(stage)s rank=%(rank)s %(name)s: %(message)s")
    )
    handler.addFilter(labels)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # or it would be there twice
    try:
        yield labels
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
