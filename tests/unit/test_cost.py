from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from pipeline.config.schema import ModelConfig
from pipeline.models.backbone import build_backbone
from pipeline.models.cost import Costs, count_macs, measure_costs
from pipeline.models.drnet import build_drnet


@pytest.fixture(scope="module")
def resnet50_costs() -> Costs:
    config = ModelConfig.model_validate({"backbone": "resnet50", "resolutions": [224, 192, 168, 112]})
    return measure_costs(build_drnet(config, 100, (0.5,) * 3, (0.25,) * 3))


def test_resnet50_costs_what_the_paper_says(resnet50_costs: Costs):
    assert resnet50_costs.resolutions == (224, 192, 168, 112)
    assert [round(gflops, 2) for gflops in resnet50_costs.backbone_gflops] == [4.09, 3.00, 2.50, 1.08]
    assert resnet50_costs.predictor_gflops == pytest.approx(0.0432, rel=1e-2)


def test_mean_cost_of_a_share_vector(resnet50_costs: Costs):
    backbone, predictor = resnet50_costs.backbone_gflops, resnet50_costs.predictor_gflops
    shares = (0.25, 0, 0.25, 0.5)
    expected = 0.25 * backbone[0] + 0.25 * backbone[2] + 0.5 * backbone[3]
    assert resnet50_costs.mean_gflops(shares, with_predictor=False) == pytest.approx(expected)
    assert resnet50_costs.mean_gflops(shares) == pytest.approx(expected + predictor)
    assert resnet50_costs.min_backbone_gflops == backbone[3]
    assert resnet50_costs.max_backbone_gflops == backbone[0]
    with pytest.raises(ValueError, match="zip"):
        resnet50_costs.mean_gflops((0.5, 0.5))


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 10, 12), 2 * 5 * 6 * 8 * 3 * 9),
        (nn.Conv2d(8, 8, 3, groups=8, padding=1), (1, 8, 4, 4), 16 * 8 * 9),
        (nn.Linear(7, 5), (3, 7), 3 * 7 * 5),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)), (1, 4, 8, 8), 0),
    ],
)
def test_count_against_hand_calculation(layer: nn.Module, shape: tuple[int, ...], macs: int):
    assert count_macs(layer, torch.empty(shape)) == macs


def counted_slowly(network: nn.Module, side: int) -> int:
    """Multiply-adds of convolutions and linear layers from the real shapes of their outputs, layer by layer."""
    counts = []

    def count(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        counts.append(output.numel() * layer.weight[0].numel())

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 3, side, side))
    return sum(counts)


@pytest.mark.parametrize("side", [96, 64])
@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_vit"])
def test_networks_of_timm_cost_what_their_layers_and_their_attention_do(name: str, side: int):
    backbone = build_backbone(f"timm/{name}", 5, 2)
    network = timm.create_model(name, num_classes=5, **({"dynamic_img_size": True} if name == "test_vit" else {}))
    expected = counted_slowly(network, side)
    if name == "test_vit":  # query times key and weights times value, for every pair of tokens
        width = network.get_parameter("cls_token").shape[-1]
        expected += len(network.blocks) * 2 * ((side // 16) ** 2 + 1) ** 2 * width
    assert count_macs(backbone, torch.empty(1, 3, side, side), 1) == expected


def test_counting_changes_nothing():
    torch.manual_seed(0)
    backbone = build_backbone("small_resnet", 5, 2)
    backbone.train()
    backbone.network.blocks[0].eval()
    values = copy.deepcopy(backbone.state_dict())
    identities = {name: id(value) for name, value in (*backbone.named_parameters(), *backbone.named_buffers())}
    flags = [layer.training for layer in backbone.modules()]
    random_state = torch.get_rng_state()

    count_macs(backbone, torch.empty(1, 3, 64, 64), 1)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert [layer.training for layer in backbone.modules()] == flags
    assert all(torch.equal(value, values[name]) for name, value in backbone.state_dict().items())
    after = {name: id(value) for name, value in (*backbone.named_parameters(), *backbone.named_buffers())}
    assert after == identities


def test_counting_that_fails_leaves_the_training_flags():
    backbone = build_backbone("small_resnet", 5, 2).train()
    with pytest.raises(ValueError, match="resolution index 9"):
        count_macs(backbone, torch.empty(1, 3, 64, 64), 9)
    assert backbone.network.training


def test_images_too_small_for_the_network_are_refused():
    config = ModelConfig.model_validate({"backbone": "vgg11_bn", "resolutions": [64, 16], "predictor": {"width": 0.25}})
    with torch.device("meta"):
        model = build_drnet(config, 5, (0.5,) * 3, (0.25,) * 3)
    with pytest.raises(ValueError, match="backbone cannot run on images of 16 px"):
        measure_costs(model)


def test_relative_costs_run_from_the_lowest_to_the_highest():
    assert Costs((96, 64, 32), (0.9, 0.4, 0.1), 0.03).relative == pytest.approx((1, 0.375, 0))
    assert Costs((96,), (0.9,), 0.03).relative == (0,)
