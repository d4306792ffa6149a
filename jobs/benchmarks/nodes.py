"""bench nodes: two nodes of one worker against one node of two workers, on this machine."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from jobs.benchmarks.harness import Row, Side, compare
from jobs.benchmarks.small_run import prepare_letters

NUM_IMAGES = 1024
SIDES_FILE = "jobs.benchmarks.nodes_sides"


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """All rows of the table, and notes on them."""
    with TemporaryDirectory(prefix="bench-nodes-") as scratch:
        data = prepare_letters(Path(scratch) / "data", NUM_IMAGES)

        def side(num_nodes: int) -> Side:
            arguments = {"num_nodes": num_nodes, "data": str(data), "storage": f"{scratch}/{num_nodes}"}
            return Side(f"{SIDES_FILE}:training", arguments, 1)

        with side(2) as ours, side(1) as peer:
            name = "training, 2 nodes x 1 worker against 1 node x 2 workers"
            rows = [compare(name, "images/s", ours.measure, peer.measure, runs)]
    return rows, [
        f"{NUM_IMAGES} generated letters, small_resnet at 96 and 48 px, batches of 64, 1 CPU each worker",
        "median of a run's epochs after its first, by the run's own clock: start-up is no part of it",
        "nodes are raylets with addresses of their own on one machine: what is measured is ours, not a network",
    ]
