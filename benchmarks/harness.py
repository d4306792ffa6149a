"""How benches measure: two sides take turns in one run. A row has their medians, and the ratios of the pairs."""

from __future__ import annotations

import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

# Every process of a side imports this module, so heavy imports are inside the functions.

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "ffcv", "numba", "numpy", "pillow", "ray", "mlflow")
MIN_RUNS = 5
RESOLUTIONS, PREDICTOR_SIZE, NUM_CLASSES = (224, 168, 112), 128, 100
"""The resolutions, predictor input size and number of classes of the network that most benches measure."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""The mean and standard deviation with which the input of that network is normalized, for RGB on the scale 0..1."""
EVENTS = "progress.jsonl"
"""The name of the progress file in a run's folder, as in `pipeline.cluster.progress`, which imports Ray."""


@dataclass(frozen=True)
class Row:
    """One comparison: the medians of both sides, and the median and range of the ratios. Above 1, ours is better."""

    name: str
    unit: str
    ours: float
    peer: float
    ratio: float
    ratio_min: float
    ratio_max: float
    runs: int


Measure = Callable[[], float]


def compare(name: str, unit: str, ours: Measure, peer: Measure, runs: int, *, more_is_better: bool = True) -> Row:
    """Measure both sides `runs` times in turns, so that other load on the machine affects both."""
    return paired(name, unit, [(ours(), peer()) for _ in range(runs)], more_is_better=more_is_better)


def paired(name: str, unit: str, pairs: Sequence[tuple[float, float]], *, more_is_better: bool = True) -> Row:
    """Return the row of pairs (ours, peer) that were measured in turns."""
    ratios = [(one / other if more_is_better else other / one) for one, other in pairs]
    return Row(
        name,
        unit,
        statistics.median(one for one, _ in pairs),
        statistics.median(other for _, other in pairs),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        len(pairs),
    )


class Side:
    """One side in its own process, because some sides change the process that they run in.

    Args:
        function: "module:name" of a generator function that prepares and then yields one measured value per request.
        arguments: arguments of the function, as JSON values.
        variables: environment variables besides those that set the number of threads.

    Attributes:
        once: the first value, which includes one-time work such as compiling and is not part of the comparison.
    """

    once: float

    def __init__(
        self,
        function: str,
        arguments: Mapping[str, Any],
        num_threads: int,
        variables: Mapping[str, str] = MappingProxyType({}),
    ):
        # Limit each side to its threads, as a user would.
        threads = {name: str(num_threads) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = {**os.environ, **threads, **variables}
        # Many containers set this. Without bytecode every start compiles torch and numba again, 2 s for each side.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        command = [sys.executable, "-m", "benchmarks.harness", function, json.dumps(arguments)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.function = function

    def __enter__(self) -> Side:
        self.once = self.measure()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def measure(self) -> float:
        """Request one value.

        Raises:
            ChildProcessError: the process ended instead; its output is on standard error.
        """
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            answer = ""
        else:
            answer = self._process.stdout.readline()
        if not answer:
            raise ChildProcessError(f"{self.function} ended with exit code {self._process.wait()}")
        return float(answer)


def serve(function: str, arguments: Mapping[str, Any]) -> None:
    """Run a side's process: print one value for every line of standard input."""
    answers, sys.stdout = sys.stdout, sys.stderr  # so that a library's output is not read as an answer
    module, _, name = function.partition(":")
    values: Iterator[float] = getattr(importlib.import_module(module), name)(**arguments)
    for _ in sys.stdin:
        print(next(values), file=answers, flush=True)


def read_events(run_folder: Path) -> list[dict[str, Any]]:
    """Read the events in a run's progress file."""
    return [json.loads(line) for line in (run_folder / EVENTS).read_text().splitlines()]


def memory_mb(name: str) -> float:
    """Return the memory of this process in MB (1e6 bytes), from Linux.

    Args:
        name: VmRSS for the resident memory, VmHWM for its peak, or RssAnon for the part that is not mapped from a file.
    """
    (kilobytes,) = (
        line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(kilobytes) * 1024 / 1e6


def progress(line: str) -> None:
    """Print a result to standard error as soon as it is measured, because a whole bench may take half an hour."""
    print(line, file=sys.stderr, flush=True)


def environment() -> dict[str, Any]:
    """Return everything besides the arguments that a figure depends on: processor, versions, commit."""
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cpu": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "versions": versions,
        "commit": commit.stdout.strip() or None,
    }


def processor_name() -> str:
    """Return the processor's name on Linux, or the type of machine elsewhere."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def show(bench: str, rows: Sequence[Row], notes: Sequence[str], *, as_json: bool) -> None:
    """Print a table, or one JSON object and nothing else."""
    from rich.console import Console
    from rich.table import Table

    about = environment()
    if as_json:
        print(json.dumps({"bench": bench, "environment": about, "rows": [asdict(row) for row in rows]}, indent=2))
        return
    table = Table("what", "unit", "ours", "peer", "ratio", "spread", "runs", title=f"bench {bench}")
    for row in rows:
        spread = f"{row.ratio_min:.2f} to {row.ratio_max:.2f}"
        values = (f"{row.ours:,.4g}", f"{row.peer:,.4g}", f"{row.ratio:.2f}", spread, str(row.runs))
        table.add_row(row.name, row.unit, *values)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    versions = " ".join(f"{name} {number}" for name, number in about["versions"].items())
    console.print(f"{about['cpu']}, {about['cores']} cores, GPU {about['gpu']}, commit {about['commit']}\n{versions}")
    for note in notes:
        console.print(f"- {note}")


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
