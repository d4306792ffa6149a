"""bench nodes: two nodes with one worker each against one node with two workers, on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import Row, Side, compare, read_events
from benchmarks.runs import prepare_letters, small_config, use_token

NUM_IMAGES = 1024
EPOCHS = 4
STORE_BYTES = 100 * 1024**2


def run(images: Path | None, runs: int, threads: int) -> tuple[list[Row], list[str]]:
    """Measure the row of the table, and return it with notes."""
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
        "median of a run's epochs after its first, by the run's own clock, without start-up",
        "the nodes are raylets with different addresses on one machine: no network is measured",
    ]


def training(num_nodes: int, data: str, storage: str) -> Iterator[float]:
    """Yield the images/s of training runs on two workers, spread over `num_nodes` nodes of this machine."""
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
            epochs = [event["values"] for event in read_events(run) if "values" in event]
            speeds = [values["train_images_per_second"] for values in epochs]
            yield statistics.median(speeds[1:])
    finally:
        ray.shutdown()
        cluster.shutdown()
