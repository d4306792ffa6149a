"""Strided 1x1 convolutions of few channels: the same layer without the kernel that corrupts memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.layers import StdConv2d
from torch import nn
from torchvision.models.regnet import BlockParams, RegNet

from pipeline.models.backbone import NarrowProjection, avoid_unsafe_projections, build_backbone
from pipeline.models.cost import count_macs
from pipeline.models.norms import fold_batch_norms
from pipeline.models.predictor import build_predictor, predictor_shape

ROOT = Path(__file__).resolve().parents[2]

# Trains on two threads; where the kernel is used, the process dies within its first steps.
TRAINING = """
import torch
from pipeline.models.backbone import build_backbone
from pipeline.models.predictor import build_predictor, predictor_shape

torch.set_num_threads(2)
networks = [
    (lambda backbone: lambda images: backbone(images, 0))(build_backbone("small_resnet", 5, 1, width=0.5)),
    build_predictor(predictor_shape(2), 3, width=0.125),
]
for network, side in zip(networks, (32, 64)):
    for _ in range(20):
        images = torch.randn(7, 3, side, side).to(memory_format=torch.channels_last)
        network(images).square().sum().backward()
print("lived")
"""


def test_narrow_networks_train_on_two_threads() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", TRAINING], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "lived\n"), done.stderr[-500:]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("side", [16, 9, 1])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_narrow_projection_is_the_convolution(memory_format: torch.memory_format, side: int, groups: int) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 12, 1, stride=(2, 3), groups=groups).to(memory_format=memory_format)
    ours = NarrowProjection.of(plain)
    assert ours.weight is plain.weight
    assert list(ours.state_dict()) == list(plain.state_dict())
    outputs, gradients = [], []
    for layer in (plain, ours):
        images = torch.randn(4, 8, side, side, generator=torch.Generator().manual_seed(1))
        images = images.to(memory_format=memory_format).requires_grad_()
        outputs.append(layer(images))
        outputs[-1].square().sum().backward()
        gradients.append((images.grad, plain.weight.grad.clone(), plain.bias.grad.clone()))
        plain.zero_grad()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
    batch = torch.zeros(1, 8, side, side)
    assert count_macs(ours, batch) == count_macs(plain, batch)


def test_only_unsafe_convolutions_are_replaced() -> None:
    network = nn.Sequential(
        nn.Conv2d(8, 16, 1, stride=2),
        nn.Conv2d(15, 16, 1, stride=(1, 2)),
        nn.Conv2d(16, 16, 1, stride=2),
        nn.Conv2d(8, 16, 1),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.Conv2d(8, 16, 1, stride=2, padding=1),
    )
    before, state = network.state_dict(), torch.get_rng_state()
    avoid_unsafe_projections(network)
    assert torch.equal(torch.get_rng_state(), state)
    replaced = [isinstance(layer, NarrowProjection) for layer in network]
    assert replaced == [True, True, False, False, False, False]
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_narrow_convolution_of_another_kind_is_not_replaced_silently() -> None:
    with pytest.raises(ValueError, match="strided 1x1 StdConv2d of 8 input channels"):
        avoid_unsafe_projections(nn.Sequential(StdConv2d(8, 16, 1, stride=2)))


def narrow_networks() -> list[nn.Module]:
    shapes = [predictor_shape(architecture) for architecture in (1, 2, 3, 4)]
    backbones = [build_backbone("small_resnet", 5, 2, width=width) for width in (0.25, 0.5)]
    return [*backbones, *(build_predictor(shape, 3, width=width) for shape in shapes for width in (0.0625, 0.125))]


def test_no_network_of_ours_keeps_one_at_a_small_width() -> None:
    for network in narrow_networks():
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.stride != (1, 1):
                assert isinstance(layer, NarrowProjection) == (layer.in_channels < 16)


def test_the_projections_of_a_narrow_network_of_torchvision_are_replaced() -> None:
    shape = BlockParams(
        depths=[1, 1], widths=[8, 16], group_widths=[8, 8], bottleneck_multipliers=[1.0] * 2, strides=[2] * 2
    )
    network = RegNet(shape, num_classes=5, stem_width=12).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = network(images)
    avoid_unsafe_projections(network)
    assert [layer.in_channels for layer in network.modules() if isinstance(layer, NarrowProjection)] == [12, 8]
    torch.testing.assert_close(network(images), expected)


def test_a_narrow_network_exports_with_a_dynamic_batch_and_folded_batch_norms() -> None:
    network = build_backbone("small_resnet", 5, 1, width=0.5).at(0).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            layer.running_mean.normal_(0, 0.1)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(network, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    assert fold_batch_norms(program) == sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(images), network(images), rtol=1e-4, atol=1e-5)
