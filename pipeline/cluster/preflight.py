"""Find every problem of a configuration before the run takes resources, and report all of them together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray

from datasets.beton import Manifest, verify_betons
from datasets.staging import remote_manifest
from pipeline.cluster.connection import ADDRESS
from pipeline.config.load import ConfigError
from pipeline.config.schema import Config, LayerRates
from pipeline.models.cost import Costs, measure_costs
from pipeline.models.drnet import build_drnet, crop_problems, normalization
from pipeline.tracking.store import sqlite_file, tracking_uri
from pipeline.training.checkpoint import load_model
from pipeline.training.run import alpha_problems


def check_config(config: Config, *, capacity: bool = True) -> tuple[Manifest, Costs]:
    """Check data, model, targets and files. Return the data's manifest and the model's costs.

    Args:
        capacity: also check whether this machine has room for the workers, unless the run uses another cluster.

    Raises:
        ConfigError: lists every problem.
    """
    problems: list[str] = []
    manifest: Manifest | None = None
    data = config.data
    try:
        # Nodes that download betons from an address check them after the download.
        manifest = remote_manifest(data.uri) if data.uri else verify_betons(data.folder)
    except (ValueError, OSError) as error:
        problems.append(f"{'data.uri' if data.uri else 'data.folder'}: {error}")
    costs = _check_model(config, len(manifest.classes) if manifest else 2, problems)
    with _added_to(problems):
        problems.extend(_start_problems(config, manifest))
    problems.extend(_store_problems(config))
    if capacity and not os.environ.get(ADDRESS) and not ray.is_initialized():
        # The GPUs of this machine are unknown until Ray starts. `require_healthy` then checks them.
        gpus = config.cluster.num_workers if config.cluster.use_gpu is True else 0
        problems.extend(capacity_problems(config, [Capacity(os.cpu_count() or 1, gpus)]))
    if problems or manifest is None or costs is None:
        raise ConfigError(list(dict.fromkeys(problems)), f"the run {config.name}")  # two checks may find the same
    return manifest, costs


def _check_model(config: Config, num_classes: int, problems: list[str]) -> Costs | None:
    """Return the model's costs, or None if it cannot be built. Add to `problems` what is wrong with it."""
    costs: Costs | None = None
    with _added_to(problems):
        normalization(config.model)
    with _added_to(problems):
        model = build_drnet(config.model, num_classes, (0.5,) * 3, (0.25,) * 3)
        costs = measure_costs(model)
        problems.extend(alpha_problems(config, costs))
        if any(isinstance(stage, LayerRates) and stage.layer_decay < 1 for _, stage in config.stages.present()):
            with _added_to(problems):
                model.backbone.layer_depths()
        if config.stages.backbone:
            with _added_to(problems):
                model.backbone.first_layers(config.stages.backbone.freeze_layers)
    return costs


@contextmanager
def _added_to(problems: list[str]) -> Iterator[None]:
    """Add a ValueError of the `with` block to the problems of the model."""
    try:
        yield
    except ValueError as error:
        problems.append(f"model: {error}")


def _start_problems(config: Config, manifest: Manifest | None) -> Iterator[str]:
    """Yield why a stage cannot start from another run's model."""
    # Initial weights do not matter for a network that starts from another run's model, and regularization may change.
    # The normalization belongs to the model.
    start: Any = {
        "weights": True,
        "normalization": True,
        "dropout": True,
        "drop_path": True,
        "predictor": {"initial_shares"},
    }
    ours = config.model.model_dump(exclude=start)
    for name, stage in config.stages.present():
        if stage.init_from is None:
            continue
        try:
            found = load_model(stage.init_from)
        except ValueError as error:
            yield f"stages.{name}.init_from: {error}"
            continue
        theirs, given = found.config.model_dump(exclude=start), f"stages.{name}.init_from {stage.init_from}"
        for key in (key for key, value in ours.items() if theirs[key] != value):
            yield f"{given} has model.{key} {theirs[key]}, but this run has {ours[key]}. Give a model with this value."
        yield from crop_problems(given, found.validation_crop, config, "this run")
        if manifest and list(found.classes) != list(manifest.classes):
            yield f"{given} has other classes than the data in {config.data.folder}. Give a model with these classes."


def _store_problems(config: Config) -> Iterator[str]:
    """Yield a problem if MLflow's address is invalid or its SQLite file read-only, because MLflow would retry for
    minutes."""
    try:
        file = sqlite_file(tracking_uri(config))
    except ValueError as error:
        yield f"tracking.uri: {error}"
        return
    if file is None:
        return
    folder = next(path for path in file.parents if path.exists())
    denied = [path for path in (file, folder) if path.exists() and not os.access(path, os.W_OK)]
    if denied:
        yield (
            f"MLflow's store {file} cannot be written: this user may not write to {denied[0]}. Set tracking.uri or "
            "MLFLOW_TRACKING_URI to sqlite:////WRITABLE/FOLDER/mlflow.db or http://HOST:PORT"
        )


def worker_resources(config: Config, nodes: Sequence[Capacity]) -> dict[str, Any]:
    """Return the arguments of Ray's ScalingConfig that describe what each worker gets on a cluster of these nodes."""
    workers, use_gpu = config.cluster.num_workers, uses_gpus(config, nodes)
    if config.cluster.min_workers:  # nodes may be missing now and return later
        workers = max(config.cluster.min_workers, min(workers, num_fitting(nodes, 1, use_gpu=use_gpu)))
    cpus = config.cluster.cpus_per_worker or cpus_for_each(nodes, workers, use_gpu=use_gpu)
    return {"use_gpu": use_gpu, "resources_per_worker": {"CPU": cpus, **({"GPU": 1} if use_gpu else {})}}


class Capacity(NamedTuple):
    """The CPUs and GPUs that a node offers to workers."""

    cpus: int
    gpus: int


def cluster_capacity() -> list[Capacity]:
    """Return the capacity of each node of the connected cluster."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Capacity(int(resources.get("CPU", 0)), int(resources.get("GPU", 0))) for resources in alive]


def uses_gpus(config: Config, nodes: Iterable[Capacity]) -> bool:
    """Return whether each worker gets a GPU. With cluster.use_gpu=auto it does if any node has one."""
    use_gpu = config.cluster.use_gpu
    return any(node.gpus for node in nodes) if use_gpu == "auto" else use_gpu


def num_fitting(nodes: Iterable[Capacity], cpus: int, *, use_gpu: bool) -> int:
    """Return how many workers with `cpus` CPUs each (and a GPU if `use_gpu`) fit. Each must fit on one node."""
    return sum(min(node.cpus // cpus, node.gpus) if use_gpu else node.cpus // cpus for node in nodes)


def cpus_for_each(nodes: Sequence[Capacity], workers: int, *, use_gpu: bool) -> int:
    """Return the largest number of CPUs, at least one, that each of `workers` can have."""
    largest = max((node.cpus for node in nodes), default=1)
    return next((cpus for cpus in range(largest, 1, -1) if num_fitting(nodes, cpus, use_gpu=use_gpu) >= workers), 1)


def capacity_problems(config: Config, nodes: Sequence[Capacity]) -> list[str]:
    """Return a problem if the cluster is too small, so that the workers would wait forever."""
    field = "min_workers" if config.cluster.min_workers else "num_workers"
    workers, cpus = getattr(config.cluster, field), config.cluster.cpus_per_worker or 1
    use_gpu = uses_gpus(config, nodes)
    fitting = num_fitting(nodes, cpus, use_gpu=use_gpu)
    if workers <= fitting:
        return []
    each = f"{number_of(cpus, 'CPU')}{' and a GPU' if use_gpu else ''} each"
    return [
        f"cluster.{field} {workers} with {each}, but there is room for {fitting} ({room(nodes, use_gpu)}); "
        f"lower cluster.{field} or cluster.cpus_per_worker{', set cluster.use_gpu=false' if use_gpu else ''}, "
        "or add nodes"
    ]


def room(nodes: Iterable[Capacity], with_gpus: bool) -> str:
    """Describe what the nodes offer, such as `4 CPUs, 1 GPU and 4 CPUs, 0 GPUs`."""
    return " and ".join(
        number_of(node.cpus, "CPU") + (f", {number_of(node.gpus, 'GPU')}" if with_gpus else "") for node in nodes
    )


def number_of(number: int, noun: str) -> str:
    """Return a number and its noun, such as `1 GPU` or `2 GPUs`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
