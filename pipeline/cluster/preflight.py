"""Everything that can be known to be wrong before resources are asked for, reported together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import ray

from datasets.beton import Manifest, verify_betons
from pipeline.config import Config
from pipeline.config_file import ConfigError
from pipeline.describe import alpha_problems
from pipeline.models.cost import Costs, measure_costs
from pipeline.models.drnet import build_drnet
from pipeline.training.checkpoint import load_model


def check_config(config: Config) -> tuple[Manifest, Costs]:
    """The data's manifest and the model's costs.

    Raises:
        ConfigError: with every problem of data, model, targets, files and this machine together.
    """
    problems: list[str] = []
    manifest: Manifest | None = None
    costs: Costs | None = None
    try:
        manifest = verify_betons(config.data.folder)
    except ValueError as error:
        problems.append(f"data.folder: {error}")
    try:
        num_classes = len(manifest.classes) if manifest else 2
        costs = measure_costs(build_drnet(config.model, num_classes, (0.5,) * 3, (0.25,) * 3))
        problems.extend(alpha_problems(config, costs))
    except ValueError as error:
        problems.append(f"model: {error}")
    problems.extend(_start_problems(config, manifest))
    if not os.environ.get("RAY_ADDRESS") and not ray.is_initialized():
        problems.extend(_capacity_problems(config, os.cpu_count() or 1))
    if problems or manifest is None or costs is None:
        raise ConfigError(problems, f"the run {config.name}")
    return manifest, costs


def _start_problems(config: Config, manifest: Manifest | None) -> Iterator[str]:
    """What keeps a stage from starting with another run's model."""
    ours = config.model.model_dump(exclude={"weights"})
    for name, stage in config.stages.present():
        if stage.init_from is None:
            continue
        try:
            found = load_model(stage.init_from)
        except ValueError as error:
            yield f"stages.{name}.init_from: {error}"
            continue
        theirs = found.config.model_dump(exclude={"weights"})
        for key in (key for key, value in ours.items() if theirs[key] != value):
            yield f"stages.{name}.init_from {stage.init_from} has model.{key} {theirs[key]}, this run {ours[key]}"
        if manifest and list(found.classes) != list(manifest.classes):
            yield f"stages.{name}.init_from {stage.init_from} knows other classes than the data in {config.data.folder}"


def check_cluster(config: Config) -> None:
    """Raise ConfigError where the connected cluster cannot hold the workers."""
    resources = ray.cluster_resources()
    problems = _capacity_problems(config, int(resources.get("CPU", 0)))
    gpus = int(resources.get("GPU", 0))
    if config.cluster.use_gpu is True and gpus < config.cluster.num_workers:
        problems.append(
            f"cluster.num_workers {config.cluster.num_workers} with one GPU each, but the cluster has {gpus}; "
            "lower it, or set cluster.use_gpu=false"
        )
    if problems:
        raise ConfigError(problems, "the cluster")


def worker_resources(config: Config) -> dict[str, Any]:
    """The part of Ray's ScalingConfig that says what each worker gets, on the connected cluster."""
    resources, workers = ray.cluster_resources(), config.cluster.num_workers
    use_gpu = resources.get("GPU", 0) >= workers if config.cluster.use_gpu == "auto" else config.cluster.use_gpu
    cpus = config.cluster.cpus_per_worker or max(1, int(resources.get("CPU", 1)) // workers)
    return {"use_gpu": use_gpu, "resources_per_worker": {"CPU": cpus, **({"GPU": 1} if use_gpu else {})}}


def _capacity_problems(config: Config, cpus: int) -> list[str]:
    workers, each = config.cluster.num_workers, config.cluster.cpus_per_worker or 1
    if workers * each <= cpus:
        return []
    return [
        f"cluster.num_workers {workers} with {each} CPU{'s' if each > 1 else ''} each need {workers * each} CPUs, "
        f"but there are {cpus}; lower cluster.num_workers or cluster.cpus_per_worker"
    ]
