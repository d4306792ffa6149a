"""Everything about a search that can be known to be wrong before its first trial, reported together."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import ray

from datasets.beton import TRAIN, VALIDATION, Manifest
from pipeline.cluster.preflight import check_config
from pipeline.config import Config, SearchConfig
from pipeline.config_file import ConfigError
from pipeline.search.source import (
    REGISTERED,
    TrainedBackbone,
    backbone_path,
    backbone_problems,
    load_backbone,
    model_with_backbone,
)
from pipeline.search.space import Range, Space, space_of, space_problems
from pipeline.search.trial import num_views, trial_stage
from pipeline.tracking.backbones import registered_backbone
from pipeline.training.logit_table import LogitTable, TableKey

GPU_SHARE = 0.25


@dataclass(frozen=True)
class Checked:
    """What the checks have found out."""

    manifest: Manifest
    backbone: TrainedBackbone
    space: Space
    backbone_gflops: tuple[float, ...]


def check_search(config: Config) -> Checked:
    """Raises ConfigError with every problem of the configuration, the backbone, the data and the space together."""
    problems = list(_stage_problems(config))
    backbone, space, manifest, costs = None, None, None, None
    try:
        backbone = _backbone(config)
    except (ValueError, OSError) as error:
        problems.append(str(error))
    try:
        manifest, costs = check_config(config)
    except ConfigError as error:
        problems.extend(error.problems)
    if manifest and costs and config.stages.predictor:
        space = space_of(config, costs.backbone_gflops)
        problems.extend(space_problems(config, space, costs.backbone_gflops))
        problems.extend(_alpha_problems(space, costs.backbone_gflops))
    if manifest and backbone:
        misfits = list(backbone_problems(backbone, config, manifest))
        problems.extend(misfits or _table_problems(config, backbone, manifest))
    if ray.is_initialized():
        problems.extend(_fit_problems(config, ray.cluster_resources()))
    elif not os.environ.get("RAY_ADDRESS"):
        # GPUs are counted when Ray has started (`check_trials_fit`).
        problems.extend(_fit_problems(config, {"CPU": os.cpu_count() or 1, "GPU": math.inf}))
    if problems or not (manifest and costs and backbone and space):
        raise ConfigError(problems, f"the search {config.name}")
    return Checked(manifest, backbone, space, costs.backbone_gflops)


def check_trials_fit(config: Config) -> None:
    """Raise ConfigError where the connected cluster cannot hold the trials."""
    if problems := list(_fit_problems(config, ray.cluster_resources())):
        raise ConfigError(problems, "the cluster")


def trial_resources(search: SearchConfig) -> dict[str, float]:
    """What a trial takes of the connected cluster."""
    gpus = ray.cluster_resources().get("GPU", 0)
    share = (GPU_SHARE if gpus else 0.0) if search.gpus_per_trial == "auto" else search.gpus_per_trial
    return {"CPU": search.cpus_per_trial, **({"GPU": share} if share else {})}


def trials_at_once(search: SearchConfig, resources: dict[str, float], needed: dict[str, float]) -> int:
    """How many trials run together."""
    room = min(int(resources.get(kind, 0) / amount) for kind, amount in needed.items())
    return min(room, search.max_concurrent or room)


def _backbone(config: Config) -> TrainedBackbone:
    named = config.search.backbone
    if named is not None and named.startswith(REGISTERED):
        return registered_backbone(named)
    return load_backbone(backbone_path(config))


def _stage_problems(config: Config) -> Iterator[str]:
    if config.stages.predictor is None:
        yield "stages.predictor is missing: it says how the candidates are trained"
    elif (stage := trial_stage(config)).warmup_epochs >= stage.epochs:
        yield f"search.epochs {stage.epochs} must be more than stages.predictor.warmup_epochs {stage.warmup_epochs:g}"
    if config.stages.joint is None and config.search.finetuned:
        yield "stages.joint is missing: it says how the best are finetuned; give it, or set search.finetuned=0"
    if len(config.model.resolutions) == 1:
        yield "model.resolutions has one size, so there is nothing to predict"


def _alpha_problems(space: Space, backbone_gflops: tuple[float, ...]) -> Iterator[str]:
    alpha, low, high = space.parameters.get("alpha_gflops"), min(backbone_gflops), max(backbone_gflops)
    if isinstance(alpha, Range) and not low <= alpha.low <= alpha.high <= high:
        yield (
            f"search.space.alpha_gflops is {alpha}, but the backbone costs {low:.4g} to {high:.4g} GFLOPs; a target "
            "outside cannot be reached, or saves nothing"
        )


def _table_problems(config: Config, backbone: TrainedBackbone, manifest: Manifest) -> Iterator[str]:
    """Why the weights or the tables that were named do not belong to the rest."""
    try:
        model = model_with_backbone(backbone, config, len(manifest.classes))
        if config.search.tables is not None and config.stages.predictor is not None:
            for split, views in ((TRAIN, num_views(config)), (VALIDATION, 1)):
                LogitTable(config.search.tables, TableKey.of(model, config, manifest, split), range(views))
    except ValueError as error:
        yield str(error)


def _fit_problems(config: Config, resources: dict[str, float]) -> Iterator[str]:
    search = config.search
    cpus, at_once = int(resources.get("CPU", 0)), search.max_concurrent or 1
    if at_once * search.cpus_per_trial > cpus:
        yield (
            f"{at_once} trial{'s' if at_once > 1 else ''} at once with search.cpus_per_trial {search.cpus_per_trial} "
            f"need {at_once * search.cpus_per_trial} CPUs, but there are {cpus}; lower search.max_concurrent or "
            "cpus_per_trial"
        )
    gpus, share = resources.get("GPU", 0), search.gpus_per_trial
    if isinstance(share, float) and share and at_once * share > gpus:
        yield (
            f"{at_once} trials at once with search.gpus_per_trial {share:g} need {at_once * share:g} GPUs, but there "
            f"are {gpus:g}; lower search.max_concurrent or gpus_per_trial"
        )
