"""Synchronized batch norm in one process; tests/parity/test_ranks.py has the test over ranks."""

import copy

import pytest
import torch
from torch import nn

from pipeline.models.backbone import build_backbone
from pipeline.models.norms import (
    ResolutionNorm,
    SynchronizedBatchNorm,
    has_synchronized_norms,
    synchronize_batch_norms,
)
from tests.small import batch_of, small_model


def test_every_norm_is_replaced_and_the_state_dict_stays() -> None:
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    assert not has_synchronized_norms(model)
    synchronize_batch_norms(model)
    assert has_synchronized_norms(model)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(type(norm) is SynchronizedBatchNorm for norm in norms)
    assert sum(isinstance(module, ResolutionNorm) for module in model.modules()) > 0
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_alone_it_is_a_batch_norm_to_the_last_bit(training: bool) -> None:
    model, batch = small_model().train(training), batch_of(8)
    other = copy.deepcopy(model)
    synchronize_batch_norms(other)
    for index in range(3):
        assert torch.equal(model.static_logits(batch.images, index), other.static_logits(batch.images, index))
    assert torch.equal(model.predictor_logits(batch.images), other.predictor_logits(batch.images))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_settings_and_mode_are_kept() -> None:
    norm = nn.BatchNorm2d(3, eps=1e-3, momentum=None).eval()
    layer = SynchronizedBatchNorm.of(norm)
    assert (layer.num_features, layer.eps, layer.momentum, layer.training) == (3, 1e-3, None, False)
    assert layer.running_mean is norm.running_mean


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["timm/test_efficientnet", "timm/efficientvit_m0"])
def test_it_keeps_the_activation_of_timms_batch_norms_and_takes_one_dimension(name: str, training: bool) -> None:
    """The first network's batch norms hold an activation, and the second one has some after its pooling."""
    plain = build_backbone(name, 5, 2).train(training)
    synchronized, images = copy.deepcopy(plain), torch.randn(4, 3, 64, 64)
    synchronize_batch_norms(synchronized)
    kinds = {type(layer) for layer in synchronized.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {SynchronizedBatchNorm}
    assert torch.equal(synchronized(images, 1), plain(images, 1))
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in synchronized.state_dict().items())


def test_another_kind_of_batch_norm_is_refused() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    with pytest.raises(ValueError, match=r"type Doubled cannot be synchronized\. Set training\.sync_batch_norm=false"):
        SynchronizedBatchNorm.of(Doubled(3))
