"""Progress that a person can follow: rank 0 appends events to a file of the run folder, the driver prints them.

What befalls the workers has a file of its own, to which the driver's node appends.

A file on the shared storage, rather than workers' output through Ray, keeps the terminal free of log prefixes and of
other processes' lines, and a second terminal can follow it too.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

FILE_NAME, FAILURES = "progress.jsonl", "failures.jsonl"
SECONDS_BETWEEN_STEPS = 5.0
SECONDS_BETWEEN_LOOKS = 0.5


def append_event(run_folder: Path, event: Mapping[str, Any], file_name: str = FILE_NAME) -> None:
    """Add one event and when it was; a line is written at once, so a reader sees whole lines or nothing.

    Args:
        file_name: FILE_NAME for rank 0, FAILURES for the driver's node: over a network file system, two machines that
            append to one file can write over each other.
    """
    with (run_folder / file_name).open("a") as file:
        file.write(json.dumps({**event, "time": time.time()}) + "\n")


@contextmanager
def followed(run_folder: Path, show: Callable[[str], None] = print) -> Iterator[None]:
    """Print the run's new events while the body runs."""
    paths = [run_folder / FILE_NAME, run_folder / FAILURES]
    positions = {path: path.stat().st_size if path.exists() else 0 for path in paths}
    stop = threading.Event()

    def show_new(path: Path) -> None:
        with path.open() as file:
            file.seek(positions[path])
            for line in iter(file.readline, ""):
                if line.endswith("\n"):
                    positions[path] = file.tell()
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
    """One event as one line for the terminal."""
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
    """Seconds and percent of each phase of the workers' sitting, one line each."""
    total = sum(seconds.values())
    rows = [(phase.replace("_", " "), value) for phase, value in seconds.items()]
    lines = [f"{name:<12}{value:>9.1f} s {100 * value / max(total, 1e-9):>6.1f} %" for name, value in rows]
    return "\n".join(["where the time went:", *lines, f"{'together':<12}{total:>9.1f} s"])


class StepClock:
    """Turns steps into events every few seconds, with speed and time left measured over the stage's own steps."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self._stage = ""
        self._started = self._shown = 0.0
        self._first = 0

    def due(self, stage: str, done_steps: int) -> bool:
        """Whether to show this step; the first steps of a stage, with their compilation, are not timed."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._started, self._shown, self._first = stage, now, now, done_steps
            return False
        if now - self._shown < SECONDS_BETWEEN_STEPS:
            return False
        self._shown = now
        return True

    def speed(self, done_steps: int, all_steps: int) -> dict[str, float]:
        """Images/s and seconds left in the stage."""
        per_second = (done_steps - self._first) / max(time.monotonic() - self._started, 1e-9)
        return {
            "images_per_second": per_second * self.batch_size,
            "seconds_left": (all_steps - done_steps) / max(per_second, 1e-9),
        }


def _accuracies(values: Mapping[str, float], prefix: str) -> str:
    shown = [f"{key.removeprefix(prefix)} {100 * values[key]:.1f}" for key in values if key.startswith(prefix)]
    return "  ".join(shown) + " %"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
