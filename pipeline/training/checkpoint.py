"""Save and load the state from which training resumes and the finished model, without pickle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from datasets.files import whole_file
from pipeline.config.load import drift, refuse_changes, stored_config
from pipeline.config.schema import Config, ModelConfig
from pipeline.models.drnet import DRNet, build_drnet, validation_crop

STATE_FILE = "state.pt"
"""The name of the file in a checkpoint's folder."""
STATE_FORMAT = 2
MODEL_FORMAT = 1


class OtherRunError(ValueError):
    """A training state belongs to other data or to another configuration."""


@dataclass(frozen=True)
class TrainingState:
    """Everything that changes during a run, with the configuration and data digest that it was computed from.

    Random draws depend on (seed, epoch, step, rank, sample) and learning rates on progress, so neither is stored.
    Between checkpoints each rank has its own running statistics of batch norm. Every checkpoint averages them over the
    ranks, even if the run never fails. So a resumed run equals an uninterrupted one, and the result of a run with
    several workers depends on checkpoint_steps.
    """

    stage: str
    data_epoch: int
    """The number of finished epochs, over all stages."""
    step: int
    """The number of finished steps in the current epoch."""
    model: Mapping[str, Any]
    """The model's state dict; at the end of a stage, that of the stage's result."""
    optimizer: Mapping[str, Any]
    objective: Mapping[str, Any]
    """Other weights that the stage trains, such as those of an ensemble."""
    averaged: Mapping[str, Any] | None
    """The moving average of the weights, or None if the stage has none."""
    meter: Mapping[str, Any]
    """The reported values of the epoch, summed over its steps so far."""
    config: Mapping[str, Any]
    data_digest: str

    @classmethod
    def finished(cls, model: DRNet, config: Config, data_digest: str) -> TrainingState:
        """Return the state after the last epoch of the last stage."""
        epochs = sum(stage.epochs for _, stage in config.stages.present())
        described = config.model_dump(mode="json")
        return cls("finished", epochs, 0, model.state_dict(), {}, {}, None, {}, described, data_digest)

    @property
    def name(self) -> str:
        """The checkpoint's name. Sorted names are in the order of the run."""
        return f"checkpoint_{self.data_epoch:04d}_{self.step:06d}_{self.stage}"

    def refuse_other(self, config: Config, data_digest: str) -> None:
        """Raise OtherRunError, listing every difference, if the state belongs to another configuration or other data.

        Fields that may change between attempts are ignored. Data is compared by content, not by path.
        """
        started_with = stored_config(self.config, config, "the checkpoint's configuration")
        changed = [line for line in drift(started_with, config) if not line.startswith("data.")]
        if self.data_digest != data_digest:
            changed.append(f"digest of the prepared data: {self.data_digest} -> {data_digest}")
        refuse_changes(
            changed,
            f"The checkpoint {self.name} belongs to another configuration or other data",
            "Restore them, or start a run with another name (name=...).",
            OtherRunError,
        )

    def copy(self) -> TrainingState:
        """Return a copy on the CPU, so that training can continue while the copy is written."""
        return TrainingState(**{field.name: _copied(getattr(self, field.name)) for field in fields(self)})

    def save(self, path: Path) -> None:
        """Write the state to a file, atomically."""
        _save({"format": STATE_FORMAT, **{field.name: getattr(self, field.name) for field in fields(self)}}, path)

    @classmethod
    def load(cls, path: Path) -> TrainingState:
        """Read a file that `save` wrote, with all tensors on the CPU.

        Raises:
            ValueError: the file is not a complete training state of this format.
        """
        content = _load(path, STATE_FORMAT)
        return cls(**{field.name: content[field.name] for field in fields(cls)})


def _copied(value: Any) -> Any:
    """Return a tree of mappings and lists with every tensor copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class LoadedModel:
    """A finished model, with the normalization and crop of its inputs and the classes of its outputs."""

    model: DRNet
    config: ModelConfig
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation_crop: float


def save_model(path: Path, model: DRNet, config: Config, *, classes: Sequence[str]) -> None:
    """Write the finished model to a file, atomically."""
    content = {
        "format": MODEL_FORMAT,
        "config": config.model.model_dump(mode="json"),
        "classes": list(classes),
        "validation_crop": validation_crop(config),
        "state": model.state_dict(),
    }
    _save(content, path)


def load_model(path: Path) -> LoadedModel:
    """Read a model.pt that `save_model` wrote, on the CPU, in inference mode. Raise ValueError for any other file."""
    content = _load(path, MODEL_FORMAT)
    config = ModelConfig.model_validate(content["config"] | {"weights": None})
    # Take mean and std from the state, because a stage that starts from another model keeps that model's values.
    mean, std = (tuple(content["state"][name].tolist()) for name in ("mean", "std"))
    model = build_drnet(config, len(content["classes"]), mean, std)
    model.load_state_dict(content["state"])
    return LoadedModel(model.eval(), config, tuple(content["classes"]), mean, std, content["validation_crop"])


def _save(content: Mapping[str, Any], path: Path) -> None:
    with whole_file(path) as file:
        torch.save(dict(content), file)


def _load(path: Path, expected: int) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Give the model.pt or a checkpoint of a run.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types of errors for a damaged file
        raise ValueError(f"{path} is not a readable checkpoint: {str(error) or type(error).__name__}") from error
    if not isinstance(content, dict) or content.get("format") != expected:
        raise ValueError(f"{path} is not a checkpoint of format {expected} of this project")
    return content
