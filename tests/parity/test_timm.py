"""Backbones of timm: bit for bit timm's networks, norms swapped by hand, and the same answers once exported."""

from __future__ import annotations

import pytest
import timm
import torch

from benchmarks.backbones import CONTRACT, REFUSED, SIDES, _difference, measure, private_keys
from pipeline.models.backbone import build_backbone
from pipeline.models.cost import count_macs
from pipeline.models.dry_run import meta_images

EXACT = ("resnet10t", "tf_efficientnet_lite0", "lcnet_035", "repvgg_a0", "convnext_atto", "vit_tiny_patch16_224")
"""One network of each way to build a norm; benchmarks.backbones checks all of CONTRACT so, in a quarter of an hour."""


@pytest.mark.parametrize("name", CONTRACT)
def test_every_family_takes_several_sizes_with_private_norms(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(f"timm/{name}", 5, len(SIDES))
    plain = timm.create_model(name, num_classes=5)
    gflops = [count_macs(backbone, meta_images(side), index) / 1e9 for index, side in enumerate(SIDES)]
    assert gflops == sorted(gflops, reverse=True)
    assert gflops[-1] > 0
    copies = {key.replace(".norms.2", "") for key in backbone.network.state_dict() if ".norms.2." in key}
    assert copies == private_keys(plain)


@pytest.mark.parametrize("name", EXACT)
def test_the_contract(name: str) -> None:
    found = measure(name)
    assert found.timm_difference == found.reference_difference == 0
    assert found.exported_difference < 1e-3
    assert len(found.gflops) == len(SIDES)
    assert found.gflops[0] > found.gflops[1] > found.gflops[2] > 0


def test_a_value_that_is_not_finite_is_an_infinite_difference() -> None:
    zero, nan = torch.zeros(2), torch.tensor([0.0, torch.nan])
    assert _difference([zero, zero], [zero, zero]) == 0
    assert _difference([zero, nan], [zero, zero]) == _difference([nan, zero], [zero, zero]) == torch.inf


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_backbone_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[name]):
        build_backbone(f"timm/{name}", 5, 2)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_at_its_own_size_a_network_of_any_size_is_timms_default(name: str) -> None:
    torch.manual_seed(3)
    theirs = timm.create_model(name, num_classes=5).eval()
    torch.manual_seed(3)
    ours = build_backbone(f"timm/{name}", 5, 1).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(ours(images, 0), theirs(images))


@pytest.mark.parametrize(
    ("private_norms", "kinds"),
    [
        ("auto", {"BatchNorm2d"}),
        ("batch_norm", {"BatchNorm2d"}),
        ("all", {"BatchNorm2d", "LayerNorm"}),
        ("none", set()),
    ],
)
def test_private_norms_of_a_network_with_both_kinds(private_norms, kinds: set[str]) -> None:
    """mobilevit_xxs has convolutions with batch norm, and attention with layer norm."""
    plain = timm.create_model("mobilevit_xxs", num_classes=5)
    backbone = build_backbone("timm/mobilevit_xxs", 5, 2, private_norms=private_norms)
    keys = {key.removeprefix("network.").replace(".norms.1", "") for key in backbone.state_dict() if ".norms.1." in key}
    layers = dict(plain.named_modules())
    private = {key.rpartition(".")[0] for key in keys}
    bases = {"BatchNorm2d": torch.nn.BatchNorm2d, "LayerNorm": torch.nn.LayerNorm}
    expected = {name for name, layer in layers.items() if any(isinstance(layer, bases[kind]) for kind in kinds)}
    assert private == expected
    if private_norms == "auto":
        assert keys == private_keys(plain)


def test_shared_statistics_move_with_every_resolution_and_can_be_frozen() -> None:
    backbone = build_backbone("timm/lcnet_035", 5, 2, private_norms="none").train()
    images = torch.randn(2, 3, 64, 64)
    backbone(images, 0)
    backbone(images, 1)
    assert backbone.at(0).bn1.num_batches_tracked == backbone.at(1).bn1.num_batches_tracked == 2
    backbone.freeze_statistics(True)
    backbone.train()(images, 1)
    assert backbone.at(0).bn1.num_batches_tracked == 2
