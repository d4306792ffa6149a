"""Small real runs, saboteurs that disturb them, and the comparison afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from mlflow import MlflowClient

from pipeline.config.load import parse_config
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import Config
from pipeline.tracking.journal import Journal, metric_values
from pipeline.training.checkpoint import load_model
from tests.conftest import ROOT
from tests.small import tree_of, with_fields
from tests.synthetic import without_timings

NUM_TRAIN, BATCH, CHECKPOINT_STEPS = 203, 20, 4
STEPS = -(-NUM_TRAIN // BATCH)


def config_of(folder: Path, name: str, **changed: Any) -> Config:
    """Configure two workers, three stages and a checkpoint every few steps; `changed` overrides fields."""
    routed = {"epochs": 2, "alpha_gflops": 0.0012, "lr": 0.01}
    tree = tree_of(
        folder,
        name=name,
        training={"batch_size": BATCH, "checkpoint_steps": CHECKPOINT_STEPS, "precision": "auto"},
        stages={"backbone": {"epochs": 3, "lr": 0.02}, "predictor": routed, "joint": routed},
        cluster={"num_workers": 2, "cpus_per_worker": 1, "storage": str(folder / "runs"), "max_failures": 8},
        tracking={"uri": f"sqlite:///{folder / 'mlflow.db'}"},
    )
    return parse_config(with_fields(tree, changed))


class Driver:
    """A process of `python -m jobs.train` on the cluster at an address."""

    def __init__(self, config: Config, address: str):
        folder = Path(tempfile.mkdtemp(dir=Path(config.cluster.storage).parent, prefix=f"{config.name}-"))
        file, self._log = folder / "config.yaml", folder / "output.log"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.train", "--config", str(file)],
                cwd=ROOT,
                env={**os.environ, "RAY_ADDRESS": address},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def ended(self, timeout: float = 300) -> int:
        """Wait for the process, for at most `timeout` seconds, and return its exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the driver did not end:\n{self.output}") from None


def ray_processes(name: str) -> list[psutil.Process]:
    """Return the processes of a kind, such as RayTrainWorker, among the children of this process."""
    mine = psutil.Process().children(recursive=True)
    return sorted((each for each in mine if name in _name(each)), key=lambda each: each.pid)


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def events(run: Path) -> list[dict[str, Any]]:
    """Return the events that rank 0 has written."""
    path = run / "progress.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def failures(run: Path) -> list[str]:
    """Return the messages about failures."""
    path = run / "failures.jsonl"
    return [json.loads(line)["message"] for line in path.read_text().splitlines()] if path.exists() else []


def messages(run: Path, start: str) -> list[dict[str, Any]]:
    return [event for event in events(run) if event.get("message", "").startswith(start)]


def starts(run: Path) -> list[dict[str, Any]]:
    """Return the events of workers that start, or resume from a checkpoint."""
    return [event for event in events(run) if event.get("message", "").startswith(("resuming", "starting"))]


def checkpoints(run: Path) -> list[str]:
    """Return the names of complete checkpoints, in the run's order."""
    return sorted(path.parent.name for path in run.glob("checkpoint_????_*/state.pt"))


def position(checkpoint: str) -> int:
    """Return the step of the whole run at which a checkpoint was taken, from its name."""
    _, epoch, step, *_ = checkpoint.split("_")
    return int(epoch) * STEPS + int(step)


Condition = Callable[[], bool]


class Saboteur:
    """Perform acts in order while a run trains, each as soon as its condition holds.

    It checks every few milliseconds, so only the exact step varies. An act that did not happen is an error at the end.
    """

    def __init__(self, run: Path, *acts: tuple[Condition, Callable[[], None]]):
        self.run, self.acts = run, acts
        self.done: list[tuple[float, str | None]] = []
        """When each act was done, and the newest complete checkpoint at that time."""
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="saboteur")

    def __enter__(self) -> Saboteur:
        self._thread.start()
        return self

    def __exit__(self, *failed: object) -> None:
        self._over.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        if failed[0] is None:
            assert len(self.done) == len(self.acts), f"the run ended after {len(self.done)} of {len(self.acts)} acts"

    def _work(self) -> None:
        try:
            for condition, act in self.acts:
                while not condition():
                    if self._over.wait(0.02):
                        return
                act()
                self.done.append((time.time(), next(reversed(checkpoints(self.run)), None)))
        except BaseException as error:
            self._error = error

    def losses(self) -> list[tuple[float, int, str]]:
        """Return for each act: seconds until training resumed, a bound on repeated steps, and where it resumed."""
        found = []
        resumed = starts(self.run)
        for when, newest in self.done:
            after = next((event for event in resumed if event["time"] > when), None)
            if after is None:
                continue
            name = after["message"].split()[2] if after["message"].startswith("resuming from") else None
            start = position(name) if name else 0
            reached = (position(newest) if newest else 0) + CHECKPOINT_STEPS
            found.append((after["time"] - when, max(0, reached - start), name or "the start"))
        return found


def in_stage(run: Path, stage: str) -> Condition:
    """Return a condition: the stage has a complete checkpoint."""
    return lambda: bool(list(run.glob(f"checkpoint_*_{stage}/state.pt")))


def reported(run: Path, start: str, times: int = 1) -> Condition:
    """Return a condition: rank 0 has reported a message at least `times` times."""
    return lambda: len(messages(run, start)) >= times


def signal_worker(which: int = 0, number: int = signal.SIGKILL) -> Callable[[], None]:
    """Return an act that sends a signal to one of the training workers, once there are any."""

    def act() -> None:
        while not (workers := ray_processes("RayTrainWorker")):
            time.sleep(0.01)
        os.kill(workers[which % len(workers)].pid, number)

    return act


def require_same(config: Config, undisturbed: Config) -> None:
    """Require the weights, the report's rows, and every metric once with its value, of the uninterrupted run."""
    run, expected = RunFolder.of(config), RunFolder.of(undisturbed)
    model, other = (load_model(each.model).model.state_dict() for each in (run, expected))
    assert list(model) == list(other)
    for name, value in model.items():
        assert torch.equal(value, other[name]), name
    assert json.loads(run.report_json.read_text())["rows"] == json.loads(expected.report_json.read_text())["rows"]
    assert tracked(config) == tracked(undisturbed)


def tracked(config: Config) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return by stage and key every value of a run in MLflow, except timings."""
    client = MlflowClient(str(config.tracking.uri))
    keys: dict[str, set[str]] = {}
    for _, record in Journal(RunFolder.of(config).path).read():
        if record["kind"] == "metrics" and record["stage"]:
            keys.setdefault(record["stage"], set()).update(without_timings(metric_values(record)))
    found = {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            name, _, stage = run.info.run_name.partition(" ")
            if name == config.name and stage:
                assert stage not in found, "a stage has one MLflow run"
                found[stage] = {key: _history(client, run.info.run_id, key) for key in sorted(keys[stage])}
    assert found.keys() == keys.keys()
    return found


def _history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))


def summed(losses: Sequence[tuple[float, int, str]]) -> tuple[float, int]:
    """Return the largest seconds and the largest steps."""
    return max(seconds for seconds, _, _ in losses), max(steps for _, steps, _ in losses)
