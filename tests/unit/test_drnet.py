from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.config.schema import ModelConfig
from pipeline.models.drnet import DRNet, build_drnet

MEAN, STD = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)


def small_model(mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD, **changes: Any) -> DRNet:
    config = {
        "backbone": "small_resnet",
        "backbone_width": 0.5,
        "resolutions": [48, 32],
        "predictor": {"input_size": 24, "width": 0.25},
    }
    torch.manual_seed(0)
    return build_drnet(ModelConfig.model_validate(config | changes), 5, mean, std)


def pixels(count: int, side: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_normalize_is_the_formula_in_channels_last():
    images = pixels(3, 7)
    before = images.clone()
    normalized = small_model().normalize(images)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    expected = (images.permute(0, 3, 1, 2) / 255.0 - mean) / std
    assert normalized.dtype == torch.float32
    assert normalized.shape == (3, 3, 7, 7)
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normalized.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(images, before)


def test_normalize_gives_the_layout_that_the_weights_have():
    model = small_model()
    model.memory_format = torch.contiguous_format
    normalized = model.normalize(pixels(3, 7))
    assert normalized.is_contiguous()
    assert torch.equal(normalized, small_model().normalize(pixels(3, 7)))


def test_normalize_takes_an_empty_batch_and_a_view():
    model = small_model()
    assert model.normalize(pixels(0, 8)).shape == (0, 3, 8, 8)
    assert torch.equal(model.normalize(pixels(6, 8)[::2]), model.normalize(pixels(6, 8)[::2].clone()))


def test_normalize_follows_the_statistics_of_a_loaded_state():
    source, target = small_model(), small_model(mean=(0.1, 0.1, 0.1), std=(1, 1, 1))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.normalize(pixels(2, 8)), source.normalize(pixels(2, 8)))


def test_each_logits_use_the_image_of_their_size():
    model = small_model().eval()
    images = {side: pixels(4, side) for side in model.sides}
    assert torch.equal(model.predictor_logits(images), model.predictor(model.normalize(images[24])))
    for index, side in enumerate((48, 32)):
        logits_NK = model.static_logits(images, index)
        assert logits_NK.shape == (4, 5)
        assert torch.equal(logits_NK, model.backbone(model.normalize(images[side]), index))


@pytest.mark.parametrize(
    ("resolutions", "predictor_size", "sides"),
    [([48, 32], 24, (48, 32, 24)), ([48, 32], 40, (48, 40, 32)), ([48, 32], 32, (48, 32)), ([32], 64, (64, 32))],
)
def test_sides_are_each_size_once_largest_first(resolutions: list[int], predictor_size: int, sides: tuple[int, ...]):
    model = small_model(resolutions=resolutions, predictor={"input_size": predictor_size, "width": 0.25})
    assert model.sides == sides


def test_the_same_random_state_builds_the_same_model():
    first, second = small_model(), small_model()
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("changes", [{"backbone": "resnet19"}, {"weights": "missing.pt"}])
def test_a_model_that_cannot_be_built_is_refused(changes: dict[str, Any]):
    with pytest.raises(ValueError, match=r"resnet18|missing\.pt"):
        small_model(**changes)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), STD), (MEAN, (0.1, 0, 0.1)), (MEAN, (0.1, 0.1))])
def test_statistics_that_cannot_normalize_are_refused(mean: tuple[float, ...], std: tuple[float, ...]):
    with pytest.raises(ValueError, match="3 values"):
        small_model(mean, std)
