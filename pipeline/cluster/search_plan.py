"""What a search would do and take on the cluster that it would run on: `jobs.tune --dry-run`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

import ray

from pipeline.cluster.connection import ray_cluster
from pipeline.cluster.search_checks import Checked, check_search, check_trials_fit, trial_resources, trials_at_once
from pipeline.config import Config
from pipeline.search.estimate import Speed, Work, measure_speed, search_work
from pipeline.search.space import ARCHITECTURE_KEYS, paper_candidates, predictor_gflops

STARTUP_SECONDS = 60.0
"""of Ray's worker groups and processes, measured on two CPU cores"""
BACKWARD = 3.0
"""forward and backward in forwards"""


def describe_search(config: Config) -> str:
    """Space, number of trials, cost of one, and total time, as text. Nothing is trained or written.

    Raises:
        ConfigError: as `search_run`.
    """
    checked = check_search(config)
    with ray_cluster() if os.environ.get("RAY_ADDRESS") else nullcontext():
        if ray.is_initialized():
            check_trials_fit(config)
            needed, resources = trial_resources(config.search), dict(ray.cluster_resources())
            measure = ray.remote(measure_speed).options(num_cpus=needed["CPU"], num_gpus=needed.get("GPU", 0))
            speed = ray.get(measure.remote(config, checked.space.base, len(checked.manifest.classes), 1))
        else:
            needed = {"CPU": float(config.search.cpus_per_trial)}
            resources = {"CPU": float(os.cpu_count() or 1)}
            threads = config.search.cpus_per_trial
            speed = measure_speed(config, checked.space.base, len(checked.manifest.classes), threads)
        at_once = trials_at_once(config.search, resources, needed)
    return "\n".join(_lines(config, checked, speed, search_work(config, checked.manifest), at_once))


def _lines(config: Config, checked: Checked, speed: Speed, work: Work, at_once: int) -> Iterator[str]:
    search, space = config.search, checked.space
    yield f"backbone: {checked.backbone.origin}, {config.model.backbone} at {list(config.model.resolutions)} px"
    yield (
        f"preset {search.preset}, objective {search.objective}; the paper's four, and:"
        if space.parameters
        else (f"preset {search.preset}: the paper's four")
    )
    for key, parameter in space.parameters.items():
        yield f"  {key}: {parameter}"
    if any(key in ARCHITECTURE_KEYS for key in space.parameters):
        yield f"  predictors of {space.cheapest_gflops():.3g} to {space.max_gflops:.3g} GFLOPs"
    first = len(paper_candidates(config)) + (search.num_trials if space.parameters else 0)
    repeated = (len(paper_candidates(config)) + (search.finalists if space.parameters else 0)) * (search.seeds - 1)
    yield f"trials: {first} with one seed, and {repeated} more for the finalists' other seeds: {first + repeated}"
    seconds = work.trial_images * speed.predictor + work.evaluated_images * speed.predictor / BACKWARD
    cost = predictor_gflops(space.base)
    yield (
        f"one trial: {work.trial_images:,} images through the predictor, about {seconds:,.0f} s for one of {cost:.3g} "
        "GFLOPs (measured here; time follows the cost)"
    )
    table = work.table_images * speed.backbone / at_once
    yield f"logit tables, once for all trials: {work.table_images:,} images through the backbone, about {table:,.0f} s"
    joint = search.finetuned * work.joint_images * BACKWARD * (speed.backbone + speed.predictor) / at_once
    if search.finetuned:
        yield f"finetuning of {search.finetuned}: about {joint:,.0f} s"
    total = table + seconds * (first + repeated) / at_once + joint + STARTUP_SECONDS * (2 + search.finetuned)
    yield f"{at_once} trials at once on this cluster: about {total / 60:,.0f} minutes altogether, Ray's starts included"
