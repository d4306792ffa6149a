"""Check that timm's backbones behave in this project as they do in timm.

`python -m benchmarks.backbones` prints the tables of docs/backbones.md.

Weights are random, and every parameter is shifted, so that layers that start at zero have an effect too. Each network
is compared with itself as timm builds it, with a slow training loop that swaps norms by hand, and with its exported
program.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.backbone import ResolutionBackbone, avoid_unsafe_projections, build_backbone
from pipeline.models.cost import count_macs
from pipeline.models.drnet import DRNet
from pipeline.models.dry_run import meta_images
from pipeline.models.predictor import build_predictor, predictor_shape
from pipeline.models.weights import TIMM
from pipeline.serving.export import exported

CONTRACT = tuple(
    """
    resnet10t resnext26ts seresnext26d_32x4d res2net50_48w_2s resnetv2_18 regnetx_002 regnety_002 densenet121
    mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small_035 mnasnet_small ghostnet_050 tinynet_e lcnet_035
    efficientnet_lite0 tf_efficientnet_lite0 tf_mobilenetv3_small_minimal_100 repvgg_a0 mobileone_s0 hrnet_w18_small
    dla46x_c xception41p convnext_atto convnextv2_atto edgenext_xx_small fastvit_t8 poolformer_s12 mobilevit_xxs
    mambaout_femto efficientvit_m0 vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 swin_tiny_patch4_window7_224
    """.split()  # noqa: SIM905  one name on a line would be a page
)
"""Small networks of many families."""
REFUSED = {
    "maxvit_pico_rw_256": "px only",
    "halonet26t": "px only",
    "beit_base_patch16_224": "px only",
    "cait_xxs24_224": "px only",
    "levit_128s": "px only",
    "mixer_s32_224": "px only",
    "nf_resnet26": "no norm layer",
}
"""Networks that cannot be a backbone, each with a part of the error message."""
SIDES = (224, 160, 96)
"""The image sides at which FLOPs are counted, in pixels."""
TRAINED_SIDES = (96, 64)
CLASSES, BATCH, RATE = 5, 4, 0.05
AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)


@dataclass(frozen=True)
class Contract:
    """The properties of one network. A difference is the largest over all values; 0 means exactly equal.

    `timm_difference` compares logits and gradients with one resolution to timm's own network. `reference_difference`
    compares logits and values after two training steps to the slow loop. `exported_difference` compares a reloaded
    program's logits to the network's, relative to the largest.
    """

    name: str
    parameters: int
    private: str
    gflops: tuple[float, ...]
    timm_difference: float
    reference_difference: float
    exported_difference: float


def measure(name: str) -> Contract:
    """Build, run, train, export and reload timm's network `name`. Raise ValueError if it cannot be a backbone."""
    single = _shifted(lambda: build_backbone(TIMM + name, CLASSES, 1))
    timm_difference = _difference(_gradients(single, 0), _gradients(_shifted(lambda: _theirs(name)), None))
    backbone = _shifted(lambda: build_backbone(TIMM + name, CLASSES, len(TRAINED_SIDES)))
    network = _shifted(lambda: _theirs(name))
    private = private_keys(network)
    ours, expected = list(_train(backbone)), list(train_by_hand(network, private))
    return Contract(
        name=name,
        parameters=sum(parameter.numel() for parameter in single.parameters()),
        private="batch norm" if any(isinstance(layer, _BATCH_NORMS) for layer in network.modules()) else "all norms",
        gflops=tuple(count_macs(single, meta_images(side), 0) / 1e9 for side in SIDES),
        timm_difference=timm_difference,
        reference_difference=_difference(ours, expected),
        exported_difference=_exported_difference(backbone.eval()),
    )


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def _theirs(name: str) -> nn.Module:
    """Build timm's network. If its size is fixed by default, timm's own option makes it accept other sizes.

    Its strided 1x1 convolutions of few channels (RepVGG, MobileOne, FastViT) are replaced like ours, because their
    kernel can corrupt memory and rounds differently in the last bit.
    """
    try:
        network = timm.create_model(name, num_classes=CLASSES, dynamic_img_size=True)
    except TypeError:
        torch.manual_seed(3)
        network = timm.create_model(name, num_classes=CLASSES)
    avoid_unsafe_projections(network)
    return network


def _shifted(build: Callable[[], AnyNetwork]) -> AnyNetwork:
    """Return a network in training mode with shifted parameters. The shift depends on a parameter's name without its
    copy."""
    torch.manual_seed(3)
    network = build().train()
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            plain = re.sub(r"\.norms\.\d+", "", key).removeprefix("network.")
            generator = torch.Generator().manual_seed(zlib.crc32(plain.encode()))
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return network


def _batch(side: int, step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + side)
    images = torch.randn(BATCH, 3, side, side, generator=generator)
    return images, torch.randint(CLASSES, (BATCH,), generator=generator)


def _loss(network: nn.Module, side: int, step: int, *arguments: int) -> tuple[Tensor, Tensor]:
    """Return logits and loss. Dropout and stochastic depth draw the same values for the same side and step."""
    images, labels = _batch(side, step)
    torch.manual_seed(7 * step + side)
    logits = network(images, *arguments)
    return logits, functional.cross_entropy(logits, labels)


def _gradients(network: nn.Module, index: int | None) -> list[Tensor]:
    logits, loss = _loss(network, TRAINED_SIDES[0], 0, *(() if index is None else (index,)))
    loss.backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return [logits.detach(), *gradients, *network.buffers()]


def _train(backbone: ResolutionBackbone) -> Iterator[Tensor]:
    """Train for two steps. Yield all logits, then the state of each resolution's network, by name."""
    optimizer = torch.optim.SGD(backbone.parameters(), RATE, foreach=False)
    for step in range(2):
        optimizer.zero_grad()
        for index, side in enumerate(TRAINED_SIDES):
            logits, loss = _loss(backbone, side, step, index)
            loss.backward()
            yield logits.detach()
        optimizer.step()
    for index in range(len(TRAINED_SIDES)):
        yield from (value for _, value in sorted(backbone.at(index).state_dict().items()))


def private_keys(network: nn.Module) -> set[str]:
    """Return the state-dict keys of all batch norms or, without batch norms, of all layers that are called norms."""
    layers = dict(network.named_modules())
    norms = [name for name, layer in layers.items() if isinstance(layer, _BATCH_NORMS)]
    norms = norms or [name for name, layer in layers.items() if "Norm" in type(layer).__name__ and layer._parameters]
    return {key for key in network.state_dict() if key.rpartition(".")[0] in norms}


def train_by_hand(network: nn.Module, private: set[str]) -> Iterator[Tensor]:
    """Do the same as `_train` with one plain network, whose private values are swapped in and out for every pass."""
    state, parameters = network.state_dict(), dict(network.named_parameters())
    kept = [{key: state[key].clone() for key in private} for _ in TRAINED_SIDES]
    for step in range(2):
        network.zero_grad()
        gradients: list[dict[str, Tensor]] = []
        for index, side in enumerate(TRAINED_SIDES):
            network.load_state_dict({**network.state_dict(), **kept[index]})
            own = {key: parameters[key] for key in private & parameters.keys()}
            for parameter in own.values():
                parameter.grad = None
            logits, loss = _loss(network, side, step)
            loss.backward()
            yield logits.detach()
            gradients.append({key: parameter.grad for key, parameter in own.items() if parameter.grad is not None})
            kept[index] = {key: value.clone() for key, value in network.state_dict().items() if key in private}
        with torch.no_grad():
            for key, parameter in parameters.items():
                if key not in private and parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-RATE)
            for values, found in zip(kept, gradients, strict=True):
                for key, gradient in found.items():
                    values[key].add_(gradient, alpha=-RATE)
    for values in kept:
        yield from (value for _, value in sorted({**network.state_dict(), **values}.items()))


def _difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return the largest difference between paired tensors, or infinity if shapes differ or a value is not finite."""
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        return math.inf
    differences = [float((own - other).abs().max()) for own, other in zip(ours, theirs, strict=True) if own.numel()]
    return max(differences, default=0.0) if all(map(math.isfinite, differences)) else math.inf


def _exported_difference(backbone: ResolutionBackbone) -> float:
    index, side = len(TRAINED_SIDES) - 1, TRAINED_SIDES[-1]
    predictor = build_predictor(predictor_shape(1), len(TRAINED_SIDES), width=0.125)
    model = DRNet(backbone, predictor, TRAINED_SIDES, 32, (0.5,) * 3, (0.25,) * 3).eval()
    file = io.BytesIO()
    torch.export.save(exported(model, backbone.at(index), side), file)
    program = torch.export.load(io.BytesIO(file.getvalue())).module()
    images = torch.randint(256, (3, side, side, 3), dtype=torch.uint8)
    with torch.inference_mode():
        logits = model.static_logits({side: images}, index)
        return _difference([program(images)], [logits]) / float(logits.abs().max())


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backbones", description=__doc__)
    parser.add_argument("names", nargs="*", help="networks of timm (default: the contract's)")
    names = parser.parse_args().names or [*CONTRACT, *REFUSED]
    heads = (f"GFLOPs at {', '.join(map(str, SIDES))} px", "private", "timm, 1 resolution", "by hand, 2", "exported")
    print(f"| timm/ | parameters | {' | '.join(heads)} |\n|---|---|---|---|---|---|---|", flush=True)
    refused: list[str] = []
    for name in names:
        try:
            found = measure(name)
        except ValueError as error:
            refused.append(f"| {name} | {error} |")
            continue
        gflops = ", ".join(f"{value:.2f}" for value in found.gflops)
        differences = (found.timm_difference, found.reference_difference, found.exported_difference)
        texts = " | ".join("same bits" if value == 0 else f"{value:.0e}" for value in differences)
        print(f"| {name} | {found.parameters / 1e6:.1f} M | {gflops} | {found.private} | {texts} |", flush=True)
    if refused:
        print("\n| timm/ | refused |\n|---|---|", *refused, sep="\n")


if __name__ == "__main__":
    main()
