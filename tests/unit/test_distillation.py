"""Ensemble distillation against a naive step that holds every resolution's graph at once."""

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.schema import BackboneStage
from pipeline.models.drnet import DRNet
from pipeline.training.objectives import BackboneObjective, StepBatch, build_objective, summed_distillation
from pipeline.training.optim import build_optimizer
from tests.small import COSTS_R, batch_of, small_model

LEARNED = BackboneStage(epochs=1, distillation="learned", distillation_weight=0.7, label_smoothing=0.1)
MEAN = LEARNED.model_copy(update={"distillation": "mean"})


def objective_of(model: DRNet, stage: BackboneStage) -> BackboneObjective:
    objective = build_objective(model, stage, COSTS_R)
    assert isinstance(objective, BackboneObjective)
    return objective


def dropout_model() -> DRNet:
    """A model with dropout before the classifier, so that a repeated pass must draw the same masks."""
    model = small_model()
    network = model.backbone.network
    network.fc = nn.Sequential(nn.Dropout(0.5), network.fc)
    return model


def naive_step(model: DRNet, scores_R: Tensor, batch: StepBatch, stage: BackboneStage) -> float:
    """All graphs at once, with explicit sums over classes. Dropout masks are drawn in the order of the resolutions."""
    model.train()
    logits = {index: model.static_logits(batch.images, index) for index in (1, 2, 0)}
    weights_R = scores_R.exp() / scores_R.exp().sum()
    teacher_NK = sum(weights_R[index] * logits[index].detach() for index in range(3))
    assert isinstance(teacher_NK, Tensor)
    total = torch.zeros(())
    for student_NK in logits.values():
        p_NK, q_NK = teacher_NK.detach().softmax(1), student_NK.softmax(1)
        total = total + smoothed_cross_entropy(student_NK, batch.labels_N)
        total = total + stage.distillation_weight * (p_NK * (p_NK.log() - q_NK.log())).sum()
    if stage.distillation == "learned":
        total = total + smoothed_cross_entropy(teacher_NK, batch.labels_N)
    (total / batch.global_size).backward()
    return total.item()


def smoothed_cross_entropy(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    log_q_NK = logits_NK.softmax(1).log()
    own_N = torch.stack([log_q_NK[row, label] for row, label in enumerate(labels_N.tolist())])
    return -(0.9 * own_N.sum() + 0.1 * log_q_NK.mean(1).sum())


def assert_same_gradients(model: DRNet, reference: DRNet) -> None:
    for (name, parameter), other in zip(
        model.backbone.named_parameters(), reference.backbone.parameters(), strict=True
    ):
        assert parameter.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("stage", [MEAN, LEARNED], ids=["mean", "learned"])
def test_a_step_equals_the_naive_one_and_counts_a_batch_once(stage: BackboneStage) -> None:
    model, batch = dropout_model(), batch_of(16)
    reference = copy.deepcopy(model)
    objective = objective_of(model, stage)
    scores_R = torch.tensor([0.5, -0.3, 0.1], requires_grad=stage.distillation == "learned")
    assert objective.ensemble is not None
    with torch.no_grad():
        objective.ensemble.scores_R.copy_(scores_R)

    torch.manual_seed(3)
    expected_loss = naive_step(reference, scores_R, batch, stage)
    torch.manual_seed(3)
    sums = objective(batch)

    assert sums["loss"].item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(model, reference)
    if stage.distillation == "learned":
        torch.testing.assert_close(objective.ensemble.scores_R.grad, scores_R.grad)
    for (name, buffer), other in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)
    tracked = [value for name, value in model.backbone.named_buffers() if name.endswith("num_batches_tracked")]
    assert tracked
    assert all(value == 1 for value in tracked)


def test_the_mean_is_a_learned_ensemble_that_does_not_learn() -> None:
    model, batch = small_model(), batch_of(16)
    objective = objective_of(model, MEAN)
    optimizer = build_optimizer(model, MEAN, objective.own)
    assert len(optimizer.param_groups) == 1
    objective(batch)
    assert objective.ensemble is not None
    assert objective.ensemble.scores_R.grad is None
    logits_NRK = torch.randn(4, 3, 5)
    torch.testing.assert_close(objective.ensemble(logits_NRK), logits_NRK.mean(dim=1))


def test_the_ensemble_is_trained_beside_the_model_and_is_no_part_of_it() -> None:
    model, batch = small_model(), batch_of(16)
    keys = model.state_dict().keys()
    objective = objective_of(model, LEARNED)
    optimizer = build_optimizer(model, LEARNED, objective.own)
    assert optimizer.param_groups[-1]["weight_decay"] == 0
    objective(batch)
    optimizer.step()
    assert model.state_dict().keys() == keys
    (scores_R,) = objective.own.state_dict().values()
    assert scores_R.abs().min() > 0
    assert build_objective(model, BackboneStage(epochs=1), COSTS_R).own.state_dict() == {}


def test_divergence_is_that_of_the_definition_and_zero_for_equal_logits() -> None:
    student_NK, teacher_NK = torch.randn(2, 6, 4).unbind()
    expected = sum(
        p * (p / q).log()
        for row in range(6)
        for p, q in zip(teacher_NK[row].softmax(0), student_NK[row].softmax(0), strict=True)
    )
    assert summed_distillation(student_NK, teacher_NK).item() == pytest.approx(float(expected), rel=1e-5)
    assert summed_distillation(student_NK, student_NK + 3).item() == pytest.approx(0, abs=1e-6)


class PeakBytes(TorchDispatchMode):
    """Measure the peak bytes of tensors that operators create."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._alive = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs: Mapping | None = None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: found for key, found in self._alive.items() if not found[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def test_memory_stays_that_of_the_largest_resolution() -> None:
    batch, peaks = batch_of(16), {}
    for stage in (BackboneStage(epochs=1), LEARNED):
        objective = objective_of(small_model(), stage)
        objective(batch)  # gradients exist from here on
        with PeakBytes() as counter:
            objective(batch)
        peaks[stage.distillation] = counter.peak
    model, scores_R = small_model(), torch.zeros(3)
    naive_step(model, scores_R, batch, MEAN)
    with PeakBytes() as counter:
        naive_step(model, scores_R, batch, MEAN)
    assert peaks["learned"] < 1.1 * peaks["none"]
    assert counter.peak > 1.4 * peaks["none"]
