"""With one candidate resolution the backbone is torchvision's model, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from pipeline.models.backbone import build_backbone

MODELS = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf")


@pytest.mark.parametrize("name", MODELS)
def test_one_candidate_equals_torchvision(name: str):
    torch.manual_seed(3)
    theirs = torchvision.models.get_model(name, weights=None, num_classes=7).to(memory_format=torch.channels_last)
    torch.manual_seed(3)
    ours = build_backbone(name, 7, 1).to(memory_format=torch.channels_last)
    batch = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1))

    outputs = []
    for forward in (theirs, lambda images: ours(images, 0)):
        torch.manual_seed(5)  # dropout and stochastic depth draw from it
        outputs.append(forward(batch))
        nn.functional.cross_entropy(outputs[-1], torch.tensor([0, 1, 2, 6])).backward()
    assert torch.equal(outputs[0], outputs[1])

    names = [key.replace(".norms.0", "").removeprefix("network.") for key, _ in ours.named_parameters()]
    assert names == [key for key, _ in theirs.named_parameters()]
    for key, own, expected in zip(names, ours.parameters(), theirs.parameters(), strict=True):
        assert own.grad is not None
        assert torch.equal(own.grad, expected.grad), key
    for own, expected in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(own, expected)

    with torch.inference_mode():
        assert torch.equal(ours.eval()(batch, 0), theirs.eval()(batch))


@pytest.mark.parametrize("name", MODELS)
def test_every_candidate_starts_as_torchvisions_model(name: str):
    torch.manual_seed(3)
    theirs = torchvision.models.get_model(name, weights=None, num_classes=7).eval()
    torch.manual_seed(3)
    ours = build_backbone(name, 7, 3).eval()
    batch = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for index in range(3):
            assert torch.equal(ours(batch, index), theirs(batch))
