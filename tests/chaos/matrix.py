"""The fault matrix: tests in this folder record rows, and docs/faults.md lists them.

`make chaos` runs every row and writes the page: `python -m tests.chaos.matrix ROWS.jsonl > docs/faults.md`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.harness import processor_name

FILE = "DRNET_FAULTS"
"""The environment variable that names the file to append rows to. If it is unset, rows are not kept."""

HEAD = """# What happens when a process, a node or a disk fails

Each row below is a test in `tests/chaos` or `tests/ray` with real Ray processes. A row about training disturbs a small
run and compares the result with an uninterrupted run. A row about serving sends requests while something fails. "Same
result" means: the same weights bit for bit, the same rows in the report, and in MLflow every metric once with the same
value. `make chaos` runs all of them and writes this page; `make test` includes killed workers, a failing MLflow server,
and killed replicas of a served model.

**What is lost.** At most the work since the last checkpoint that Ray Train has recorded: one interval
(`training.checkpoint_epochs`, `training.checkpoint_steps`), and the steps trained while a checkpoint is written. In the
table, "steps" is an upper bound on the steps that are trained twice, and "seconds" is the time until training resumes,
mostly for Ray's new processes and their imports. These runs write a checkpoint every 4 steps of about 30 ms.

**How a failure is detected.** The controller detects a dead process at its next poll (0.25 s), and a worker that no
longer answers after `cluster.hang_seconds`. If a worker answers but its training hangs, the others wait for it in a
collective, which fails after 30 minutes (torch's limit under Ray). Ray's head detects a lost node. Workers restart up
to `cluster.max_failures` times; then the driver prints the reason and exits with code 2. Fix the cause and rerun the
same command: it resumes. If the cluster has no room for the workers, the run waits and says so.

**Before a run resumes**, the driver reads every checkpoint in Ray Train's list. It replaces an unreadable checkpoint
with the one before it, and rebuilds a damaged list. If no checkpoint can be read, the run stops instead of starting
over.

**Fewer workers.** With `cluster.min_workers` a run continues with the workers that fit, and with all of them when there
is room again. Batches, order, crops and noise do not depend on their number. Batch norm's statistics (without
`training.sync_batch_norm`), dropout and the order of sums do: the result is as good, but not the same bit for bit.
"""


PATH = re.compile(r"(?:/[\w.-]+)+/(?=(?:runs|disk|data)/)")
"""The test's folder, in front of the run's own path."""


@dataclass(frozen=True)
class Row:
    """One fault and its outcome."""

    fault: str
    seen: str
    """What the user saw."""
    outcome: str
    seconds: float | None = None
    """Time until training resumed."""
    steps: int | None = None
    """Upper bound on the steps that were trained twice."""


def record(row: Row) -> None:
    """Append a row to the file that the environment names, if any."""
    if os.environ.get(FILE):
        with Path(os.environ[FILE]).open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")


def page(rows: list[Row]) -> str:
    """Format docs/faults.md."""
    lines = [HEAD, f"Measured on {processor_name()}, {len(os.sched_getaffinity(0))} cores.", ""]
    lines += ["| fault | what the user sees | outcome | seconds | steps |", "|---|---|---|---:|---:|"]
    for row in rows:
        numbers = ("" if row.seconds is None else f"{row.seconds:.0f}", "" if row.steps is None else str(row.steps))
        cells = (row.fault, PATH.sub("", row.seen), row.outcome, *numbers)
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    found = [Row(**json.loads(line)) for line in Path(sys.argv[1]).read_text().splitlines()]
    sys.stdout.write(page(found))
