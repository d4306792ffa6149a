"""Estimate what a configuration costs: FLOPs, parameters, data, steps, memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TypeGuard

import torch
from torch import nn

from datasets.beton import MANIFEST, TRAIN, VALIDATION, beton_path, enlarged_shares, load_manifest
from datasets.loading.order import count_batches
from datasets.remote import redacted
from datasets.sources.catalog import SourceOptions, find_dataset, imagenet100_ids
from datasets.sources.glyphs import LETTERS
from datasets.staging import remote_manifest
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import BackboneStage, Config, DataConfig, JointStage, PredictorStage, RoutedStage, Stage
from pipeline.models.cost import Costs, frozen_gflops, measure_costs
from pipeline.models.drnet import DRNet, build_drnet, normalization, validation_crop
from pipeline.models.dry_run import measure_activations, tensor_bytes
from pipeline.models.norms import resolution_norms
from pipeline.models.weights import weights_input
from pipeline.training.logit_table import logits_bytes
from pipeline.training.objectives import sandwich
from pipeline.training.run import Precision, alpha_problems, precision_of_run, with_precision

_IMAGENET100_VALIDATION_IMAGES = 5000
_ASSUMED_CLASSES = 1000


@dataclass(frozen=True)
class DataSummary:
    """Images and classes of the prepared data or, if it is not prepared, those expected from its source. None is
    unknown."""

    dataset: str
    folder: str
    prepared: bool
    note: str
    num_classes: int | None
    num_train: int | None
    num_validation: int | None
    size_bytes: int | None


@dataclass(frozen=True)
class NetworkSummary:
    """One network at one input size. GFLOPs are 1e9 multiply-adds per image.

    `enlarged` is the share of the validation images that have fewer pixels than the input. It is None if the data is
    not on this machine.
    """

    name: str
    side: int
    gflops: float
    parameters: int
    enlarged: float | None = None


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a worker needs at the peak of a training step, without the memory and work space of libraries.

    `weights` includes the moving average of the weights, if the stage has one.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    images: int

    @property
    def total(self) -> int:
        """The sum in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.images


@dataclass(frozen=True)
class StageSummary:
    """One stage. Numbers of steps are None if the data is unknown.

    A routed stage has a target for the backbone's mean cost. `alpha_gflops` must lie within `reachable_gflops`, the
    costs of the cheapest and the most expensive resolution. The range for `alpha_milliseconds` is measured when
    training starts. All three are None in other stages.
    """

    name: str
    epochs: int
    steps_per_epoch: int | None
    total_steps: int | None
    alpha_gflops: float | None
    alpha_milliseconds: float | None
    reachable_gflops: tuple[float, float] | None
    memory: StepMemory
    training_gflops: float | None
    """GFLOPs of the whole stage. A backward pass counts as two forward passes. A joint stage runs every image forward
    at every resolution (twice with `norm_statistics: all`), and backward at the chosen resolutions, which cost alpha.
    None if the data, or alpha in GFLOPs, is unknown."""
    table_bytes: int | None
    """The size of the logit tables that the stage keeps on disk, in bytes; None if it keeps none."""


@dataclass(frozen=True)
class Description:
    """Everything that `jobs.describe` prints.

    `lowest_gflops` and `highest_gflops` are the costs per image, including the predictor, if every image runs at the
    cheapest or the most expensive resolution. `parameters` counts all private batch norms.
    """

    run: str
    data: DataSummary
    networks: list[NetworkSummary]
    parameters: int
    lowest_gflops: float
    highest_gflops: float
    images_per_worker: int
    input: str
    """The source of the input normalization, and the center crop in validation."""
    precision: str
    """The precision that training.precision means on this machine, and the reason."""
    stages: list[StageSummary]
    problems: list[str]


def describe(config: Config) -> Description:
    """Describe a run. This builds the model with random weights and reads no images.

    Raises:
        ValueError: the model cannot be built, or the prepared data is damaged.
    """
    data, precision = summarize_data(config.data), _precision(config)
    config = with_precision(config, precision)
    weights_problems = list(_weights_problems(config))
    if weights_problems:  # describe everything else as without weights
        without = config.model.model_copy(update={"weights": None, "normalization": "auto"})
        config = config.model_copy(update={"model": without})
    plain = config.model.model_copy(update={"weights": None})
    model = build_drnet(plain, data.num_classes or _ASSUMED_CLASSES, (0.5,) * 3, (0.5,) * 3)
    costs = measure_costs(model)
    routed = len(model.resolutions) > 1
    return Description(
        run=config.name,
        data=data,
        networks=list(_networks(config, model, costs)),
        parameters=_count(model),
        lowest_gflops=costs.min_backbone_gflops + (costs.predictor_gflops if routed else 0),
        highest_gflops=costs.max_backbone_gflops + (costs.predictor_gflops if routed else 0),
        images_per_worker=config.training.batch_size // config.cluster.num_workers,
        input=_input(config),
        precision=str(precision),
        stages=list(_stages(config, model, data, costs)),
        problems=[*weights_problems, *alpha_problems(config, costs)],
    )


def _precision(config: Config) -> Precision:
    """Return the run's stored precision, or the one that a worker on this machine would choose."""
    use_gpu = torch.cuda.is_available() and config.cluster.use_gpu is not False
    device = torch.device("cuda" if use_gpu else "cpu")
    return precision_of_run(config, device, RunFolder.of(config).precision, keep=False)


def _input(config: Config) -> str:
    found, crop = normalization(config.model), f"center crop {validation_crop(config):.3g} of the shorter side"
    if found is None:
        return f"normalized with mean and standard deviation of the training images, {crop}"
    mean, std = ("[" + ", ".join(f"{value:.3g}" for value in values) + "]" for values in found)
    source = "configuration" if isinstance(config.model.normalization, tuple) else f"weights {config.model.weights}"
    return f"normalized with mean {mean} and standard deviation {std} of the {source}, {crop}"


def _weights_problems(config: Config) -> Iterator[str]:
    """Yield the reason if the weights do not exist, as far as this is known without a download."""
    try:
        weights_input(config.model.backbone, config.model.weights)
    except ValueError as error:
        yield f"model.weights: {error}"


def summarize_data(data: DataConfig) -> DataSummary:
    """Summarize the prepared folder or, if it is not prepared, what its source would give.

    Raises:
        BetonError: the folder's preparation was interrupted, or its manifest is damaged.
        ValueError, OSError: data.uri cannot be read.
    """
    if data.uri or (data.folder / MANIFEST).exists():
        manifest = remote_manifest(data.uri) if data.uri else load_manifest(data.folder)
        place = redacted(data.uri) if data.uri else str(data.folder)
        train, validation = manifest.splits[TRAIN], manifest.splits[VALIDATION]
        size = train.size_bytes + validation.size_bytes
        counts = (len(manifest.classes), train.count, validation.count, size)
        return DataSummary(manifest.dataset, place, True, f"digest {manifest.digest}", *counts)
    note = "not prepared: run `python -m jobs.prepare` with this configuration"
    try:
        counts = _counts_of_glyphs(data) if data.dataset == "glyphs" else _counts_of_source(data)
    except (ValueError, OSError) as error:
        counts = _known_counts(data)
        note = f"{note}; {str(error).splitlines()[0].partition(';')[0]}"
        if counts[0] is None:
            note = f"{note}; the figures below assume {_ASSUMED_CLASSES:,} classes"
    return DataSummary(data.dataset, str(data.folder), False, note, *counts, None)


def _counts_of_glyphs(data: DataConfig) -> tuple[int, int, int]:
    """Count the classes, training images and validation images to generate. The images cycle through the classes."""
    num_classes, num_train = len(LETTERS), data.glyphs.num_train
    if data.images_per_class is not None:
        per_class = [len(range(label, num_train, num_classes)) for label in range(num_classes)]
        num_train = sum(min(count, data.images_per_class) for count in per_class)
    return num_classes, num_train, data.glyphs.num_validation


def _counts_of_source(data: DataConfig) -> tuple[int, int, int]:
    """Count the classes, training images and validation images of the source, including unusable images."""
    names = {option.name for option in fields(SourceOptions)} - {"download", "glyphs"}
    index = find_dataset(data.dataset).scan(SourceOptions(**data.model_dump(include=names))).read_index()
    return len(index.classes), len(index.splits[TRAIN]), len(index.splits[VALIDATION])


def _known_counts(data: DataConfig) -> tuple[int | None, int | None, int | None]:
    """Return the numbers of classes, training and validation images that are known without reading the source."""
    if data.dataset != "imagenet100":
        return None, None, None
    num_classes = len(imagenet100_ids())
    num_train = num_classes * data.images_per_class if data.images_per_class else None
    return num_classes, num_train, _IMAGENET100_VALIDATION_IMAGES


def _networks(config: Config, model: DRNet, costs: Costs) -> Iterator[NetworkSummary]:
    """Yield the backbone at each resolution, with the number of parameters used there, then the predictor."""
    norms = resolution_norms(model.backbone)
    used = _count(model.backbone) - sum(_count(layer.norms[1:]) for layer in norms)
    validation, enlarged = beton_path(config.data.folder, VALIDATION), [None] * len(model.resolutions)
    if validation.exists():
        enlarged = enlarged_shares(validation, model.resolutions, validation_crop(config))
    for side, gflops, share in zip(model.resolutions, costs.backbone_gflops, enlarged, strict=True):
        yield NetworkSummary(config.model.backbone, side, gflops, used, share)
    name = f"predictor {config.model.predictor.architecture}"
    yield NetworkSummary(name, model.predictor_size, costs.predictor_gflops, _count(model.predictor))


def _stages(config: Config, model: DRNet, data: DataSummary, costs: Costs) -> Iterator[StageSummary]:
    steps = count_batches(data.num_train, config.training.batch_size) if data.num_train else None
    for name, stage in config.stages.present():
        routed = isinstance(stage, RoutedStage)
        yield StageSummary(
            name=name,
            epochs=stage.epochs,
            steps_per_epoch=steps,
            total_steps=steps * stage.epochs if steps else None,
            alpha_gflops=stage.alpha_gflops if routed else None,
            alpha_milliseconds=stage.alpha_milliseconds if routed else None,
            reachable_gflops=(costs.min_backbone_gflops, costs.max_backbone_gflops) if routed else None,
            memory=_step_memory(config, model, stage),
            training_gflops=_training_gflops(stage, config.training.backward, costs, data, model),
            table_bytes=_table_bytes(stage, model, data),
        )


def _training_gflops(stage: Stage, backward: str, costs: Costs, data: DataSummary, model: DRNet) -> float | None:
    """Return the GFLOPs that a stage spends on training images, in its steps and for its logit tables."""
    if data.num_train is None:
        return None
    every, predictor = sum(costs.backbone_gflops), costs.predictor_gflops
    if isinstance(stage, PredictorStage):
        crops = (stage.num_crops or stage.epochs) if _trains_on_table(stage) else stage.epochs
        return data.num_train * (3 * stage.epochs * predictor + crops * every)
    if isinstance(stage, JointStage):
        if stage.alpha_gflops is None:
            return None
        forward = every * (2 if stage.norm_statistics == "all" else 1)
        return data.num_train * stage.epochs * (3 * predictor + forward + 2 * stage.alpha_gflops)
    assert isinstance(stage, BackboneStage)
    period = range(max(1, len(costs.backbone) - 2))  # the steps after which the turns of the resolutions repeat
    used = [index for step in period for index in sandwich(len(costs.backbone), stage.resolutions_per_step, step)]
    trained, fixed = (
        sum(gflops_R[index] for index in used) / len(period)
        for gflops_R in (costs.backbone_gflops, frozen_gflops(model, stage.freeze_layers))
    )
    recomputes = stage.distillation in ("mean", "learned") and backward == "apart"
    again = sum(costs.backbone_gflops[1:]) if recomputes else 0.0  # the teacher needs all logits before any backward
    backward_epochs = stage.epochs - stage.freeze_epochs  # a frozen layer has no backward pass
    return data.num_train * (stage.epochs * (trained + again) + 2 * backward_epochs * (trained - fixed))


def _trains_on_table(stage: Stage) -> TypeGuard[PredictorStage]:
    return isinstance(stage, PredictorStage) and stage.logits == "table"


def _table_bytes(stage: Stage, model: DRNet, data: DataSummary) -> int | None:
    """Return the bytes of the stage's table: all crops of the training images, and the validation images."""
    if not _trains_on_table(stage) or not (data.num_train and data.num_validation and data.num_classes):
        return None
    num_images = (stage.num_crops or stage.epochs) * data.num_train + data.num_validation
    return logits_bytes(num_images, len(model.resolutions), data.num_classes)


def _step_memory(config: Config, model: DRNet, stage: Stage) -> StepMemory:
    """Estimate the memory peak: the backward pass of a slice.

    Every image is at the largest resolution. In a backbone stage with `training.backward: together`, every image is at
    all resolutions of a step.
    """
    training, count = config.training, len(model.resolutions)
    batch, precision = training.batch_size // config.cluster.num_workers, training.precision
    trained: list[nn.Module] = []
    activations = 0
    if not isinstance(stage, PredictorStage):
        trained.append(model.backbone)
        together = isinstance(stage, BackboneStage) and training.backward == "together"
        # The first step of the stage trains the largest resolutions.
        for index in sandwich(count, stage.resolutions_per_step, 0) if together else [0]:
            kept = measure_activations(model.backbone, model.resolutions[index], index, precision=precision)
            activations += kept.of_batch(math.ceil(batch / training.accumulate))
    if isinstance(stage, PredictorStage | JointStage):
        trained.append(model.predictor)
        activations += measure_activations(model.predictor, model.predictor_size, precision=precision).of_batch(batch)
    gradients = sum(tensor_bytes(module.parameters()) for module in trained)
    sides = (model.predictor_size,) if _trains_on_table(stage) else model.sides
    states = 2 if stage.optimizer == "adamw" else int(stage.momentum > 0)
    weights = tensor_bytes(model.parameters()) + tensor_bytes(model.buffers())
    return StepMemory(
        weights=weights if stage.ema_decay is None else 2 * weights,
        gradients=gradients,
        optimizer=states * gradients,
        activations=activations,
        images=sum(batch * 3 * side * side for side in sides),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
