"""docs/scaling.md: the constants that this code determines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.namespaces import sh
from benchmarks.network import APART, GRADIENT_BYTES, PLAN_RATE, TOGETHER, plan, step_seconds
from pipeline.config.load import load_config
from pipeline.models.cost import measure_costs
from pipeline.models.drnet import DRNet, build_drnet
from pipeline.training.checkpoint import TrainingState
from pipeline.training.logit_table import logits_bytes
from pipeline.training.objectives import build_objective
from pipeline.training.optim import build_optimizer, trained_parameters

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text()
CONFIG = load_config("imagenet100")


@pytest.fixture(scope="module")
def model() -> DRNet:
    return build_drnet(CONFIG.model, 1000, (0.5,) * 3, (0.25,) * 3)


def test_gradients_and_checkpoint(model: DRNet, tmp_path: Path) -> None:
    stage = CONFIG.stages.backbone
    assert stage is not None
    optimizer = build_optimizer(model, stage, build_objective(model, stage, torch.ones(3), "float32").own)
    parameters = list(trained_parameters(optimizer))
    num_bytes = sum(4 * parameter.numel() for parameter in parameters)
    assert num_bytes == GRADIENT_BYTES
    assert f"| {num_bytes:,} bytes |" in PAGE
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = TrainingState("backbone", 1, 0, model.state_dict(), optimizer.state_dict(), {}, None, {}, {}, "")
    state.save(tmp_path / "state.pt")
    assert f"| {(tmp_path / 'state.pt').stat().st_size / 1e6:.1f} MB |" in PAGE


def test_costs(model: DRNet) -> None:
    costs = measure_costs(model).backbone_gflops
    assert f"| {', '.join(f'{gflops:.3f}' for gflops in costs)} GFLOPs |" in PAGE
    rate = 2470 * 3 * costs[0] / (3 * sum(costs))
    assert f"| {rate:,.0f} | {rate / 1030:.1f} |" in PAGE
    assert round(rate) == PLAN_RATE
    assert pytest.approx(2 * costs[0] / (3 * sum(costs)), abs=1e-3) == APART
    for hidden in (APART, TOGETHER):
        assert f"| {100 * hidden:.0f} % |" in PAGE
    for kind, spent in (("largest`", 3 * sum(costs)), ("mean` or `learned`", 3 * sum(costs) + sum(costs[1:]))):
        last = f"2 x {costs[1]:.3f} of {spent:.1f} | {200 * costs[1] / spent:.0f} % |"
        assert f"| backbone, `apart`, `distillation: {kind} | the second largest: {last}" in PAGE


def test_logits() -> None:
    assert f"| {logits_bytes(1_281_167, 3, 1000) / 1e9:.1f} GB |" in PAGE


def test_steps() -> None:
    assert "\n".join(plan()) in PAGE
    assert step_seconds(compute=3.0, hidden=1.0, reduce=0.5) == 3.0
    assert step_seconds(compute=3.0, hidden=1.0, reduce=1.5) == 3.5


def test_a_machine_without_namespaces_is_refused_with_a_reason() -> None:
    with pytest.raises(ValueError, match=r"`no-such-ip link` failed: .*no-such-ip.*need root .* iproute2"):
        sh("no-such-ip link")
