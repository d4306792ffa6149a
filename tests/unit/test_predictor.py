from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from pipeline.config.schema import ModelConfig, PredictorConfig
from pipeline.models.cost import count_macs
from pipeline.models.drnet import build_configured, build_drnet
from pipeline.models.predictor import ARCHITECTURES, Predictor, PredictorShape, build_predictor, predictor_shape


def images(count: int, side: int) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("architecture", "macs"), [(1, 290.2e6), (2, 172.8e6), (3, 43.19e6), (4, 89.92e6)])
def test_cost_at_128_is_that_of_the_papers_table(architecture: int, macs: float):
    """The supplement's table: 0.29, 0.17, 0.04 and 0.09 G; worked out by hand 290, 173, 43 and 89.9 M."""
    counted = count_macs(build_predictor(ARCHITECTURES[architecture], 3), torch.empty(1, 3, 128, 128))
    assert counted == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", [16, 17, 128])
def test_logits_for_any_input_size_and_number_of_candidates(architecture: int, side: int):
    predictor = build_predictor(ARCHITECTURES[architecture], 5, width=0.25)
    assert predictor.train()(images(4, side)).shape == (4, 5)
    assert predictor.eval()(images(1, side)).shape == (1, 5)


@pytest.mark.parametrize(
    ("width", "channels"),
    [(0.01, [8, 8, 8, 8]), (0.25, [16, 32, 64, 128]), (0.3, [16, 40, 80, 152]), (1.0, [64, 128, 256, 512])],
)
def test_width_scales_to_multiples_of_eight(width: float, channels: list[int]):
    predictor = build_predictor(ARCHITECTURES[1], 3, width=width)
    kernels_3x3 = [
        layer for layer in predictor.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)
    ]
    assert [layer.out_channels for layer in kernels_3x3[1::2]] == channels
    assert predictor.fc.in_features == channels[-1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_predictor_prefers_no_candidate(architecture: int):
    torch.manual_seed(0)
    predictor = build_predictor(ARCHITECTURES[architecture], 3).eval()
    with torch.inference_mode():
        probs_NR = predictor(images(8, 64)).softmax(dim=1)
    assert (probs_NR - 1 / 3).abs().max() < 0.12


def test_a_predictor_starts_with_the_shares_that_are_asked_for():
    tree = {"backbone": "small_resnet", "resolutions": [48, 32, 24], "predictor": {"initial_shares": [5, 3, 2]}}
    predictor = build_drnet(ModelConfig.model_validate(tree), 2, (0.5,) * 3, (0.5,) * 3).predictor
    probs_NR = predictor.train()(images(4, 32)).softmax(dim=1)
    torch.testing.assert_close(probs_NR, torch.tensor([[0.5, 0.3, 0.2]]).expand(4, 3))
    probs_NR[:, 0].sum().backward()
    assert predictor.fc.weight.grad is not None
    assert predictor.fc.weight.grad.abs().sum() > 0


def test_every_parameter_gets_a_gradient():
    for architecture in ARCHITECTURES:
        predictor = build_predictor(ARCHITECTURES[architecture], 3, width=0.25).train()
        predictor(images(4, 32)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in predictor.parameters()), architecture


def test_dropout_acts_while_training_only():
    predictor = build_predictor(ARCHITECTURES[3], 3, width=0.25, dropout=0.9).eval()
    assert torch.equal(predictor(images(2, 32)), predictor(images(2, 32)))
    predictor.dropout.train()
    assert not torch.equal(predictor(images(2, 32)), predictor(images(2, 32)))


def test_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="architecture 5 is not one of 1, 2, 3, 4"):
        predictor_shape(5)


def paper_predictor(architecture: int, num_resolutions: int) -> Predictor:
    """Return the supplement's four predictors, written by hand, at a quarter of their width."""

    def convolution(inputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, 16, 7, stride, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()]

    stem = nn.Sequential(*convolution(3, 4 if architecture == 3 else 2), nn.MaxPool2d(3, 2, 1))
    if architecture == 4:
        return Predictor(stem, nn.Sequential(*convolution(16, 2)), 16, num_resolutions, 0.2)
    blocks, inputs = [BasicBlock(16, 16)], 16
    for outputs in (32, 64, 128) if architecture == 1 else (32,):
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))
        blocks.append(BasicBlock(inputs, outputs, 2, shortcut))
        inputs = outputs
    return Predictor(stem, nn.Sequential(*blocks), inputs, num_resolutions, 0.2)


FREE_FORMS = {
    1: {"architecture": 4, "blocks": [1, 1, 1, 1]},
    2: {"architecture": 3, "stem_stride": 2},
    3: {"architecture": 1, "blocks": [1, 1], "kernel": 7, "stem_stride": 4},
    4: {"architecture": 2, "blocks": [0]},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_papers_four_are_points_of_the_family_bit_for_bit(architecture: int):
    torch.manual_seed(3)
    expected = paper_predictor(architecture, 3).eval()
    for tree in ({"architecture": architecture}, FREE_FORMS[architecture]):
        torch.manual_seed(3)
        found = build_configured(PredictorConfig.model_validate({"width": 0.25, **tree}), 3).eval()
        assert found.state_dict().keys() == expected.state_dict().keys()
        for key, value in found.state_dict().items():
            assert torch.equal(value, expected.state_dict()[key]), key
        assert torch.equal(found(images(3, 64)), expected(images(3, 64)))
        assert count_macs(found, images(1, 128)) == count_macs(expected, images(1, 128))


@pytest.mark.parametrize("blocks", [(0,), (0, 2), (2, 0, 1), (3,), (1, 2, 1, 1)])
@pytest.mark.parametrize(("kernel", "stem_stride"), [(3, 1), (5, 2), (7, 4)])
def test_every_point_of_the_family_runs_and_learns(blocks: tuple[int, ...], kernel: int, stem_stride: int):
    predictor = build_predictor(PredictorShape(blocks, kernel, stem_stride), 3, width=0.125).train()
    predictor(images(4, 64)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in predictor.parameters())
    assert sum(isinstance(layer, BasicBlock) for layer in predictor.modules()) == sum(blocks)


def test_cost_grows_with_every_dimension_of_the_family():
    def cost(*shape: Any, width: float = 0.25, side: int = 64) -> int:
        return count_macs(build_predictor(PredictorShape(*shape), 3, width=width), images(1, side))

    base = cost((1, 1), 5, 2)
    assert base < min(cost((2, 1), 5, 2), cost((1, 1, 1), 5, 2), cost((1, 1), 7, 2), cost((1, 1), 5, 1))
    assert base < min(cost((1, 1), 5, 2, width=0.5), cost((1, 1), 5, 2, side=96))


def test_an_impossible_shape_is_refused_with_every_reason():
    with pytest.raises(ValueError, match=r"blocks \[\]: .*; kernel 4: give an odd side; stem_stride 0"):
        PredictorShape((), kernel=4, stem_stride=0)
