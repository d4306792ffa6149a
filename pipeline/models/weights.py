"""Loads the weights that a plain network starts from: a state-dict file, or one of torchvision's published ones."""

from __future__ import annotations

import argparse
import importlib
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
_ENTRIES = ("state_dict", "model_state_dict", "model", "state_dict_ema")
"""Where training checkpoints hold their state dict, the most usual first."""
_PREFIXES = ("module.", "_orig_mod.", "model.")


def load_weights(network: nn.Module, name: str, weights: str) -> None:
    """Load `weights` into `network`, in place. A classifier for another number of classes keeps its random start.

    Args:
        network: the plain network (ordinary BatchNorm2d).
        name: its name among torchvision's models, which selects the weights enum.
        weights: path of a state-dict file, or the name of a weights enum member, with or without the enum's name.

    Raises:
        ValueError: there is no such file or enum member, the file is unreadable or does not fit, or a download failed.
    """
    state = _read_file(Path(weights)) if Path(weights).is_file() else _published(name, weights)
    _load_state(network, state, weights)


def _read_file(path: Path) -> Mapping[str, Tensor]:
    """Read a plain state dict, or one inside a training checkpoint or of a wrapped model."""
    _refuse_no_weights(path)
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickled(path)
    if isinstance(content, Mapping) and "format" in content and {"state", "data_epoch"} & content.keys():
        raise ValueError(
            f"weights {path} is a model or checkpoint of this project. Give a model.pt as init_from of a stage instead."
        )
    for name in _ENTRIES:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            logger.info("%s: using its entry %s", path, name)
            content = content[name]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        found = f"has the entries {', '.join(map(str, content))}" if isinstance(content, Mapping) else "has none"
        raise ValueError(
            f"weights {path} is not a state dict (parameter names and tensors) and {found}. "
            f"A checkpoint must hold its state dict as {', '.join(_ENTRIES[:-1])} or {_ENTRIES[-1]}."
        )
    return _without_prefixes(content)


def _refuse_no_weights(path: Path) -> None:
    """Raise ValueError for files that downloads leave in place of weights."""
    with path.open("rb") as file:
        head = file.read(200).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"weights {path} is a Git LFS pointer, not the file. Run `git lfs pull` in its repository.")
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"weights {path} is a web page, not weights. Download the file by its direct link.")


def _load_pickled(path: Path) -> Any:
    try:
        # Training scripts often store their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"weights {path} cannot be read as a state dict: {reason}") from error


def _load_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        library, loader = (importlib.import_module(name) for name in ("safetensors", "safetensors.torch"))
    except ImportError as error:
        raise ValueError(
            f"weights {path} need the package safetensors. Install it (pip install safetensors)."
        ) from error
    try:
        return loader.load_file(path)
    except (OSError, library.SafetensorError) as error:
        raise ValueError(f"weights {path} cannot be read as safetensors: {error}") from error


def _without_prefixes(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Returns the state dict of the network inside wrappers such as DataParallel, torch.compile or AveragedModel."""
    state = {key: value for key, value in state.items() if key != "n_averaged"}
    while prefix := next(
        (prefix for prefix in _PREFIXES if state and all(key.startswith(prefix) for key in state)), None
    ):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _published(name: str, weights: str) -> Mapping[str, Tensor]:
    """Returns torchvision's weights by enum name; torchvision downloads them unless they are in its cache."""
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(
            f"weights {weights!r} is not a file, and {name} has no published weights. Give a file or null."
        )
    published = torchvision.models.get_model_weights(name)
    enum_name, _, member = weights.rpartition(".")
    if (enum_name and enum_name != published.__name__) or member not in published.__members__:
        allowed = ", ".join(published.__members__)
        raise ValueError(
            f"weights {weights!r} is not a file, and not one of torchvision's weights for {name} ({allowed})"
        )
    try:
        return published[member].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"weights {weights!r} of {name} could not be downloaded ({error}). "
            "Download the file on another machine and give its path."
        ) from error


def _load_state(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    own = network.state_dict()
    misfits = [key for key in state if key in own and state[key].shape != own[key].shape]
    classifier = _classifier_keys(network)
    if misfits and set(misfits) <= classifier:
        counts = (state[misfits[0]].shape[0], own[misfits[0]].shape[0])
        logger.warning("%s: skipped the classifier for %d classes; ours for %d starts at random", source, *counts)
        state = {key: value for key, value in state.items() if key not in classifier}
        expected = set(own) - classifier
    else:
        expected = set(own)
    problems = [f"{key} is {list(state[key].shape)}, not {list(own[key].shape)}" for key in misfits if key in state]
    # Files from before num_batches_tracked existed lack it; only cumulative averages use it.
    missing = {key for key in expected - set(state) if not key.endswith("num_batches_tracked")}
    problems += [f"{key} is missing" for key in sorted(missing)]
    problems += [f"{key} is unknown" for key in sorted(set(state) - set(own))]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError(f"weights {source} do not fit the backbone: {'; '.join(problems[:_LISTED])}{more}")
    network.load_state_dict(dict(state), strict=False)


def _classifier_keys(network: nn.Module) -> set[str]:
    """Returns the state-dict keys of the last linear layer, which is the classifier in torchvision's models."""
    name = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)][-1]
    return {f"{name}.weight", f"{name}.bias"}
