"""Kill one node of a cluster of several real nodes on this machine: `python -m tests.chaos.nodes FOLDER REGISTRY`.

It is a separate process because a process can be the driver of only one cluster. FOLDER holds prepared data in `data`;
results are written to FOLDER/results.json. REGISTRY is the address of a registry that has the model drnet@champion.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
import ray.train
from ray import serve
from ray.cluster_utils import Cluster

from pipeline.cluster.driver import train_run
from pipeline.cluster.serve_model import serve_model
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import ServingConfig
from tests.chaos.runs import Condition, Saboteur, config_of, events, failures, in_stage, starts
from tests.serve_clients import TOKEN, load
from tests.unit.tracking_fixtures import free_port, wait_until

ELASTIC_EPOCHS = 300
LOOKS = {"elastic_resize_monitor_interval_s": 5.0}
"""By default Ray looks for new nodes once a minute; a fast machine would finish all epochs in that time."""
ADDRESSES = [f"127.0.0.{last}" for last in range(2, 9)]


class Nodes:
    """A cluster of a head that runs no training and nodes of one CPU each."""

    def __init__(self, count: int):
        # Ray's shutdown at exit would set a signal handler for each node, but nodes are added outside the main thread.
        self.cluster = Cluster(
            initialize_head=True,
            shutdown_at_exit=False,
            head_node_args={"num_cpus": 0, "object_store_memory": 100 * 1024**2},
        )
        atexit.register(self.cluster.shutdown)
        self._addresses = iter(ADDRESSES)
        self.nodes = [self.add() for _ in range(count)]
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="WARNING")

    def add(self):
        """Add a node with its own address."""
        return self.cluster.add_node(
            num_cpus=1, node_ip_address=next(self._addresses), object_store_memory=100 * 1024**2
        )

    def lose(self) -> None:
        """Kill a node and everything on it."""
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)

    def gain(self) -> None:
        self.nodes.append(self.add())

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


def lost_and_replaced(folder: Path, nodes: Nodes) -> dict[str, Any]:
    """Train two workers on two nodes; one dies; after the run reports that there is no room, another joins."""
    config = config_of(folder, "node-lost")
    run = RunFolder.of(config).path

    def no_room() -> bool:
        return any("no room" in line for line in failures(run))

    with Saboteur(run, (in_stage(run, "backbone"), nodes.lose), (no_room, nodes.gain)) as saboteur:
        train_run(config)
    return {"losses": saboteur.losses()[:1], "failures": failures(run)}


def elastic(folder: Path, nodes: Nodes) -> dict[str, Any]:
    """Train with two workers, with one after a node dies, and with two again when it is replaced."""
    stages = {"backbone": {"epochs": ELASTIC_EPOCHS, "lr": 0.02}, "predictor": None, "joint": None}
    config = config_of(
        folder,
        "elastic",
        stages=stages,
        cluster={"min_workers": 1},
        training={"evaluate_epochs": 100, "checkpoint_epochs": 5, "checkpoint_steps": None},
    )
    run = RunFolder.of(config).path

    def with_workers(count: int) -> Condition:
        """Return a condition: the run last started or resumed with this many workers."""
        return lambda: bool(found := starts(run)) and f"with {count} worker" in found[-1]["message"]

    def epochs_after(condition: Condition, more: int) -> Condition:
        """Return a condition: `more` epochs were trained since `condition` held."""
        held: list[int] = []

        def holds() -> bool:
            if not condition():
                return False
            held.append(len(events(run)))
            return len(events(run)) > held[0] + more

        return holds

    acts: list[tuple[Condition, Callable[[], None]]] = [
        (in_stage(run, "backbone"), nodes.lose),
        (epochs_after(with_workers(1), 3), nodes.gain),
        (with_workers(2), lambda: None),
    ]
    looking_often = patch.object(ray.train, "ScalingConfig", partial(ray.train.ScalingConfig, **LOOKS))
    with looking_often, Saboteur(run, *acts) as saboteur:
        train_run(config)
    counts = [int(event["message"].split(" with ")[1].split()[0]) for event in starts(run)]
    return {
        "losses": saboteur.losses(),
        "failures": failures(run),
        "workers": counts,
        "epochs": sorted({event["epoch"] + 1 for event in events(run) if "values" in event}),
        "last_epoch": ELASTIC_EPOCHS,
    }


def served(registry: str, folder: Path, nodes: Nodes) -> dict[str, Any]:
    """Serve with a replica on each of two nodes; one dies under load, and another joins."""
    serving = ServingConfig(port=free_port(), split="together", min_replicas=2, cpus_per_replica=1)

    def num_replicas() -> int:
        (application,) = serve.status().applications.values()
        return sum(found.replica_states.get("RUNNING", 0) for found in application.deployments.values())

    serve_model("models:/drnet@champion", serving, TOKEN, registry=registry, show=lambda _: None)
    counts = [num_replicas()]
    with load(serving.port) as during:
        wait_until(lambda: len(during.answers) > 16, "clients are served")
        nodes.lose()
        since, started = len(during.answers), time.monotonic()
        wait_until(lambda: during.statuses(since) >= {200}, "the other replica answers")
        answered = time.monotonic() - started
        wait_until(lambda: num_replicas() == 1, "the loss is noticed")
        counts.append(num_replicas())
        nodes.gain()
        wait_until(lambda: num_replicas() == 2, "a new replica runs on the new node")
        counts.append(num_replicas())
    serve.shutdown()
    statuses = [status for status, _, _ in during.answers]
    return {"replicas": counts, "statuses": statuses, "repeated": during.repeated, "answered": answered}


def main(folder: Path, registry: str) -> None:
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"
    nodes, results = Nodes(2), {}
    cases = {"lost_and_replaced": lost_and_replaced, "elastic": elastic, "served": partial(served, registry)}
    try:
        for name, case in cases.items():
            started = time.monotonic()
            results[name] = case(folder, nodes) | {"seconds": time.monotonic() - started}
            print(name, json.dumps(results[name]), flush=True)
    finally:
        nodes.close()
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
