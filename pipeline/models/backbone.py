"""The backbone: a network of torchvision or timm, or our small ResNet, with norms that are private to a resolution."""

from __future__ import annotations

import copy
import difflib
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock

from pipeline.models.dry_run import meta_forward, meta_images
from pipeline.models.norms import PrivateNorms, keep_resolution, make_resolution_aware
from pipeline.models.weights import TIMM, classifier_keys, load_weights


class SmallResNet(nn.Module):
    """A residual network for small images of any size: 3x3/2 stem, three BasicBlocks of stride 2, average pooling.

    The stem only halves the resolution, so that details of a few pixels reach the first block. The cost grows with H *
    W. On a CPU most of a step's time goes into large feature maps, so the blocks start after the stem.

    Args:
        num_classes: K.
        width: multiplier of every channel count.
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
        """Return logits (N, K) for images (N, 3, H, W), H and W at least 1."""
        return self.fc(self.pool(self.blocks(self.stem(images))).flatten(1))


def scaled_channels(channels: int, width: float) -> int:
    """Return `channels * width`, rounded to a multiple of 8, at least 8."""
    return max(8, 8 * round(channels * width / 8))


def residual_block(inputs: int, outputs: int, stride: int) -> BasicBlock:
    """Return ResNet's block of two convolutions, with a 1x1 projection if the input and output shapes differ."""
    projection = None
    if stride != 1 or inputs != outputs:
        projection = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, projection)


def init_convolutions(module: nn.Module) -> None:
    """Initialize every convolution inside `module` as He et al. and torchvision's ResNet do."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def remove_mean(stem: nn.Conv2d) -> None:
    """Give every filter of a first convolution zero mean over its window, so that it responds to edges.

    Images differ far more in brightness than in content, and random filters mostly pass brightness on. This
    initialization matters in short training runs from scratch: on generated letters at 64 px, four epochs reached
    57 % accuracy with it and 27 % without. Training may bring the mean back.
    """
    with torch.no_grad():
        stem.weight -= stem.weight.mean(dim=(2, 3), keepdim=True)


MIN_CHANNELS = 16
"""The number of input channels from which oneDNN's strided kernel is safe."""


class NarrowProjection(nn.Conv2d):
    """A strided 1x1 convolution that drops the pixels which the stride skips, then runs with stride 1.

    In torch 2.13, oneDNN's backward pass of such a convolution writes outside its memory on a CPU with several threads
    (float32, channels_last, fewer than MIN_CHANNELS input channels), and the process dies with SIGSEGV or SIGBUS.
    Result, parameters and multiply-adds equal those of nn.Conv2d.
    """

    @classmethod
    def of(cls, convolution: nn.Conv2d) -> Self:
        """Return a NarrowProjection with the parameters of `convolution`."""
        layer = cls(convolution.in_channels, convolution.out_channels, 1, groups=convolution.groups, device="meta")
        layer.stride, layer._parameters = convolution.stride, convolution._parameters
        return layer.train(convolution.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return features (N, C', ceil(H / stride), ceil(W / stride)) for features (N, C, H, W)."""
        rows, columns = (int(step) for step in self.stride)
        return functional.conv2d(input[:, :, ::rows, ::columns], self.weight, self.bias, groups=self.groups)


def avoid_unsafe_projections(module: nn.Module) -> None:
    """Replace every strided 1x1 convolution of few channels inside `module`, in place, by a NarrowProjection.

    Raises:
        ValueError: such a convolution is of another class, for example one with standardized weights.
    """
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.Conv2d) and _is_unsafe(child):
                if type(child).forward is not nn.Conv2d.forward:
                    raise ValueError(
                        f"{type(module).__name__} has a strided 1x1 {type(child).__name__} of {child.in_channels} "
                        "input channels, which can corrupt memory on a CPU. Choose another backbone."
                    )
                setattr(parent, name, NarrowProjection.of(child))


def _is_unsafe(convolution: nn.Conv2d) -> bool:
    return (
        convolution.kernel_size == (1, 1)
        and convolution.stride != (1, 1)
        and convolution.padding in ((0, 0), "valid")
        and convolution.in_channels < MIN_CHANNELS
    )


SMALL_RESNET = "small_resnet"
_AUXILIARY_OUTPUTS = ("googlenet", "inception_v3")
_PROBE_SIDES = (224, 160, 196, 256, 288, 128)
"""A backbone must accept at least two of these sides in pixels. They are multiples of the usual strides and patch
sizes."""


class ResolutionBackbone(nn.Module):
    """One network for R candidate resolutions: all layers are shared, except norms that are private to a resolution.

    Args:
        network: classification network (N, 3, H, W) -> (N, K); changed in place.
        num_resolutions: R.
        private_norms: which norms have a copy for each resolution, as in `make_resolution_aware`.
    """

    def __init__(self, network: nn.Module, num_resolutions: int, private_norms: PrivateNorms = "auto"):
        super().__init__()
        self.num_resolutions = num_resolutions
        # A plain list, because the layers are registered in `network` and must not be in the state dict twice.
        self._norms = make_resolution_aware(network, num_resolutions, private_norms)
        self.network = network

    def forward(self, images: Tensor, resolution_index: int) -> Tensor:
        """Return logits (N, K) for images (N, 3, H, W), using the norms of resolution `resolution_index`."""
        self.select(resolution_index)
        return self.network(images)

    def select(self, resolution_index: int) -> None:
        """Activate the norms of one resolution. Raise ValueError for an index outside [0, R)."""
        if not 0 <= resolution_index < self.num_resolutions:
            raise ValueError(f"resolution index {resolution_index} is not in 0..{self.num_resolutions - 1}")
        for norm in self._norms:
            norm.active = resolution_index

    def freeze_statistics(self, frozen: bool) -> None:
        """Set whether every batch norm uses its running statistics in training mode too, from the next `train()` on."""
        for norm in self._norms:
            norm.frozen = frozen

    def classifier_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the layer that computes the logits."""
        keys = classifier_keys(self.network)
        return [parameter for name, parameter in self.network.named_parameters() if name in keys]

    def layer_depths(self) -> dict[nn.Parameter, int]:
        """Return, for each parameter, the number of layer groups between it and the output.

        The groups are those of timm. Private copies of a norm belong to the group of the layer that they replace.

        Raises:
            ValueError: timm does not define layer groups for this network.
        """
        matcher: Any = getattr(self.network, "group_matcher", None)
        if matcher is None:
            raise ValueError(
                "layer_decay and freeze_layers need layer groups, which this backbone does not have. Set layer_decay=1 "
                "and freeze_layers=0 in its stages, or choose a backbone timm/NAME."
            )
        from timm.models import group_parameters

        plain = self.at(0)
        groups = group_parameters(plain, matcher(coarse=False), reverse=True)
        names = {parameter: name for name, parameter in self.network.named_parameters()}
        for path, layer in self.network.named_modules():
            for private in layer.norms if layer in self._norms else ():
                names |= {parameter: f"{path}.{name}" for name, parameter in private.named_parameters()}
        return {parameter: max(groups.values()) - groups[name] for parameter, name in names.items()}

    def first_layers(self, num_groups: int) -> list[nn.Parameter]:
        """Return the parameters of the `num_groups` layer groups next to the input.

        Raises:
            ValueError: the network has fewer groups below its last one, or timm defines none for it.
        """
        if num_groups == 0:
            return []
        depths = self.layer_depths()
        most = max(depths.values())
        if num_groups > most:
            raise ValueError(
                f"stages.backbone.freeze_layers is {num_groups}, but the backbone has {most} groups below its last "
                f"one. Give at most {most}."
            )
        return [parameter for parameter, depth in depths.items() if most - depth < num_groups]

    def at(self, resolution_index: int) -> nn.Module:
        """Return a separate copy of the network with the plain norms of one resolution, for export and cost counts."""
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
        name: `small_resnet`, a torchvision classification model, or `timm/NAME`; it must accept images of several
            sizes.
        num_classes: number K of the classifier's outputs.
        num_resolutions: R.
        width: channel multiplier of `small_resnet`.
        weights: as in `load_weights`; the norms of every resolution start from the same values. None starts at random.
        dropout, drop_path: probabilities of dropout before the classifier and of skipping the last block; None keeps
            the network's default.
        private_norms: which norms have a copy for each resolution, as in `make_resolution_aware`.

    Raises:
        ValueError: the name, width, weights, a probability or the norms are not possible.
    """
    rates = {"dropout": dropout, "drop_path": drop_path}
    if name == SMALL_RESNET:
        network = _with_rates(partial(SmallResNet, num_classes, width), name, rates, {})
    else:
        build, arguments = (_timm, TIMM_RATES) if name.startswith(TIMM) else (_torchvision, TORCHVISION_RATES)
        network = _with_rates(partial(build, name, num_classes), name, rates, arguments)
        if width != 1:
            raise ValueError(
                f"backbone {name} has a fixed width. Only {SMALL_RESNET} can be scaled. Set model.backbone_width=1."
            )
        _check_outputs(network, name, num_classes)
    avoid_unsafe_projections(network)
    if weights is not None:
        load_weights(network, name, weights)
    return ResolutionBackbone(network, num_resolutions, private_norms)


TIMM_RATES = {"dropout": "drop_rate", "drop_path": "drop_path_rate"}
TORCHVISION_RATES = {"dropout": "dropout", "drop_path": "stochastic_depth_prob"}
"""Map each rate to the name of the constructor's argument in timm and in torchvision."""


def _with_rates(
    build: Callable[..., nn.Module], name: str, rates: Mapping[str, float | None], arguments: Mapping[str, str]
) -> nn.Module:
    """Build a network with the rates that are not None.

    Args:
        arguments: maps each rate to the name of the constructor's argument.

    Raises:
        ValueError: the constructor does not take a rate.
    """
    given = {key: rate for key, rate in rates.items() if rate is not None}
    for key in given.keys() - arguments.keys():
        raise ValueError(f"backbone {name} has no {key}. Set model.{key}=null.")
    try:
        return build(**{arguments[key]: rate for key, rate in given.items()})
    except TypeError as error:
        unknown = [key for key in given if f"unexpected keyword argument '{arguments[key]}'" in str(error)]
        if not unknown:
            raise
        raise ValueError(f"backbone {name} has no {unknown[0]}. Set model.{unknown[0]}=null.") from None


def _torchvision(name: str, num_classes: int, **rates: Any) -> nn.Module:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        import timm

        if timm.is_model(name.partition(".")[0]):
            raise ValueError(f"{name!r} is not a known backbone. Did you mean {TIMM}{name.partition('.')[0]}?")
        raise _unknown(name, [SMALL_RESNET, *known], f"Give {SMALL_RESNET}, a torchvision model or {TIMM}NAME.")
    if name in _AUXILIARY_OUTPUTS:
        raise ValueError(f"backbone {name} has auxiliary outputs while training. Choose one with a single output.")
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **rates)


def _timm(name: str, num_classes: int, **rates: Any) -> nn.Module:
    """Build a timm network. Position embeddings are resampled to the image size if the network supports it."""
    import timm

    architecture, _, tag = name.removeprefix(TIMM).partition(".")
    if not timm.is_model(architecture):
        known = [TIMM + model for model in timm.list_models()]
        raise _unknown(TIMM + architecture, known, "timm.list_models() lists all names.")
    if tag:
        raise ValueError(
            f"backbone {name} also names weights. Set model.backbone={TIMM}{architecture} and model.weights={tag}."
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
    hint = f"Did you mean {' or '.join(near)}?" if near else otherwise
    return ValueError(f"{name!r} is not a known backbone. {hint}")


def _check_outputs(network: nn.Module, name: str, num_classes: int) -> None:
    """Raise ValueError unless the network accepts several sizes and returns only logits, in training mode too."""
    fitting: list[int] = []
    reason = ""
    for side in _PROBE_SIDES:
        try:
            logits = [meta_forward(network, meta_images(side, 2), training=training) for training in (False, True)]
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            reason = reason or f"{side} px: {str(error).strip().splitlines()[0] if str(error).strip() else 'fails'}"
            continue
        if not all(isinstance(output, Tensor) and output.shape == (2, num_classes) for output in logits):
            raise ValueError(f"backbone {name} returns more than logits. Choose one with a single output of K classes.")
        fitting.append(side)
        if len(fitting) == 2:
            return
    only = f"takes images of {fitting[0]} px only" if fitting else "takes none of the usual image sizes"
    raise ValueError(
        f"backbone {name} {only} ({reason}), but dynamic resolution needs several sizes. Choose one without a fixed "
        "size, such as resnet50, timm/tf_efficientnet_lite0, timm/convnext_nano or timm/vit_tiny_patch16_224."
    )


GRAPHS_PER_RESOLUTION = 16
"""The largest number of graphs that torch.compile may make for a resolution. There are about 4 kinds of passes, and
each has up to 4 graphs: for a batch of 0 images, of 1, of the first size, and of any size."""


def compile_backbone(backbone: ResolutionBackbone, backend: str | Callable = "inductor") -> None:
    """Run the backbone's passes with torch.compile.

    Each resolution has its own graphs, for passes with and without gradient and for both kinds of batch norm
    statistics. A graph accepts sub-batches of any size once it has seen two sizes. These are more graphs than torch's
    default limit of 8, above which torch runs the network uncompiled.
    """
    limit = GRAPHS_PER_RESOLUTION * backbone.num_resolutions
    backbone.compile(backend=backend, recompile_limit=limit, isolate_recompiles=True)
