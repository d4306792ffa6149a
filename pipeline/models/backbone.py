"""The backbone: a network of torchvision or timm, or our small one, with norms that are private to a resolution."""

from __future__ import annotations

import copy
import difflib
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from pipeline.models.dry_run import meta_forward, meta_images
from pipeline.models.norms import PrivateNorms, keep_resolution, make_resolution_aware
from pipeline.models.projection import avoid_unsafe_projections
from pipeline.models.weights import TIMM, classifier_keys, load_weights


class SmallResNet(nn.Module):
    """A residual network for small images of any size: 3x3/2 stem, three BasicBlocks of stride 2, average pooling.

    The stem keeps half of the resolution, so that details of a few pixels survive to the first block; the cost grows
    with H * W. On the CPU a step's time goes where the feature maps are large, so blocks start after the stem.

    Args:
        num_classes: K.
        width: multiplies every channel count.
    """

    def __init__(self, num_classes: int, width: float = 1.0):
        super().__init__()
        channels = [scaled_channels(base, width) for base in (16, 32, 64, 128)]
        stem = nn.Conv2d(3, channels[0], 3, stride=2, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(channels[0]), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(
            *(residual_block(inputs, outputs, stride=2) for inputs, outputs in itertools.pairwise(channels))
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[-1], num_classes)
        init_convolutions(self)
        remove_mean(stem)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, 3, H, W), H and W at least 1."""
        return self.fc(self.pool(self.blocks(self.stem(images))).flatten(1))


def scaled_channels(channels: int, width: float) -> int:
    """Returns `channels * width`, rounded to a multiple of 8, at least 8."""
    return max(8, 8 * round(channels * width / 8))


def residual_block(inputs: int, outputs: int, stride: int) -> BasicBlock:
    """Returns ResNet's block of two convolutions, with a 1x1 projection where the shapes differ."""
    projection = None
    if stride != 1 or inputs != outputs:
        projection = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, projection)


def init_convolutions(module: nn.Module) -> None:
    """Initialize every convolution as He et al. do, and torchvision's ResNet."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def remove_mean(stem: nn.Conv2d) -> None:
    """Start every filter of a first convolution with zero mean over its window, so that it responds to edges.

    Brightness varies far more between images than what is drawn on them, and random filters mostly pass brightness on.
    It matters in short trainings from scratch: on generated letters at 64 px, four epochs reached 57 % accuracy with
    this start and 27 % without. Training may bring the mean back.
    """
    with torch.no_grad():
        stem.weight -= stem.weight.mean(dim=(2, 3), keepdim=True)


SMALL_RESNET = "small_resnet"
_AUXILIARY_OUTPUTS = ("googlenet", "inception_v3")
_PROBE_SIDES = (224, 160, 196, 256, 288, 128)
"""A network must take two of these: multiples of the usual strides and patches."""


class ResolutionBackbone(nn.Module):
    """One network for R candidate resolutions: all layers shared, except norms that are private to each.

    Args:
        network: a classification network (N, 3, H, W) -> (N, K); changed in place.
        num_resolutions: R.
        private_norms: which norms have a copy for each resolution, as in `make_resolution_aware`.
    """

    def __init__(self, network: nn.Module, num_resolutions: int, private_norms: PrivateNorms = "auto"):
        super().__init__()
        self.num_resolutions = num_resolutions
        # A plain list: the layers are registered in `network` and must not be in the state dict twice.
        self._norms = make_resolution_aware(network, num_resolutions, private_norms)
        self.network = network

    def forward(self, images: Tensor, resolution_index: int) -> Tensor:
        """Logits (N, K) of images (N, 3, H, W), normalized with the norms of candidate `resolution_index`."""
        self.select(resolution_index)
        return self.network(images)

    def select(self, resolution_index: int) -> None:
        """Make one candidate's norms active; raises ValueError for an index outside [0, R)."""
        if not 0 <= resolution_index < self.num_resolutions:
            raise ValueError(f"resolution index {resolution_index} is not in 0..{self.num_resolutions - 1}")
        for norm in self._norms:
            norm.active = resolution_index

    def freeze_statistics(self, frozen: bool) -> None:
        """Have every batch norm use its running statistics in training mode too, from the next `train()` on."""
        for norm in self._norms:
            norm.frozen = frozen

    def classifier_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of the layer that computes the logits."""
        keys = classifier_keys(self.network)
        return [parameter for name, parameter in self.network.named_parameters() if name in keys]

    def layer_depths(self) -> dict[nn.Parameter, int]:
        """Returns how many groups of layers, as timm cuts the network, lie between each parameter and the output.

        Private copies of a norm belong to the group of the layer that they replace.

        Raises:
            ValueError: timm does not cut this network.
        """
        matcher: Any = getattr(self.network, "group_matcher", None)
        if matcher is None:
            raise ValueError("layer_decay needs a backbone of timm, which groups its layers. Give timm/NAME, or 1")
        from timm.models import group_parameters

        plain = self.at(0)
        groups = group_parameters(plain, matcher(coarse=False), reverse=True)
        names = {parameter: name for name, parameter in self.network.named_parameters()}
        for path, layer in self.network.named_modules():
            for private in layer.norms if layer in self._norms else ():
                names |= {parameter: f"{path}.{name}" for name, parameter in private.named_parameters()}
        return {parameter: max(groups.values()) - groups[name] for parameter, name in names.items()}

    def at(self, resolution_index: int) -> nn.Module:
        """Returns a separate copy of the network with one candidate's plain norms, for export and cost."""
        self.select(resolution_index)
        network = copy.deepcopy(self.network)
        keep_resolution(network, resolution_index)
        return network


def build_backbone(
    name: str,
    num_classes: int,
    num_resolutions: int,
    *,
    width: float = 1.0,
    weights: str | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
    private_norms: PrivateNorms = "auto",
) -> ResolutionBackbone:
    """Build a resolution-aware backbone by name.

    Args:
        name: `small_resnet`, a torchvision classification model, or `timm/NAME`; it must take images of several sizes.
        num_classes: K; the classifier has this many outputs.
        num_resolutions: R.
        width: channel multiplier of `small_resnet`.
        weights: as in `load_weights`; every candidate's norms start from the same values. None is random.
        dropout, drop_path: probabilities of dropout before the classifier and of skipping the last block; None is the
            network's own.
        private_norms: which norms have a copy for each resolution, as in `make_resolution_aware`.

    Raises:
        ValueError: the name, the width, the weights, a probability or the norms do not fit.
    """
    rates = {"dropout": dropout, "drop_path": drop_path}
    if name == SMALL_RESNET:
        network = _with_rates(partial(SmallResNet, num_classes, width), name, rates, {})
    else:
        build, arguments = (_timm, TIMM_RATES) if name.startswith(TIMM) else (_torchvision, TORCHVISION_RATES)
        network = _with_rates(partial(build, name, num_classes), name, rates, arguments)
        if width != 1:
            raise ValueError(
                f"backbone {name} has one width. Set model.backbone_width=1; only {SMALL_RESNET} is scaled"
            )
        _check_outputs(network, name, num_classes)
    avoid_unsafe_projections(network)
    if weights is not None:
        load_weights(network, name, weights)
    return ResolutionBackbone(network, num_resolutions, private_norms)


TIMM_RATES = {"dropout": "drop_rate", "drop_path": "drop_path_rate"}
TORCHVISION_RATES = {"dropout": "dropout", "drop_path": "stochastic_depth_prob"}
"""The name of the constructor's argument for each rate."""


def _with_rates(
    build: Callable[..., nn.Module], name: str, rates: Mapping[str, float | None], arguments: Mapping[str, str]
) -> nn.Module:
    """Build a network with the rates that are given.

    Args:
        arguments: name of the constructor's argument for each rate.

    Raises:
        ValueError: the constructor does not take a rate.
    """
    given = {key: rate for key, rate in rates.items() if rate is not None}
    for key in given.keys() - arguments.keys():
        raise ValueError(f"backbone {name} has no {key}. Set model.{key}=null")
    try:
        return build(**{arguments[key]: rate for key, rate in given.items()})
    except TypeError as error:
        unknown = [key for key in given if f"unexpected keyword argument '{arguments[key]}'" in str(error)]
        if not unknown:
            raise
        raise ValueError(f"backbone {name} has no {unknown[0]}. Set model.{unknown[0]}=null") from None


def _torchvision(name: str, num_classes: int, **rates: Any) -> nn.Module:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        import timm

        if timm.is_model(name.partition(".")[0]):
            raise ValueError(f"{name!r} is not a known backbone; did you mean {TIMM}{name.partition('.')[0]}?")
        raise _unknown(name, [SMALL_RESNET, *known], f"give {SMALL_RESNET}, a torchvision model or {TIMM}NAME")
    if name in _AUXILIARY_OUTPUTS:
        raise ValueError(f"backbone {name} has auxiliary outputs while training; choose one with a single output")
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **rates)


def _timm(name: str, num_classes: int, **rates: Any) -> nn.Module:
    """Build a network of timm; position embeddings follow the image size where the network can resample them."""
    import timm

    architecture, _, tag = name.removeprefix(TIMM).partition(".")
    if not timm.is_model(architecture):
        known = [TIMM + model for model in timm.list_models()]
        raise _unknown(TIMM + architecture, known, "timm.list_models() names all")
    if tag:
        raise ValueError(
            f"backbone {name} names weights too; set model.backbone={TIMM}{architecture} and model.weights={tag}"
        )
    state = torch.get_rng_state()
    try:
        return timm.create_model(architecture, num_classes=num_classes, dynamic_img_size=True, **rates)
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
    torch.set_rng_state(state)
    return timm.create_model(architecture, num_classes=num_classes, **rates)


def _unknown(name: str, known: list[str], otherwise: str) -> ValueError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else otherwise
    return ValueError(f"{name!r} is not a known backbone; {hint}")


def _check_outputs(network: nn.Module, name: str, num_classes: int) -> None:
    """Raise ValueError unless the network takes several sizes and returns logits alone, in training mode too."""
    fitting: list[int] = []
    reason = ""
    for side in _PROBE_SIDES:
        try:
            logits = [meta_forward(network, meta_images(side, 2), training=training) for training in (False, True)]
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            reason = reason or f"{side} px: {str(error).strip().splitlines()[0] if str(error).strip() else 'fails'}"
            continue
        if not all(isinstance(output, Tensor) and output.shape == (2, num_classes) for output in logits):
            raise ValueError(f"backbone {name} returns more than logits; choose one with a single output of K classes")
        fitting.append(side)
        if len(fitting) == 2:
            return
    only = f"takes images of {fitting[0]} px only" if fitting else "takes images of a size of its own"
    raise ValueError(
        f"backbone {name} {only} ({reason}), but dynamic resolution needs several sizes. Choose one without a fixed "
        "size, such as resnet50, timm/tf_efficientnet_lite0, timm/convnext_nano or timm/vit_tiny_patch16_224"
    )


GRAPHS_PER_RESOLUTION = 16
"""How many graphs torch.compile may make: about 4 kinds of passes, each for sizes 0, 1, the first one and any."""


def compile_backbone(backbone: ResolutionBackbone, backend: str | Callable = "inductor") -> None:
    """Run the backbone's passes with torch.compile.

    Each resolution has its own graphs, for passes with and without gradient and for both kinds of batch norm
    statistics. A graph takes sub-batches of any size once it has seen two sizes. That is more than torch's default
    limit of 8 graphs, beyond which torch runs the network uncompiled.
    """
    limit = GRAPHS_PER_RESOLUTION * backbone.num_resolutions
    backbone.compile(backend=backend, recompile_limit=limit, isolate_recompiles=True)
