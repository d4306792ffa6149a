"""Schedules against torch's own and against tables worked out by hand."""

import pytest
import torch

from pipeline.config.load import load_config
from pipeline.config.schema import BackboneStage, JointStage, PredictorStage
from pipeline.training.loop import set_learning_rate
from pipeline.training.optim import build_optimizer, cost_target, learning_rate, temperature
from tests.small import small_model


def test_the_papers_backbone_schedule() -> None:
    stage = BackboneStage(epochs=70, lr=0.1, step_epochs=20, warmup_epochs=3)
    assert learning_rate(stage, 0) == 0
    assert learning_rate(stage, 1.5) == pytest.approx(0.05)
    assert [learning_rate(stage, epoch) for epoch in (3, 19.99, 20, 40, 60, 69.9)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.001, 0.0001, 0.0001]
    )


def test_cosine_falls_from_the_peak_to_zero() -> None:
    stage = BackboneStage(epochs=10, lr=1.0, schedule="cosine", warmup_epochs=2)
    values = [learning_rate(stage, epoch / 10) for epoch in range(20, 101)]
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(stage, 6) == pytest.approx(0.5)
    assert values == sorted(values, reverse=True)


def test_the_papers_joint_stage_has_a_rate_for_each_part() -> None:
    """Zhu et al.: 0.1 for the backbone, a tenth of it for the predictor, both / 10 every 30 of 100 epochs."""
    stage = load_config("imagenet100").stages.joint
    assert stage is not None
    optimizer = build_optimizer(small_model(), stage)
    table = {1: 1 / 3, 3: 1, 29: 1, 30: 0.1, 59: 0.1, 60: 0.01, 89: 0.01, 90: 0.001, 99: 0.001}
    for epoch, factor in table.items():
        set_learning_rate(optimizer, learning_rate(stage, epoch))
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * factor, 0.01 * factor]), epoch


@pytest.mark.parametrize(("epochs", "rise", "steps"), [(10, 3.0, 7), (4, 1.5, 2)])
def test_one_cycle_is_torchs(epochs: int, rise: float, steps: int) -> None:
    """torch counts steps, and its phases end one step early: total and share are set so that they end where ours do."""
    stage = BackboneStage(epochs=epochs, lr=0.3, schedule="one_cycle", warmup_epochs=rise)
    total = epochs * steps
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.3, total_steps=total + 1, pct_start=(rise * steps + 1) / (total + 1), cycle_momentum=False
    )
    for step in range(total + 1):
        assert learning_rate(stage, step / steps) == pytest.approx(reference.get_last_lr()[0], rel=1e-9), step
        optimizer.step()
        if step < total:
            reference.step()


def test_alpha_and_tau_move_linearly_and_stay() -> None:
    stage = JointStage(epochs=10, alpha_gflops=2.0, alpha_start_gflops=4.0, tau=0.5, tau_start=4.5, anneal_epochs=4.0)
    for epoch in range(41):
        done = min(epoch / 16, 1.0)
        assert cost_target(stage, epoch / 4) == pytest.approx(4.0 * (1 - done) + 2.0 * done)
        assert temperature(stage, epoch / 4) == pytest.approx(4.5 * (1 - done) + 0.5 * done)
    assert (cost_target(stage, 4.0), temperature(stage, 9.9)) == (2.0, 0.5)


def test_alpha_and_tau_arrive_at_the_end_of_the_stage_or_never_move() -> None:
    stage = PredictorStage(epochs=8, alpha_gflops=2.0, tau=1.0, tau_start=3.0)
    assert [temperature(stage, epoch) for epoch in (0, 2, 4, 8)] == pytest.approx([3.0, 2.5, 2.0, 1.0])
    assert {cost_target(stage, epoch / 2) for epoch in range(17)} == {2.0}
