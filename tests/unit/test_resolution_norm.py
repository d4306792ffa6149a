from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from pipeline.models.norms import (
    ResolutionNorm,
    keep_resolution,
    kept_statistics,
    make_resolution_aware,
)


def select(layers: list[ResolutionNorm], index: int) -> None:
    for layer in layers:
        layer.active = index


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, eps=1e-3, momentum=0.3),
        nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)),
    )


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_private_statistics_adapt_at_least_as_fast_as_torchs_default():
    """torchvision's MnasNet has a momentum of 0.0003: a short training would leave the statistics of 224 px."""
    for num_copies, expected in ((2, 0.1), (1, 0.0003)):
        layer = ResolutionNorm(nn.BatchNorm2d(4, momentum=0.0003), num_copies)
        assert [norm.momentum for norm in layer.norms] == [expected] * num_copies
    assert [norm.momentum for norm in ResolutionNorm(nn.BatchNorm2d(4, momentum=None), 2).norms] == [None, None]


def test_copies_start_from_the_values_and_settings_of_the_norm_they_replace():
    module = network()
    with torch.no_grad():
        module[1].weight.uniform_()
        module[1].running_mean.uniform_()
    original = copy.deepcopy(module[1])
    make_resolution_aware(module, 3)
    assert isinstance(module[1], ResolutionNorm)
    assert isinstance(module[2][2], ResolutionNorm)
    for norm in module[1].norms:
        assert (norm.eps, norm.momentum) == (1e-3, 0.3)
        for name, value in original.state_dict().items():
            assert torch.equal(norm.state_dict()[name], value)


def test_only_the_active_copy_moves_and_gets_gradients():
    module = network()
    layers = make_resolution_aware(module, 3)
    before = [copy.deepcopy(layer.norms.state_dict()) for layer in layers]
    select(layers, 1)
    module(images(4, 3, 8, 8)).square().sum().backward()
    for layer, old in zip(layers, before, strict=True):
        for name, value in layer.norms.state_dict().items():
            if "running" in name or "num_batches" in name:
                assert torch.equal(value, old[name]) != name.startswith("1."), name
        assert [norm.weight.grad is not None for norm in layer.norms] == [False, True, False]


def test_statistics_of_each_resolution_equal_those_of_a_network_that_saw_this_resolution_alone():
    aware, alone = network(), None
    alone = [copy.deepcopy(aware) for _ in range(2)]
    layers = make_resolution_aware(aware, 2)
    for step in range(3):
        for index, side in enumerate((8, 6)):
            batch = images(4, 3, side, side, seed=10 * step + index)
            select(layers, index)
            assert torch.equal(aware(batch), alone[index](batch))
    for index in range(2):
        kept = copy.deepcopy(aware)
        keep_resolution(kept, index)
        for (name, value), expected in zip(kept.state_dict().items(), alone[index].state_dict().values(), strict=True):
            assert torch.equal(value, expected), name


def test_running_statistics_follow_the_formula_from_a_resolutions_own_images_alone():
    """m <- (1 - momentum) m + momentum mean, v <- ... with the variance over n - 1, channel by channel in loops."""
    layer = ResolutionNorm(nn.BatchNorm2d(2, momentum=0.3), 2)
    mean, variance = [[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]
    for step, index in enumerate((0, 1, 0)):
        layer.active = index
        features = 1 + 2 * images(3, 2, 4 - index, 4 - index, seed=step)
        layer(features)
        for channel in range(2):
            values = [float(value) for value in features[:, channel].flatten()]
            batch_mean = sum(values) / len(values)
            batch_variance = sum((value - batch_mean) ** 2 for value in values) / (len(values) - 1)
            mean[index][channel] = 0.7 * mean[index][channel] + 0.3 * batch_mean
            variance[index][channel] = 0.7 * variance[index][channel] + 0.3 * batch_variance
    for index, norm in enumerate(layer.norms):
        assert norm.running_mean.tolist() == pytest.approx(mean[index], rel=1e-5)
        assert norm.running_var.tolist() == pytest.approx(variance[index], rel=1e-5)
        assert norm.num_batches_tracked == (2, 1)[index]


def test_kept_statistics_normalize_with_the_batch_and_stay():
    module = network()
    make_resolution_aware(module, 2)
    reference, batch = copy.deepcopy(module), images(4, 3, 8, 8)
    before = copy.deepcopy(module.state_dict())
    with kept_statistics(module):
        again = module(batch)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(again, reference(batch))
    module(batch)
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in module.state_dict().items())


def test_a_frozen_layer_keeps_its_statistics_and_its_dropout_drops():
    norm = BatchNormAct2d(3, act_layer=nn.ReLU, drop_layer=nn.Dropout)
    layer, batch = ResolutionNorm(norm, 2), images(4, 3, 8, 8)
    layer.frozen = True
    layer.train()
    torch.manual_seed(0)
    expected = nn.functional.dropout(batch / (1 + norm.eps) ** 0.5).relu()
    torch.manual_seed(0)
    torch.testing.assert_close(layer(batch), expected)
    assert norm.num_batches_tracked == 0
    layer.frozen = False
    layer.train()(batch)
    assert norm.num_batches_tracked == 1


def test_a_norm_used_in_two_places_stays_one_norm():
    shared = nn.BatchNorm2d(3)
    module = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    assert len(make_resolution_aware(module, 2)) == 1
    assert module["a"][0] is module["b"][0]


def test_channels_last_survives():
    module = network().to(memory_format=torch.channels_last)
    make_resolution_aware(module, 2)
    outputs = module(images(2, 3, 8, 8).to(memory_format=torch.channels_last))
    assert outputs.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("module", "count", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 1)), 2, "no norm layer"),
        (network(), 0, "at least 1"),
        (nn.Sequential(ResolutionNorm(nn.BatchNorm2d(3), 2)), 2, "already"),
    ],
)
def test_modules_that_cannot_be_resolution_aware_are_refused(module: nn.Module, count: int, message: str):
    with pytest.raises(ValueError, match=message):
        make_resolution_aware(module, count)
