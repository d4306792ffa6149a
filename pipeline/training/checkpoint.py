"""What is saved: the state that training goes on from, and the finished model. Both load without pickle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datasets.files import whole_file
from pipeline.config import Config, ModelConfig
from pipeline.models.drnet import DRNet, build_drnet

FORMAT = 1


@dataclass(frozen=True)
class TrainingState:
    """Everything that differs between two moments of a run.

    Random draws are functions of (seed, epoch, step, sample) and learning rates of progress, so neither is here.
    """

    stage: str
    data_epoch: int
    """epochs done, over all stages"""
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]

    @classmethod
    def capture(cls, model: DRNet, optimizer: torch.optim.Optimizer, stage: str, data_epoch: int) -> TrainingState:
        return cls(stage, data_epoch, model.state_dict(), optimizer.state_dict())

    @classmethod
    def finished(cls, model: DRNet, config: Config) -> TrainingState:
        """The state after the last epoch of the last stage."""
        return cls("finished", sum(stage.epochs for _, stage in config.stages.present()), model.state_dict(), {})

    def save(self, path: Path) -> None:
        _save({"format": FORMAT, **{name: getattr(self, name) for name in self.__dataclass_fields__}}, path)

    @classmethod
    def load(cls, path: Path) -> TrainingState:
        """Raises ValueError where the file is not a whole training state of this format."""
        content = _load(path)
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class LoadedModel:
    """A finished model with what is needed to feed it and to read its answers."""

    model: DRNet
    config: ModelConfig
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation_crop: float


def save_model(
    path: Path, model: DRNet, config: Config, *, classes: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> None:
    """Write the finished model, atomically."""
    content = {
        "format": FORMAT,
        "config": config.model.model_dump(mode="json"),
        "classes": list(classes),
        "mean": list(mean),
        "std": list(std),
        "validation_crop": config.loader.validation_crop,
        "state": model.state_dict(),
    }
    _save(content, path)


def load_model(path: Path) -> LoadedModel:
    """Read a model.pt of `save_model`, on the CPU and in inference mode; raises ValueError where it is not one."""
    content = _load(path)
    config = ModelConfig.model_validate(content["config"] | {"weights": None})
    mean, std = tuple(content["mean"]), tuple(content["std"])
    model = build_drnet(config, len(content["classes"]), mean, std)
    model.load_state_dict(content["state"])
    return LoadedModel(model.eval(), config, tuple(content["classes"]), mean, std, content["validation_crop"])


def _save(content: Mapping[str, Any], path: Path) -> None:
    with whole_file(path) as file:
        torch.save(dict(content), file)


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the model.pt or checkpoint of a run")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of format {FORMAT} of this project")
    return content
