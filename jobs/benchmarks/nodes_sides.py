"""The sides of bench nodes, each in a process that is the driver of a cluster of its own."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from jobs.benchmarks.small_run import small_config, use_token

EPOCHS = 4
STORE_BYTES = 100 * 1024**2


def training(num_nodes: int, data: str, storage: str) -> Iterator[float]:
    """Images/s of training runs on two workers, shared out over `num_nodes` nodes of this machine."""
    use_token()
    import ray
    from ray.cluster_utils import Cluster

    from pipeline.cluster.launch import train_run

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
