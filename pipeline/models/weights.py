"""Weights that a plain network starts from: a state-dict file, or one of torchvision's published ones."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_LISTED = 5


def load_weights(network: nn.Module, name: str, weights: str) -> None:
    """Load `weights` into `network`, in place; a classifier with another number of classes is left as it is.

    Args:
        network: the plain network (ordinary BatchNorm2d).
        name: its name among torchvision's models, which says whose weights enum is meant.
        weights: path of a state-dict file, or the name of a weights enum member, with or without the enum's name.

    Raises:
        ValueError: no such file or enum member, the file cannot be read or does not fit, or a download failed.
    """
    state = _read_file(Path(weights)) if Path(weights).is_file() else _published(name, weights)
    _load_state(network, state, weights)


def _read_file(path: Path) -> Mapping[str, Tensor]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"weights {path} cannot be read as a state dict: {reason}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights {path} is not a state dict (a mapping of parameter names to tensors)")
    return state


def _published(name: str, weights: str) -> Mapping[str, Tensor]:
    """Torchvision's weights by enum name; torchvision downloads what its cache does not hold."""
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"weights {weights!r} is not a file, and {name} has no published weights; give a file or null")
    published = torchvision.models.get_model_weights(name)
    enum_name, _, member = weights.rpartition(".")
    if (enum_name and enum_name != published.__name__) or member not in published.__members__:
        allowed = ", ".join(published.__members__)
        raise ValueError(
            f"weights {weights!r} is neither a file nor one of torchvision's weights for {name} ({allowed})"
        )
    try:
        return published[member].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"weights {weights!r} of {name} could not be downloaded ({error}); "
            "download the file elsewhere and give its path"
        ) from error


def _load_state(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    own = network.state_dict()
    misfits = [key for key in state if key in own and state[key].shape != own[key].shape]
    classifier = _classifier_keys(network)
    if misfits and set(misfits) <= classifier:
        counts = (state[misfits[0]].shape[0], own[misfits[0]].shape[0])
        logger.warning("%s: classifier for %d classes left out, ours has %d and starts at random", source, *counts)
        state = {key: value for key, value in state.items() if key not in classifier}
        expected = set(own) - classifier
    else:
        expected = set(own)
    problems = [f"{key} is {list(state[key].shape)}, not {list(own[key].shape)}" for key in misfits if key in state]
    # Files from before num_batches_tracked existed lack it; it only matters to cumulative averages.
    missing = {key for key in expected - set(state) if not key.endswith("num_batches_tracked")}
    problems += [f"{key} is missing" for key in sorted(missing)]
    problems += [f"{key} is unknown" for key in sorted(set(state) - set(own))]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError(f"weights {source} do not fit the backbone: {'; '.join(problems[:_LISTED])}{more}")
    network.load_state_dict(dict(state), strict=False)


def _classifier_keys(network: nn.Module) -> set[str]:
    """State-dict keys of the last linear layer, which in torchvision's models is the classifier."""
    name = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)][-1]
    return {f"{name}.weight", f"{name}.bias"}
