from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.models.cost import count_macs
from pipeline.models.predictor import ARCHITECTURES, build_predictor


def images(count: int, side: int) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("architecture", "macs"), [(1, 290.2e6), (2, 172.8e6), (3, 43.19e6), (4, 89.92e6)])
def test_cost_at_128_is_that_of_the_papers_table(architecture: int, macs: float):
    """REFERENCE.md: 0.29, 0.17, 0.04 and 0.09 G; worked out by hand 290, 173, 43 and 89.9 M."""
    counted = count_macs(build_predictor(architecture, 3), torch.empty(1, 3, 128, 128))
    assert counted == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", [16, 17, 128])
def test_logits_for_any_input_size_and_number_of_candidates(architecture: int, side: int):
    predictor = build_predictor(architecture, 5, width=0.25)
    assert predictor.train()(images(4, side)).shape == (4, 5)
    assert predictor.eval()(images(1, side)).shape == (1, 5)


@pytest.mark.parametrize(
    ("width", "channels"),
    [(0.01, [8, 8, 8, 8]), (0.25, [16, 32, 64, 128]), (0.3, [16, 40, 80, 152]), (1.0, [64, 128, 256, 512])],
)
def test_width_scales_to_multiples_of_eight(width: float, channels: list[int]):
    predictor = build_predictor(1, 3, width=width)
    kernels_3x3 = [
        layer for layer in predictor.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)
    ]
    assert [layer.out_channels for layer in kernels_3x3[1::2]] == channels
    assert predictor.fc.in_features == channels[-1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_predictor_prefers_no_candidate(architecture: int):
    torch.manual_seed(0)
    predictor = build_predictor(architecture, 3).eval()
    with torch.inference_mode():
        probs_NR = predictor(images(8, 64)).softmax(dim=1)
    assert (probs_NR - 1 / 3).abs().max() < 0.12


def test_every_parameter_gets_a_gradient():
    for architecture in ARCHITECTURES:
        predictor = build_predictor(architecture, 3, width=0.25).train()
        predictor(images(4, 32)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in predictor.parameters()), architecture


def test_dropout_acts_while_training_only():
    predictor = build_predictor(3, 3, width=0.25, dropout=0.9).eval()
    assert torch.equal(predictor(images(2, 32)), predictor(images(2, 32)))
    predictor.dropout.train()
    assert not torch.equal(predictor(images(2, 32)), predictor(images(2, 32)))


def test_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="architecture 5 is not one of 1, 2, 3, 4"):
        build_predictor(5, 3)
