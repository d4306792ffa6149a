"""One step of each stage against naive formulations that run every image at every resolution."""

import copy
import dataclasses
import math
from collections import Counter

import pytest
import torch
from torch import nn

from pipeline.config.schema import BackboneStage, JointStage, PredictorStage
from pipeline.models.drnet import DRNet
from pipeline.models.norms import ResolutionNorm
from pipeline.training import objectives
from pipeline.training.objectives import Forward, StepBatch, build_objective, sandwich
from pipeline.training.optim import build_optimizer
from tests.small import COSTS_R, batch_of, small_model

JOINT = JointStage(epochs=1, alpha_gflops=1.5, eta=0.5)
KINDS = ("frozen", "all", "routed")
JOINTS = [JOINT.model_copy(update={"norm_statistics": kind}) for kind in KINDS]
STAGES = [
    BackboneStage(epochs=1),
    BackboneStage(epochs=1, distillation="learned"),
    BackboneStage(epochs=1, mixup_alpha=1.0),
    BackboneStage(epochs=1, cutmix_alpha=1.0),
    PredictorStage(epochs=1, alpha_gflops=1.5, eta=1.0),
    *JOINTS,
]


def gradients(model: DRNet) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def naive_joint_loss(model: DRNet, batch: StepBatch, kind: str) -> torch.Tensor:
    """Every image at every resolution with gradient.

    Batch norm uses the running statistics, but for the images that chose the resolution with `routed`: the batch's.
    """
    if kind == "all":
        with torch.no_grad():
            for index in range(3):
                model.backbone.train()(model.normalize(batch.images[model.resolutions[index]]), index)
    model.predictor.train()
    choice_NR = objectives.straight_through_choice(model.predictor_logits(batch.images), batch.gumbel_NR, JOINT.tau)
    chosen_N = choice_NR.detach().argmax(1)
    columns = []
    for index, side in enumerate(model.resolutions):
        mine = chosen_N == index
        valued_NK = model.backbone.eval() and model.static_logits(batch.images, index)
        if mine.sum() >= 2 and kind == "routed":
            model.backbone.train()
            valued_NK = valued_NK.index_copy(
                0, mine.nonzero().squeeze(1), model.static_logits({side: batch.images[side][mine]}, index)
            )
        columns.append(valued_NK)
    logits_NRK = torch.stack(columns, 1)
    mean_cost = (choice_NR * COSTS_R).sum(1).mean()
    penalty = torch.relu((mean_cost - JOINT.alpha) / 3.0)
    output_NK = (choice_NR[:, :, None] * logits_NRK).sum(1)
    return nn.functional.cross_entropy(output_NK, batch.labels_N) + JOINT.eta * penalty


@pytest.mark.parametrize("joint", JOINTS, ids=KINDS)
def test_joint_step_is_exact_against_running_everything_with_gradient(joint: JointStage) -> None:
    model, batch = small_model(), batch_of(16)
    reference = copy.deepcopy(model)
    naive_joint_loss(reference, batch, joint.norm_statistics).backward()
    sums = build_objective(model, joint, COSTS_R)(batch)
    expected = gradients(reference)
    shares = [sums[f"share_{index}"].item() for index in range(3)]
    assert sorted(shares) != shares or min(shares) > 0, "the batch must use several resolutions"
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    for (name, buffer), other in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)


def test_a_joint_step_with_frozen_statistics_leaves_their_bits_and_trains_scale_and_shift() -> None:
    model, batch = small_model(), batch_of(16)
    before = copy.deepcopy(model.backbone.state_dict())
    objective, optimizer = build_objective(model, JOINT, COSTS_R), build_optimizer(model, JOINT)
    for _ in range(2):
        objective(batch)
        optimizer.step()
    moved = {name for name, value in model.backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert not any("running" in name or "num_batches" in name for name in moved)
    assert {name.rpartition(".")[2] for name in moved if ".norms." in name} == {"weight", "bias"}


def test_frozen_statistics_leave_dropout_on() -> None:
    model, batch = small_model(), batch_of(16)
    model.backbone.network.pool = nn.Sequential(model.backbone.network.pool, nn.Dropout(0.5))
    seen: list[tuple[bool, int]] = []
    model.backbone.network.pool[1].register_forward_pre_hook(
        lambda layer, inputs: seen.append((layer.training, len(inputs[0])))
    )
    build_objective(model, JOINT, COSTS_R)(batch)
    assert sum(count for training, count in seen if training) == 16
    assert sum(count for training, count in seen if not training) == 32


@pytest.mark.parametrize("joint", JOINTS, ids=KINDS)
def test_which_images_move_the_statistics_of_a_resolution(joint: JointStage) -> None:
    model, batch = small_model(), batch_of(16)
    with torch.no_grad():
        model.predictor(torch.zeros(2, 3, 32, 32))
        fc = [module for module in model.predictor.modules() if isinstance(module, nn.Linear)][-1]
        fc.weight.zero_()
        fc.bias.copy_(torch.tensor([50.0, -50.0, -50.0]))  # everything chooses resolution 0
    before = copy.deepcopy(model)
    build_objective(model, joint, COSTS_R)(batch)
    norms = [module for module in model.modules() if isinstance(module, ResolutionNorm)]
    old_norms = [module for module in before.modules() if isinstance(module, ResolutionNorm)]
    assert norms
    expected = {"frozen": [False, False, False], "all": [True, True, True], "routed": [True, False, False]}
    for norm, old in zip(norms, old_norms, strict=True):
        pairs = list(zip(norm.norms, old.norms, strict=True))
        moved = [not torch.equal(new.running_mean, before.running_mean) for new, before in pairs]
        counted = [int(new.num_batches_tracked) - int(before.num_batches_tracked) for new, before in pairs]
        assert moved == expected[joint.norm_statistics]
        assert counted == moved, "a batch counts once"


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


@pytest.mark.parametrize("alpha", [0.5, 3.9])
def test_gradient_at_the_predictor_is_that_of_the_papers_loss(alpha: float) -> None:
    """L = L_ce + eta max(0, (E[F] - alpha) / (C_max - C_min)) in loops; 6 of the 16 images are on other ranks."""
    model, batch = small_model(), batch_of(10)
    stage = PredictorStage(epochs=1, alpha_gflops=alpha, eta=0.7, tau=1.5, label_smoothing=0.1)
    seen: list[torch.Tensor] = []
    model.predictor.fc.register_full_backward_hook(lambda _module, _inputs, outputs: seen.append(outputs[0]))
    with torch.no_grad():
        answers = [model.backbone.eval() and model.static_logits(batch.images, index) for index in range(3)]
        y_NRK = torch.stack(answers, dim=1).double()
        predicted = copy.deepcopy(model).predictor.train()(model.normalize(batch.images[model.predictor_size])).double()
    build_objective(model, stage, COSTS_R)(batch)

    costs = COSTS_R.tolist()
    scores_NR = (predicted.log_softmax(1) + batch.gumbel_NR).tolist()
    chosen = [max(range(3), key=scores.__getitem__) for scores in scores_NR]
    mean_cost = sum(costs[index] for index in chosen) / 16
    above = mean_cost > alpha
    assert above == (alpha == 0.5)
    for row, scores in enumerate(scores_NR):
        q_K = y_NRK[row, chosen[row]].softmax(0).tolist()
        target_K = [0.9 * (k == int(batch.labels_N[row])) + 0.1 / 5 for k in range(5)]
        by_choice = [
            (
                sum((q - t) * y for q, t, y in zip(q_K, target_K, y_NRK[row, j].tolist(), strict=True))
                + above * 0.7 * costs[j] / (max(costs) - min(costs))
            )
            / 16
            for j in range(3)
        ]
        powers = [math.exp(score / 1.5) for score in scores]
        r = [power / sum(powers) for power in powers]
        slow = [sum(by_choice[j] * r[j] * ((j == k) - r[k]) / 1.5 for j in range(3)) for k in range(3)]
        assert seen[0][row].tolist() == pytest.approx(slow, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("count", [0, 1])
def test_a_rank_may_hold_no_image_or_one(stage: BackboneStage, count: int) -> None:
    model = small_model()
    sums = build_objective(model, stage, COSTS_R)(batch_of(count))
    assert all(torch.isfinite(value) for value in sums.values())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("count", "num_slices"), [(16, 3), (5, 5), (2, 4), (0, 3)])
def test_a_step_in_slices_is_the_step_on_the_whole_batch(
    stage: BackboneStage, count: int, num_slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Batch norm by running statistics in both: with a slice's own, steps differ by design.
    monkeypatch.setattr(objectives, "MIN_IMAGES_FOR_STATISTICS", 1000)
    whole, sliced = small_model(), small_model()
    torch.manual_seed(4)  # mixtures are drawn for the batch, whatever its slices
    expected = build_objective(whole, stage, COSTS_R)(batch_of(count))
    torch.manual_seed(4)
    sums = build_objective(sliced, stage, COSTS_R)(dataclasses.replace(batch_of(count), num_slices=num_slices))
    assert list(sums) == list(expected)
    for name, value in sums.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    gradient_of = gradients(whole)
    assert count == 0 or any(gradient.any() for gradient in gradient_of.values())
    for name, gradient in gradients(sliced).items():
        torch.testing.assert_close(gradient, gradient_of[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("num_slices", [1, 3])
def test_a_step_on_stored_logits_is_the_step_on_the_live_backbone(num_slices: int) -> None:
    stage, live, stored = PredictorStage(epochs=1, alpha_gflops=1.5, eta=1.0), small_model(), small_model()
    batch = dataclasses.replace(batch_of(16), num_slices=num_slices)
    expected = build_objective(live, stage, COSTS_R)(batch)
    logits_NRK = Forward(small_model(), "float32").frozen_backbone(batch.images)
    only_predictors = {stored.predictor_size: batch.images[stored.predictor_size]}
    known = dataclasses.replace(batch, images=only_predictors, logits_NRK=logits_NRK)
    sums = build_objective(stored, stage, COSTS_R)(known)
    assert list(sums) == list(expected)
    for name, value in sums.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    for parameter, other in zip(stored.predictor.parameters(), live.predictor.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [BackboneStage(epochs=1), PredictorStage(epochs=1, alpha_gflops=1.5), JOINT])
def test_a_step_in_bfloat16_equals_one_in_float32_up_to_rounding(stage: BackboneStage) -> None:
    model, half = small_model(), small_model()
    expected = build_objective(model, stage, COSTS_R)(batch_of(16))["loss"]
    loss = build_objective(half, stage, COSTS_R, "bfloat16")(batch_of(16))["loss"]
    assert loss != expected, "autocast is on"
    torch.testing.assert_close(loss, expected, rtol=3e-2, atol=0)
    flat, flat_half = (torch.cat([value.flatten() for value in gradients(each).values()]) for each in (model, half))
    assert flat_half.dtype == torch.float32
    assert torch.cosine_similarity(flat, flat_half, dim=0) > 0.98


def test_the_backbone_sees_a_slice_at_a_time_and_the_predictor_the_batch() -> None:
    model, seen = small_model(), {"backbone": [], "predictor": []}
    for name, module in (("backbone", model.backbone), ("predictor", model.predictor.stem)):
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(len(inputs[0])))
    build_objective(model, BackboneStage(epochs=1), COSTS_R)(dataclasses.replace(batch_of(16), num_slices=5))
    assert seen == {"backbone": [3] * 12 + [4] * 3, "predictor": []}
    build_objective(model, JOINT, COSTS_R)(dataclasses.replace(batch_of(16), num_slices=5))
    assert max(seen["backbone"]) == 4
    assert seen["predictor"] == [16]


def test_parameter_groups_of_the_optimizer() -> None:
    model = small_model()
    stage = JointStage(epochs=1, alpha_gflops=1.5, predictor_lr_scale=0.1, decay_norm_and_bias=False, weight_decay=0.5)
    build_objective(model, stage, COSTS_R)
    groups = build_optimizer(model, stage).param_groups
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == [(1, 0.5), (1, 0), (0.1, 0.5), (0.1, 0)]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert all((parameter.ndim > 1) == (group["weight_decay"] > 0) for group in groups for parameter in group["params"])


def test_the_sandwich_trains_both_ends_always_and_the_others_equally_often() -> None:
    steps = [sandwich(5, 3, step) for step in range(6)]
    assert all(indices[0] == 0 and indices[-1] == 4 and len(indices) == 3 for indices in steps)
    assert Counter(index for indices in steps for index in indices[1:-1]) == {1: 2, 2: 2, 3: 2}
    assert [sandwich(5, 4, step)[1:-1] for step in range(3)] == [[1, 2], [1, 3], [2, 3]]
    assert sandwich(3, 2, 7) == [0, 2]
    assert sandwich(3, None, 1) == sandwich(3, 3, 1) == sandwich(3, 8, 1) == [0, 1, 2]


@pytest.mark.parametrize("distillation", ["none", "largest"])
def test_a_step_of_some_resolutions_equals_the_naive_sum_over_them(distillation: str) -> None:
    stage = BackboneStage(epochs=1, resolutions_per_step=2, distillation=distillation, distillation_weight=0.7)
    model, batch = small_model(), batch_of(16)
    reference = copy.deepcopy(model)
    sums = build_objective(model, stage, COSTS_R)(batch)

    reference.train()
    large_NK, small_NK = (reference.static_logits(batch.images, index) for index in (0, 2))
    loss = sum(nn.functional.cross_entropy(logits_NK, batch.labels_N) for logits_NK in (large_NK, small_NK))
    if distillation == "largest":
        p_NK, q_NK = large_NK.detach().softmax(1), small_NK.softmax(1)
        loss = loss + 0.7 * (p_NK * (p_NK / q_NK).log()).sum() / 16
    loss.backward()
    assert sums["loss"].item() / 16 == pytest.approx(loss.item(), rel=1e-5)
    assert sums.keys() == {"loss", "accuracy_48", "accuracy_24"}
    expected = gradients(reference)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    norm = next(module for module in model.modules() if isinstance(module, ResolutionNorm))
    assert [int(layer.num_batches_tracked) for layer in norm.norms] == [1, 0, 1]
