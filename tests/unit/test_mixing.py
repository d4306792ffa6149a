"""Mixup and cutmix: the same mixture at every resolution, drawn from torch's generator alone."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.schema import BackboneStage
from pipeline.training.mixing import Mixed, Mixing
from pipeline.training.objectives import build_objective
from tests.small import COSTS_R, batch_of, small_model

SIDES = (48, 32, 24)


def stage_with(mixup: float = 0.0, cutmix: float = 0.0) -> BackboneStage:
    return BackboneStage(epochs=1, mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.1)


def mixed_by(stage: BackboneStage, images: dict[int, Tensor], labels_N: Tensor, seed: int) -> Mixed:
    torch.manual_seed(seed)
    return Mixing(stage)(images, labels_N)


def flat_images() -> dict[int, Tensor]:
    """Image n has the value 10 * n everywhere, so that every pixel identifies its image."""
    values_N = 10 * torch.arange(4, dtype=torch.uint8)
    return {side: values_N.view(4, 1, 1, 1).expand(4, side, side, 3).contiguous() for side in SIDES}


@pytest.mark.parametrize("seed", range(5))
def test_mixup_blends_every_side_with_the_same_share_and_partner(seed: int) -> None:
    batch = batch_of(8)
    before = {side: images.clone() for side, images in batch.images.items()}
    mixed = mixed_by(stage_with(mixup=1.0), dict(batch.images), batch.labels_N, seed)
    assert 0 < mixed.share < 1
    for side, images in mixed.images.items():
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        for row in range(8):
            blend = mixed.share * before[side][row].double() + (1 - mixed.share) * before[side][row - 1].double()
            assert (images[row].double() - blend).abs().max() <= 0.501
        assert torch.equal(batch.images[side], before[side])


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_pastes_the_same_relative_box_at_every_side(seed: int) -> None:
    mixed = mixed_by(stage_with(cutmix=1.0), flat_images(), torch.arange(4), seed)
    edges = {}
    for side, images in mixed.images.items():
        own, partner = 10, 0
        assert set(images[1].unique().tolist()) <= {own, partner}
        pasted = (images[1, :, :, 0] == partner).nonzero()
        low, high = pasted.min(0).values, pasted.max(0).values + 1
        assert len(pasted) == (high - low).prod(), "what is pasted is a box"
        edges[side] = torch.cat([low, high]) / side
        # The share is the remaining area, exact at the side for which the box was drawn.
        tolerance = 0 if side == 48 else 2 / side
        assert abs(1 - len(pasted) / side**2 - mixed.share) <= tolerance + 1e-9
    for side in SIDES[1:]:
        assert (edges[side] - edges[48]).abs().max() <= 0.5 / side + 1e-6


def test_targets_and_dominant_class_follow_the_share() -> None:
    mixed = Mixed({}, torch.tensor([0, 2, 1]), torch.tensor([1, 0, 1]), share=0.3)
    expected = torch.zeros(3, 4)
    for row, (own, partner) in enumerate(zip((0, 2, 1), (1, 0, 1), strict=True)):
        expected[row, own] += 0.3
        expected[row, partner] += 0.7
    torch.testing.assert_close(mixed.targets(4), expected)
    assert mixed.dominant_N.tolist() == [1, 0, 1]
    assert Mixed({}, mixed.labels_N, mixed.partners_N, share=0.6).dominant_N.tolist() == [0, 2, 1]


def test_one_seed_gives_one_mixture_and_both_kinds_take_turns() -> None:
    images, labels_N, stage = flat_images(), torch.arange(4), stage_with(1.0, 1.0)
    first, second = (mixed_by(stage, images, labels_N, seed=5) for _ in range(2))
    assert first.share == second.share
    assert all(torch.equal(first.images[side], second.images[side]) for side in SIDES)
    blended = [
        not set(mixed_by(stage, images, labels_N, seed).images[48][1].unique().tolist()) <= {0, 10}
        for seed in range(20)
    ]
    assert 3 < sum(blended) < 17


def test_a_step_trains_on_both_classes_of_a_mixture() -> None:
    """The cross entropy of mixed targets is the shares' mean of the two classes' cross entropies."""
    model, batch, stage = small_model(), batch_of(16), stage_with(mixup=1.0)
    reference = copy.deepcopy(model).train()
    torch.manual_seed(9)
    sums = build_objective(model, stage, COSTS_R)(batch)
    mixed = mixed_by(stage, {side: batch.images[side] for side in model.resolutions}, batch.labels_N, seed=9)
    total, right = torch.zeros(()), {}
    for index, side in enumerate(model.resolutions):
        logits_NK = reference.static_logits(mixed.images, index)
        for labels_N, share in ((mixed.labels_N, mixed.share), (mixed.partners_N, 1 - mixed.share)):
            total = total + share * nn.functional.cross_entropy(logits_NK, labels_N, label_smoothing=0.1)
        right[side] = (logits_NK.argmax(1) == mixed.dominant_N).sum().item()
    total.backward()
    assert sums["loss"].item() == pytest.approx(16 * total.item(), rel=1e-5)
    assert [sums[f"accuracy_{side}"].item() for side in right] == list(right.values())
    for (name, parameter), other in zip(
        model.backbone.named_parameters(), reference.backbone.parameters(), strict=True
    ):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_mixing_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="both 0"):
        Mixing(stage_with())
