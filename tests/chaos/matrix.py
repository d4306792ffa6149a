"""The fault matrix: rows as the tests of this folder find them, and docs/faults.md made of them.

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
"""environment variable: the file that rows are added to; unset, they are not kept"""

HEAD = """# What happens when things die

Each row below is a test in `tests/chaos`: a small run on real Ray processes is disturbed for real, and what it ends
with is compared with a run that nobody disturbed. "Same result" means: the model's weights bit for bit, the report's
rows, and in MLflow every metric once with its value. `make chaos` does all of it and writes this page;
killed workers and a failing MLflow server are in `make test` too.

**What is lost** is at most the work since the last checkpoint that Ray Train has taken note of: one interval
(`training.checkpoint_epochs`, `training.checkpoint_steps`), and what is trained while a checkpoint is being written. In
the table, steps count from that checkpoint to the last step that can have been taken, so they are a bound, and seconds
are until training goes on: most are Ray's new processes and their imports. These runs have a checkpoint every 4 steps
of some 30 ms.

**How it is noticed.** A process that dies, at the controller's next look (0.25 s). A worker that hangs and no longer
answers, after `cluster.hang_seconds`. One that answers while its training stands still: the others wait for it in a
collective, which gives up after 30 minutes (torch's limit under Ray). A node, when Ray's head misses it. Workers are
started again up to `cluster.max_failures` times; then the driver ends with the reason and exit code 2, and the same
command goes on once that is mended. Where the cluster has no room for the workers, the run waits, and says so.

**Before it goes on**, the driver reads every checkpoint that Ray Train has listed. One that cannot be read gives way to
the one before it, and a damaged list is made anew. Where none can be read, the run does not begin anew by itself.

**Fewer workers.** With `cluster.min_workers` a run goes on with those that there is room for, and with all of them
once there is. Batches, order, crops and noise do not depend on their number. Batch norm's statistics (but for
`training.sync_batch_norm`), dropout and the order of sums do: such a run is as good, and not the same bit for bit.
"""


PATH = re.compile(r"(?:/[\w.-]+)+/(?=(?:runs|disk|data)/)")
"""the test's folder, before what is the run's"""


@dataclass(frozen=True)
class Row:
    """One fault and what came of it."""

    fault: str
    seen: str
    """what the user saw"""
    outcome: str
    seconds: float | None = None
    """until training went on"""
    steps: int | None = None
    """taken twice, at most"""


def record(row: Row) -> None:
    """Keep a row, where somebody asked for it."""
    if os.environ.get(FILE):
        with Path(os.environ[FILE]).open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")


def page(rows: list[Row]) -> str:
    """docs/faults.md."""
    lines = [HEAD, f"Measured on {processor_name()}, {len(os.sched_getaffinity(0))} cores.", ""]
    lines += ["| fault | what the user sees | what comes of it | seconds | steps |", "|---|---|---|---:|---:|"]
    for row in rows:
        numbers = ("" if row.seconds is None else f"{row.seconds:.0f}", "" if row.steps is None else str(row.steps))
        cells = (row.fault, PATH.sub("", row.seen), row.outcome, *numbers)
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    found = [Row(**json.loads(line)) for line in Path(sys.argv[1]).read_text().splitlines()]
    sys.stdout.write(page(found))
