"""One step of each stage against naive formulations that run every image at every resolution."""

import copy

import pytest
import torch
from torch import nn

from pipeline.config import BackboneStage, JointStage, PredictorStage
from pipeline.models.drnet import DRNet
from pipeline.models.resolution_norm import ResolutionBatchNorm2d
from pipeline.training import losses
from pipeline.training.stages import StepBatch, build_objective, build_optimizer
from tests.small import COSTS_R, batch_of, small_model

JOINT = JointStage(epochs=1, alpha_gflops=1.5, eta=0.5)


def gradients(model: DRNet) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def naive_joint_loss(model: DRNet, batch: StepBatch) -> torch.Tensor:
    """Every image at every resolution with gradient: trained statistics for those that chose it, running ones else."""
    model.predictor.train()
    choice_NR = losses.straight_through_choice(model.predictor_logits(batch.images), batch.gumbel_NR, JOINT.tau)
    chosen_N = choice_NR.detach().argmax(1)
    columns = []
    for index, side in enumerate(model.resolutions):
        mine = chosen_N == index
        valued_NK = model.backbone.eval() and model.static_logits(batch.images, index)
        if mine.sum() >= 2:
            model.backbone.train()
            valued_NK = valued_NK.index_copy(
                0, mine.nonzero().squeeze(1), model.static_logits({side: batch.images[side][mine]}, index)
            )
        columns.append(valued_NK)
    logits_NRK = torch.stack(columns, 1)
    mean_cost = (choice_NR * COSTS_R).sum(1).mean()
    penalty = torch.relu((mean_cost - JOINT.alpha_gflops) / 3.0)
    output_NK = (choice_NR[:, :, None] * logits_NRK).sum(1)
    return nn.functional.cross_entropy(output_NK, batch.labels_N) + JOINT.eta * penalty


def test_joint_step_is_exact_against_running_everything_with_gradient() -> None:
    model, batch = small_model(), batch_of(16)
    reference = copy.deepcopy(model)
    naive_joint_loss(reference, batch).backward()
    sums = build_objective(model, JOINT, COSTS_R)(batch)
    expected = gradients(reference)
    shares = [sums[f"share_{index}"].item() for index in range(3)]
    assert sorted(shares) != shares or min(shares) > 0, "the batch must use several resolutions for this test to tell"
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    for (name, buffer), other in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)


def test_only_a_resolutions_own_images_move_its_statistics() -> None:
    model, batch = small_model(), batch_of(16)
    with torch.no_grad():
        model.predictor(torch.zeros(2, 3, 32, 32))
        fc = [module for module in model.predictor.modules() if isinstance(module, nn.Linear)][-1]
        fc.weight.zero_()
        fc.bias.copy_(torch.tensor([50.0, -50.0, -50.0]))  # everything chooses resolution 0
    before = copy.deepcopy(model)
    build_objective(model, JOINT, COSTS_R)(batch)
    norms = [module for module in model.modules() if isinstance(module, ResolutionBatchNorm2d)]
    old_norms = [module for module in before.modules() if isinstance(module, ResolutionBatchNorm2d)]
    assert norms
    for norm, old in zip(norms, old_norms, strict=True):
        assert not torch.equal(norm.norms[0].running_mean, old.norms[0].running_mean)
        for index in (1, 2):
            assert torch.equal(norm.norms[index].running_mean, old.norms[index].running_mean)
            assert torch.equal(norm.norms[index].num_batches_tracked, old.norms[index].num_batches_tracked)


def test_backbone_step_sums_the_losses_of_all_resolutions() -> None:
    model, batch = small_model(), batch_of(16)
    reference = copy.deepcopy(model)
    build_objective(model, BackboneStage(epochs=1), COSTS_R)(batch)
    reference.train()
    total = sum(
        nn.functional.cross_entropy(reference.static_logits(batch.images, index), batch.labels_N) for index in range(3)
    )
    assert isinstance(total, torch.Tensor)
    total.backward()
    expected = gradients(reference)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_predictor_step_leaves_the_backbone_as_it_is() -> None:
    model, batch = small_model(), batch_of(16)
    before = copy.deepcopy(model.backbone.state_dict())
    stage = PredictorStage(epochs=1, alpha_gflops=1.5, lr=0.1)
    objective, optimizer = build_objective(model, stage, COSTS_R), build_optimizer(model, stage)
    objective(batch)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.predictor.parameters())


@pytest.mark.parametrize("stage", [BackboneStage(epochs=1), PredictorStage(epochs=1, alpha_gflops=1.5), JOINT])
@pytest.mark.parametrize("count", [0, 1])
def test_a_rank_may_hold_no_image_or_one(stage: BackboneStage, count: int) -> None:
    model = small_model()
    sums = build_objective(model, stage, COSTS_R)(batch_of(count))
    assert all(torch.isfinite(value) for value in sums.values())


def test_groups_of_the_optimiser() -> None:
    model = small_model()
    stage = JointStage(epochs=1, alpha_gflops=1.5, predictor_lr_scale=0.1, decay_norm_and_bias=False, weight_decay=0.5)
    build_objective(model, stage, COSTS_R)
    groups = build_optimizer(model, stage).param_groups
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == [(1, 0.5), (1, 0), (0.1, 0.5), (0.1, 0)]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert all((parameter.ndim > 1) == (group["weight_decay"] > 0) for group in groups for parameter in group["params"])
