"""Check a search and estimate its time before the first trial; `jobs.tune --dry-run` prints the result."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import ray
import torch

from datasets.beton import TRAIN, VALIDATION, Manifest
from pipeline.cluster.connection import ray_cluster
from pipeline.cluster.preflight import Capacity, check_config, cluster_capacity, room
from pipeline.config.load import ConfigError
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import Config, SearchConfig
from pipeline.models.cost import measure_costs, seconds_per_call
from pipeline.models.drnet import build_drnet, place_model
from pipeline.search.source import TrainedBackbone, backbone_problems, find_backbone, model_with_backbone
from pipeline.search.space import (
    ARCHITECTURE_KEYS,
    Candidate,
    Range,
    Space,
    paper_candidates,
    predictor_gflops,
    space_of,
    space_problems,
)
from pipeline.search.trial import num_crops, table_crops, trial_config, trial_stage
from pipeline.training.logit_table import LogitTable, TableKey
from pipeline.training.objectives import Forward, StepBatch, build_objective, gumbel_noise
from pipeline.training.optim import build_optimizer
from pipeline.training.run import precision_of_run, with_precision

GPU_SHARE = 0.25
STARTUP_SECONDS = 60.0
"""The start-up time of a Ray worker group in seconds, measured on two CPU cores."""
BACKWARD = 3.0
"""The cost of a forward and a backward pass together, in forward passes."""
ROUNDS = 5
"""The number of timings of which the estimate takes the median."""
BACKBONE_IMAGES = 16


@dataclass(frozen=True)
class Checked:
    """The checked inputs of a search."""

    manifest: Manifest
    backbone: TrainedBackbone
    space: Space
    backbone_gflops: tuple[float, ...]


def with_run_precision(config: Config) -> Config:
    """Return the configuration with the precision that its run has chosen, or else that suits this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return with_precision(config, precision_of_run(config, device, RunFolder.of(config).precision, keep=False))


def check_search(config: Config) -> Checked:
    """Check the configuration, the backbone, the data and the space. Raise one ConfigError that lists every problem."""
    problems = list(_stage_problems(config))
    backbone, space, manifest, costs = None, None, None, None
    try:
        backbone = find_backbone(config)
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
        mismatches = list(backbone_problems(backbone, config, manifest))
        problems.extend(mismatches or _table_problems(config, backbone, manifest))
    if ray.is_initialized() or not os.environ.get("RAY_ADDRESS"):
        problems.extend(_fit_problems(config.search, *_room(config.search)))
    if problems or not (manifest and costs and backbone and space):
        raise ConfigError(problems, f"the search {config.name}")
    return Checked(manifest, backbone, space, costs.backbone_gflops)


def _stage_problems(config: Config) -> Iterator[str]:
    if config.cost != "flops":
        yield (
            f"cost is {config.cost}, but a search compares candidates by GFLOPs; set cost=flops, and give alpha_gflops "
            "in the stages"
        )
    if config.stages.predictor is None:
        yield "stages.predictor is missing; add it to say how candidates are trained"
    elif (stage := trial_stage(config)).warmup_epochs >= stage.epochs:
        yield f"search.epochs {stage.epochs} must be more than stages.predictor.warmup_epochs {stage.warmup_epochs:g}"
    elif stage.target is None:
        yield "stages.predictor.alpha_gflops is missing; set it to the cost at which candidates are compared"
    if config.stages.predictor and config.search.objective == "budget":
        epochs, grace = trial_stage(config).epochs, config.search.grace_epochs
        if grace > epochs:
            yield f"search.grace_epochs {grace} must be at most {epochs}, the epochs of a trial (search.epochs)"
    if config.stages.joint is None and config.search.finetuned:
        yield "stages.joint is missing; add it to say how the best are finetuned, or set search.finetuned=0"
    if len(config.model.resolutions) == 1:
        yield "model.resolutions has only one size, so there is nothing to predict; give at least two"


def _alpha_problems(space: Space, backbone_gflops: tuple[float, ...]) -> Iterator[str]:
    alpha, low, high = space.parameters.get("alpha_gflops"), min(backbone_gflops), max(backbone_gflops)
    if isinstance(alpha, Range) and not low <= alpha.low <= alpha.high <= high:
        yield (
            f"search.space.alpha_gflops is {alpha}, but the backbone costs {low:.4g} to {high:.4g} GFLOPs; give "
            "a range within these"
        )


def _table_problems(config: Config, backbone: TrainedBackbone, manifest: Manifest) -> Iterator[str]:
    """Yield why the given weights or tables do not match the rest of the configuration."""
    try:
        model = model_with_backbone(backbone, config, len(manifest.classes))
        if config.search.tables is not None and config.stages.predictor is not None:
            for split, crop_epochs in table_crops(config).items():
                LogitTable(config.search.tables, TableKey.of(model, config, manifest, split), crop_epochs)
    except ValueError as error:
        yield str(error)


def check_trials_fit(config: Config) -> None:
    """Raise ConfigError if the connected cluster is too small for the trials."""
    if problems := list(_fit_problems(config.search, *_room(config.search))):
        raise ConfigError(problems, "the cluster")


def _room(search: SearchConfig) -> tuple[list[Capacity], dict[str, float]]:
    """Return the nodes that trials may use, and the resources of one trial.

    Before Ray has started, these are this machine without its GPUs, and the CPUs of a trial. `check_trials_fit` counts
    the GPUs after Ray has started.
    """
    if ray.is_initialized():
        nodes = cluster_capacity()
        return nodes, trial_resources(search, nodes)
    return [Capacity(os.cpu_count() or 1, 0)], {"CPU": search.cpus_per_trial}


def _fit_problems(search: SearchConfig, nodes: Sequence[Capacity], needed: Mapping[str, float]) -> Iterator[str]:
    at_once, fitting = search.max_concurrent or 1, trials_fitting(nodes, needed)
    if at_once > fitting:
        each = ", ".join(f"{amount:g} {kind}s" for kind, amount in needed.items())
        several, with_gpu = at_once > 1, "GPU" in needed
        asked = (
            f"search.max_concurrent asks for {at_once} trials at once with {each} each"
            if several
            else f"a trial needs {each}"
        )
        yield (
            f"{asked}, but there is room for {fitting} ({room(nodes, with_gpu)}), because a trial must fit on one "
            f"node; lower {'search.max_concurrent or ' if several else ''}search.cpus_per_trial"
            f"{' or search.gpus_per_trial' if with_gpu else ''}, or add nodes"
        )


def trial_resources(search: SearchConfig, nodes: Iterable[Capacity]) -> dict[str, float]:
    """Return the resources that one trial uses on a cluster of these nodes."""
    has_gpu = any(node.gpus for node in nodes)
    share = (GPU_SHARE if has_gpu else 0.0) if search.gpus_per_trial == "auto" else search.gpus_per_trial
    return {"CPU": search.cpus_per_trial, **({"GPU": share} if share else {})}


def trials_fitting(nodes: Iterable[Capacity], needed: Mapping[str, float]) -> int:
    """Return how many trials fit at the same time. Each must fit on one node, and its share of a GPU on one GPU."""
    share = needed.get("GPU", 0.0)
    if not share:
        return sum(int(node.cpus // needed["CPU"]) for node in nodes)
    return sum(int(min(node.cpus // needed["CPU"], node.gpus * int(1 / share))) for node in nodes)


def trials_at_once(search: SearchConfig, nodes: Iterable[Capacity], needed: Mapping[str, float]) -> int:
    """Return how many trials run at the same time."""
    fitting = trials_fitting(nodes, needed)
    return min(fitting, search.max_concurrent or fitting)


def describe_search(config: Config) -> str:
    """Describe the space, the number of trials, the cost of a trial, and the total time. Nothing is trained or written.

    Raises:
        ConfigError: as in `search_run`.
    """
    config = with_run_precision(config)
    checked = check_search(config)
    trial = config, checked.space.base, len(checked.manifest.classes), config.search.cpus_per_trial
    with ray_cluster() if os.environ.get("RAY_ADDRESS") else nullcontext():
        if ray.is_initialized():
            check_trials_fit(config)
        nodes, needed = _room(config.search)
        if ray.is_initialized():
            measure = ray.remote(measure_speed).options(num_cpus=needed["CPU"], num_gpus=needed.get("GPU", 0))
            speed = ray.get(measure.remote(*trial))
        else:
            speed = measure_speed(*trial)
        at_once = trials_at_once(config.search, nodes, needed)
    return "\n".join(_lines(config, checked, speed, search_work(config, checked.manifest), at_once))


def _lines(config: Config, checked: Checked, speed: Speed, work: SearchWork, at_once: int) -> Iterator[str]:
    search, space = config.search, checked.space
    yield f"backbone: {checked.backbone.origin}, {config.model.backbone} at {list(config.model.resolutions)} px"
    if space.parameters:
        yield f"preset {search.preset}, objective {search.objective}; the paper's four, and:"
    else:
        yield f"preset {search.preset}: the paper's four"
    for key, parameter in space.parameters.items():
        yield f"  {key}: {parameter}"
    if any(key in ARCHITECTURE_KEYS for key in space.parameters):
        yield f"  predictors of {space.cheapest_gflops():.3g} to {space.max_gflops:.3g} GFLOPs"
    first = len(paper_candidates(config)) + (search.num_trials if space.parameters else 0)
    repeated = (len(paper_candidates(config)) + (search.finalists if space.parameters else 0)) * (search.seeds - 1)
    yield f"trials: {first} with one seed, and {repeated} more for the finalists' other seeds: {first + repeated}"
    seconds = (work.trial_images + work.evaluated_images / BACKWARD) * speed.predictor_step
    cost = predictor_gflops(space.base)
    yield (
        f"one trial: {work.trial_images:,} images through the predictor, about {seconds:,.0f} s for one of {cost:.3g} "
        "GFLOPs (measured here; the time grows with the cost)"
    )
    table = work.table_images * speed.backbone_forward / at_once
    yield f"logit tables, once for all trials: {work.table_images:,} images through the backbone, about {table:,.0f} s"
    joint_step = BACKWARD * speed.backbone_forward + speed.predictor_step
    joint = search.finetuned * work.joint_images * joint_step / at_once
    if search.finetuned:
        yield f"finetuning of {search.finetuned} candidates: about {joint:,.0f} s"
    total = table + seconds * (first + repeated) / at_once + joint + STARTUP_SECONDS * (2 + search.finetuned)
    yield f"{at_once} trials at once on this cluster: about {total / 60:,.0f} minutes in total, including Ray's starts"


@dataclass(frozen=True)
class SearchWork:
    """The numbers of images that a search runs through its networks."""

    table_images: int
    """Images through the backbone at every resolution, once for all trials."""
    trial_images: int
    """Images through the predictor, forward and backward, in every trial."""
    evaluated_images: int
    """Images through the predictor, forward only, in every trial."""
    joint_images: int
    """Images through predictor and backbone, forward and backward, in every finetuning."""


def search_work(config: Config, manifest: Manifest) -> SearchWork:
    """Count the images that a search runs through its networks."""
    stage, joint = trial_stage(config), config.stages.joint
    train, validation = manifest.splits[TRAIN].count, manifest.splits[VALIDATION].count
    return SearchWork(
        table_images=num_crops(config) * train + validation,
        trial_images=stage.epochs * train,
        evaluated_images=((stage.epochs if config.search.objective == "budget" else 1) + 1) * validation,
        joint_images=joint.epochs * train if joint else 0,
    )


@dataclass(frozen=True)
class Speed:
    """Seconds per image on one trial's share of a machine: a training step of the predictor, and the backbone at all
    resolutions without gradient."""

    predictor_step: float
    backbone_forward: float


def measure_speed(config: Config, candidate: Candidate, num_classes: int, num_threads: int) -> Speed:
    """Time a candidate's training step and the backbone, on blank images."""
    torch.set_num_threads(num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = trial_config(config, candidate, config.seed)
    plain = config.model.model_copy(update={"weights": None})
    model = build_drnet(plain, num_classes, (0.5,) * 3, (0.5,) * 3)
    model = place_model(model, device, channels_last=config.training.channels_last)
    stage, size, R = config.stages.predictor, config.training.batch_size, len(model.resolutions)
    assert stage is not None
    costs_R = torch.tensor(measure_costs(model).backbone_gflops, device=device)
    objective = build_objective(model, stage, costs_R, config.training.precision)
    optimizer = build_optimizer(model, stage)
    side = candidate.input_size
    batch = StepBatch(
        images={side: torch.zeros(size, side, side, 3, dtype=torch.uint8, device=device)},
        labels_N=torch.zeros(size, dtype=torch.int64, device=device),
        gumbel_NR=gumbel_noise(0, 0, torch.arange(size), R).to(device),
        global_size=size,
        logits_NRK=torch.zeros(size, R, num_classes, device=device),
    )

    def step() -> None:
        objective(batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    shapes = ((side, torch.zeros(BACKBONE_IMAGES, side, side, 3, dtype=torch.uint8)) for side in model.resolutions)
    images = {side: pixels.to(device) for side, pixels in shapes}
    forward = Forward(model, config.training.precision)
    return Speed(
        predictor_step=seconds_per_call(step, device, ROUNDS) / size,
        backbone_forward=seconds_per_call(lambda: forward.frozen_backbone(images), device, ROUNDS) / BACKBONE_IMAGES,
    )
