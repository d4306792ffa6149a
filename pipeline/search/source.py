"""Load the trained backbone that a search starts from: that of a run, a checkpoint or a registered model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from datasets.beton import Manifest
from pipeline.config.fields import REGISTERED
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import Config, ModelConfig
from pipeline.models.drnet import DRNet, build_drnet, crop_problems
from pipeline.tracking.registry import download_trained
from pipeline.tracking.store import tracking_uri
from pipeline.training.checkpoint import STATE_FILE, TrainingState, load_model

_PREFIX = "backbone."


@dataclass(frozen=True)
class TrainedBackbone:
    """The weights of a backbone, and what is known about them. None means unknown.

    Attributes:
        origin: where the weights come from, for messages.
        state: state dict of the ResolutionBackbone.
        mean, std: pixel statistics of the images that it was trained on, on the scale 0..1.
        architecture: `backbone` and `backbone_width` of its ModelConfig.
        data_digest: digest of the prepared data that it was trained on.
        validation_crop: center crop that it was evaluated with, as a fraction of the shorter side.
    """

    origin: str
    state: Mapping[str, Tensor]
    resolutions: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None = None
    architecture: tuple[str, float] | None = None
    data_digest: str | None = None
    validation_crop: float | None = None


def find_backbone(config: Config) -> TrainedBackbone:
    """Load the backbone that search.backbone names, by default that of the trained run.

    Raises:
        ValueError: there is no such model, or it is not readable.
        TrackingError: as `registered_backbone`.
    """
    named = config.search.backbone
    if named is not None and named.startswith(REGISTERED):
        return registered_backbone(named, tracking_uri(config))
    return load_backbone(backbone_path(config))


def backbone_path(config: Config) -> Path:
    """Return the file that search.backbone names: a model.pt or the state of a checkpoint.

    Raises:
        ValueError: there is no such file.
    """
    named = config.search.backbone
    path = RunFolder.of(config).path if named is None else Path(named)
    found = [file for file in (path, *_candidates(path)) if file.is_file()]
    if not found:
        hint = (
            "train it first (python -m jobs.train with this configuration), or give search.backbone"
            if named is None
            else f"give the folder of a finished run, a model.pt, a checkpoint's folder, or {REGISTERED}NAME@ALIAS"
        )
        place = RunFolder(path).model if named is None else path
        raise ValueError(f"search.backbone: there is no trained model at {place}; {hint}")
    return found[0]


def _candidates(folder: Path) -> tuple[Path, ...]:
    """Return the files in a folder that may contain a backbone.

    The backbone stage's model comes first, because the joint stage adapts the backbone to its predictor.
    """
    return RunFolder(folder).backbone, RunFolder(folder).model, folder / STATE_FILE


def load_backbone(path: Path) -> TrainedBackbone:
    """Read the backbone of a model.pt or of a checkpoint's state. Raise ValueError if the file is neither."""
    try:
        loaded = load_model(path)
    except ValueError as no_model:
        try:
            state = TrainingState.load(path)
        except ValueError:
            raise no_model from None
        model = ModelConfig.model_validate(state.config["model"])
        return TrainedBackbone(
            origin=str(path),
            state=_backbone_part(state.model),
            resolutions=model.resolutions,
            mean=tuple(state.model["mean"].tolist()),
            std=tuple(state.model["std"].tolist()),
            architecture=(model.backbone, model.backbone_width),
            data_digest=state.data_digest,
        )
    return TrainedBackbone(
        origin=str(path),
        state=_backbone_part(loaded.model.state_dict()),
        resolutions=loaded.config.resolutions,
        mean=loaded.mean,
        std=loaded.std,
        classes=loaded.classes,
        architecture=(loaded.config.backbone, loaded.config.backbone_width),
        validation_crop=loaded.validation_crop,
    )


def registered_backbone(model_uri: str, registry: str | None = None) -> TrainedBackbone:
    """Load the backbone of a registered version as it was trained, from its model.pt.

    Args:
        model_uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        registry: as in `find_model`.

    Raises:
        TrackingError: there is no such version, jobs.register did not create it, or the server does not answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        return replace(load_backbone(download_trained(model_uri, Path(folder), registry)), origin=model_uri)


def backbone_problems(trained: TrainedBackbone, config: Config, manifest: Manifest) -> Iterator[str]:
    """Yield every mismatch between a backbone and the configuration and its data."""
    ours = config.model
    if trained.resolutions != ours.resolutions:
        yield (
            f"the backbone of {trained.origin} has the resolutions {list(trained.resolutions)}, but "
            f"model.resolutions is {list(ours.resolutions)}; make them the same, or train a backbone for these"
        )
    if trained.architecture is not None and trained.architecture != (ours.backbone, ours.backbone_width):
        backbone, width = trained.architecture
        yield (
            f"the backbone of {trained.origin} is {backbone} with width {width:g}, but model.backbone is "
            f"{ours.backbone} with backbone_width {ours.backbone_width:g}; make them the same"
        )
    if trained.classes is not None and list(trained.classes) != list(manifest.classes):
        yield (
            f"the backbone of {trained.origin} knows {len(trained.classes)} classes ({_some(trained.classes)}), but "
            f"the data in {config.data.folder} has {len(manifest.classes)} ({_some(manifest.classes)}); give other "
            "data, or a backbone that was trained on this data"
        )
    if trained.validation_crop is not None:
        yield from crop_problems(f"the backbone of {trained.origin}", trained.validation_crop, config, "this search")
    if trained.data_digest not in (None, manifest.digest):
        yield (
            f"the backbone of {trained.origin} was trained on other data (digest {trained.data_digest}) than the data "
            f"in {config.data.folder} (digest {manifest.digest}); give the same data, or another backbone"
        )


def model_with_backbone(trained: TrainedBackbone, config: Config, num_classes: int) -> DRNet:
    """Build a network with this backbone and an untrained predictor.

    Raises:
        ValueError: the weights belong to another network.
    """
    plain = config.model.model_copy(update={"weights": None})
    model = build_drnet(plain, num_classes, trained.mean, trained.std)
    try:
        model.backbone.load_state_dict(dict(trained.state))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"the backbone of {trained.origin} is not a {config.model.backbone}: {reason}") from None
    return model


def _backbone_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}


def _some(names: tuple[str, ...] | list[str]) -> str:
    shown = ", ".join(list(names)[:3])
    return f"{shown}, ..." if len(names) > 3 else shown
