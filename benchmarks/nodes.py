"""bench nodes: two nodes of one worker against one node of two workers, on this machine."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import Row, Side, compare
from benchmarks.small_run import prepare_letters, small_config, use_token

EPOCHS = 4
STORE_BYTES = 100 * 1024**2


def training(num_nodes: int, data: str, storage: str) -> Iterator[float]:
    """Images/s of training runs on two workers, shared out over `num_nodes` nodes of this machine."""
    use_token()
    import ray
    from ray.cluster_utils import Cluster

    from pipeline.cluster.driver import train_run

    Path(storage).mkdir()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES})
    for node in range(num_nodes):
        address = f"127.0.0.{2 + node}"
        cluster.add_node(num_cpus=2 // num_nodes, node_ip_address=address, object_store_memory=STORE_BYTES)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="WARNING")
    try:
        for number in count():
            run = train_run(small_config(Path(data), Path(storage), f"run-{number}", EPOCHS)).folder.path
            events = map(json.loads, (run / "progress.jsonl").read_text().splitlines())
            speeds = [event["values"]["train_images_per_second"] for event in events if "values" in event]
            yield statistics.median(speeds[1:])
    finally:
        ray.shutdown()
        cluster.shutdown()


NUM_IMAGES = 1024


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """All rows of the table, and notes on them."""
    with TemporaryDirectory(prefix="bench-nodes-") as scratch:
        data = prepare_letters(Path(scratch) / "data", NUM_IMAGES)

        def side(num_nodes: int) -> Side:
            arguments = {"num_nodes": num_nodes, "data": str(data), "storage": f"{scratch}/{num_nodes}"}
            return Side(f"{__name__}:training", arguments, 1)

        with side(2) as ours, side(1) as peer:
            name = "training, 2 nodes x 1 worker against 1 node x 2 workers"
            rows = [compare(name, "images/s", ours.measure, peer.measure, runs)]
    return rows, [
        f"{NUM_IMAGES} generated letters, small_resnet at 96 and 48 px, batches of 64, 1 CPU each worker",
        "median of a run's epochs after its first, by the run's own clock: start-up is no part of it",
        "nodes are raylets with addresses of their own on one machine: what is measured is ours, not a network",
    ]
