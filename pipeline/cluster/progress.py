"""Show a run to its users: progress and failures in the run folder, gauges for Prometheus, labeled logs."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge

from pipeline.training.run import DATA_WAIT, STEP, Goodput

PROGRESS, FAILURES = "progress.jsonl", "failures.jsonl"
SECONDS_BETWEEN_STEPS = 5.0
SECONDS_BETWEEN_LOOKS = 0.5


def append_event(run_folder: Path, event: Mapping[str, Any], file_name: str = PROGRESS) -> None:
    """Append one event with its time. Each line is a single write, so a reader sees only complete lines.

    Args:
        file_name: PROGRESS for rank 0 and, after the workers have ended, for the driver; FAILURES for the driver's
            node while workers run. On a network file system, two machines that append to one file could overwrite
            each other's lines.
    """
    with (run_folder / file_name).open("a") as file:
        file.write(json.dumps({**event, "time": time.time()}) + "\n")


def show_line(text: str) -> None:
    """Print a line. Characters that the terminal cannot show, such as in a file name that is not UTF-8, are escaped."""
    print(printable(text, sys.stdout.encoding or "utf-8"), flush=True)


def printable(text: str, encoding: str = "utf-8") -> str:
    """Replace characters that an encoding cannot represent by backslash escapes."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def event_writer(folder: Path | None) -> Callable[[str], None]:
    """Return a function that appends lines to a run folder's progress or, for None, prints them on this worker."""
    if folder is None:
        return show_line
    return lambda line: append_event(folder, {"message": line})


@contextmanager
def followed(run_folder: Path, show: Callable[[str], None] = show_line) -> Iterator[None]:
    """Print the run's new events while the `with` block runs."""
    paths = [run_folder / PROGRESS, run_folder / FAILURES]
    positions = {path: path.stat().st_size if path.exists() else 0 for path in paths}
    stop = threading.Event()

    def show_new(path: Path) -> None:
        with path.open() as file:
            file.seek(positions[path])
            for line in iter(file.readline, ""):
                if line.endswith("\n"):
                    positions[path] = file.tell()
                    with suppress(ValueError, KeyError, TypeError):  # a full disk may have cut a line short
                        show(describe(json.loads(line)))

    def follow() -> None:
        while True:
            last_look = stop.wait(SECONDS_BETWEEN_LOOKS)
            for path in filter(Path.exists, paths):
                show_new(path)
            if last_look:
                return

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def describe(event: Mapping[str, Any]) -> str:
    """Format one event as one line for the terminal."""
    if "message" in event:
        return str(event["message"])
    if "goodput" in event:
        return goodput_table(event["goodput"])
    head = f"{event['stage']:<9} epoch {event['epoch'] + 1:>3}/{event['epochs']}"
    if "values" not in event:
        return (
            f"{head}  step {event['step']:>4}/{event['steps']}  loss {event['loss']:.3f}  "
            f"{event['images_per_second']:.0f} images/s  {_clock(event['seconds_left'])} left in stage"
        )
    values = event["values"]
    parts = [head, f"loss {values['train_loss']:.3f}", f"train {_accuracies(values, 'train_accuracy_')}"]
    if "accuracy_routed" in values:
        parts.append(f"validation {_accuracies(values, 'accuracy_')}")
        if event["stage"] != "backbone":
            shares = "/".join(f"{100 * values[key]:.0f}" for key in values if key.startswith("share_"))
            parts.append(f"shares {shares} %  {values['gflops_routed']:.3g} GFLOPs")
    return "  ".join([*parts, f"{values['train_images_per_second']:.0f} images/s"])


def goodput_table(seconds: Mapping[str, float]) -> str:
    """Format the seconds and percentage of each phase of this attempt, one line each."""
    total = sum(seconds.values())
    rows = [(phase.replace("_", " "), value) for phase, value in seconds.items()]
    lines = [f"{name:<12}{value:>9.1f} s {100 * value / max(total, 1e-9):>6.1f} %" for name, value in rows]
    return "\n".join(["where the time went:", *lines, f"{'total':<12}{total:>9.1f} s"])


class StepClock:
    """Decide which steps are shown, one every few seconds, and measure speed and time left over this stage's steps.

    Args:
        images_per_step: mean number of images in a step, over all workers.
    """

    def __init__(self, images_per_step: float):
        self.images_per_step = images_per_step
        self._stage = ""
        self._started = self._shown = 0.0
        self._first = 0

    def due(self, stage: str, done_steps: int) -> bool:
        """Return whether to show this step. The first step of a stage, which includes compilation, is not timed."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._started, self._shown, self._first = stage, now, now, done_steps
            return False
        if now - self._shown < SECONDS_BETWEEN_STEPS:
            return False
        self._shown = now
        return True

    def speed(self, done_steps: int, all_steps: int) -> dict[str, float]:
        """Return images/s and seconds left in the stage."""
        per_second = (done_steps - self._first) / max(time.monotonic() - self._started, 1e-9)
        return {
            "images_per_second": per_second * self.images_per_step,
            "seconds_left": (all_steps - done_steps) / max(per_second, 1e-9),
        }


def _accuracies(values: Mapping[str, float], prefix: str) -> str:
    shown = [f"{key.removeprefix(prefix)} {100 * values[key]:.1f}" for key in values if key.startswith(prefix)]
    return "  ".join(shown) + " %"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


LOGGERS = ("datasets", "pipeline")
TAGS = ("run", "stage", "rank")
GAUGES = {
    "drnet_images_per_second": ("training images per second, over all workers", ()),
    "drnet_loss": ("mean loss of a step, over all workers", ()),
    "drnet_epochs_done": ("finished epochs of the stage", ()),
    "drnet_data_wait_share": ("share of the time of recent steps in which this worker waited for images", ()),
    "drnet_share": ("share of the validation images for which the predictor chose a resolution", ("resolution",)),
    "drnet_accuracy": ("top-1 of the validation images at a resolution, or routed", ("resolution",)),
}
"""Maps a gauge's name to its meaning and its tags besides TAGS. Ray exports it with the prefix `ray_`."""


class Gauges:
    """The gauges of one worker, which Ray exports at the metrics port of the worker's node."""

    def __init__(self, run: str, rank: int, goodput: Goodput):
        self._gauges = {name: Gauge(name, meaning, (*TAGS, *more)) for name, (meaning, more) in GAUGES.items()}
        self._tags, self._goodput = {"run": run, "rank": str(rank)}, goodput
        self._before: Mapping[str, float] = goodput.seconds

    def set(self, name: str, value: float, stage: str, **more: str) -> None:
        """Set a gauge of GAUGES. `more` has the values of its additional tags."""
        self._gauges[name].set(value, {**self._tags, "stage": stage, **more})

    def waiting(self, stage: str) -> None:
        """Set the share of time spent waiting for data since the last call."""
        now = self._goodput.seconds
        spent = {phase: now[phase] - self._before[phase] for phase in (DATA_WAIT, STEP)}
        self._before = now
        if total := sum(spent.values()):
            self.set("drnet_data_wait_share", spent[DATA_WAIT] / total, stage)

    def epoch(self, stage: str, epochs_done: float, values: Mapping[str, float]) -> None:
        """Set the gauges that are measured once per epoch."""
        self.set("drnet_epochs_done", epochs_done, stage)
        for key, value in values.items():
            for name, prefix in (("drnet_share", "share_"), ("drnet_accuracy", "accuracy_")):
                if key.startswith(prefix):
                    self.set(name, value, stage, resolution=key.removeprefix(prefix))


class Labels(logging.Filter):
    """Add run, stage and rank of a worker to its log records. The reporter updates the stage."""

    def __init__(self, run: str, rank: int):
        super().__init__()
        self.run, self.rank, self.stage = run, rank, "-"

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the labels to a record. Return True, which keeps the record."""
        record.run, record.rank, record.stage = self.run, self.rank, self.stage
        return True


class PrintableFormatter(logging.Formatter):
    """Format log lines so that every stream can print them (see `printable`)."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the formatted record, with characters escaped that standard error cannot represent."""
        return printable(super().format(record), sys.stderr.encoding or "utf-8")


@contextmanager
def labeled_logs(run: str, rank: int) -> Iterator[Labels]:
    """Send this project's log lines, with labels, to standard error, which Ray stores in one file per worker."""
    labels, handler = Labels(run, rank), logging.StreamHandler()
    handler.setFormatter(
        PrintableFormatter("%(asctime)s %(levelname)s run=%(run)s stage=%(stage)s rank=%(rank)s %(name)s: %(message)s")
    )
    handler.addFilter(labels)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # or each line would appear twice
    try:
        yield labels
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
