"""The compiled backbone: the same numbers, and no new graph for every size that a sub-batch may have."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pipeline.config.schema import BackboneStage, JointStage
from pipeline.models.backbone import compile_backbone
from pipeline.models.cost import measure_costs
from pipeline.training.assembly import equip_for_training
from pipeline.training.objectives import StepBatch, build_objective
from tests.small import COSTS_R, batch_of, small_model
from tests.synthetic import config_of

pytestmark = pytest.mark.chaos

JOINT = JointStage(epochs=1, alpha_gflops=1.5, eta=0.5)
DISTILLATION = BackboneStage(epochs=1, distillation="learned")


def routed(count: int, step: int) -> StepBatch:
    """Return a batch whose images go to random resolutions, different in every step."""
    generator = torch.Generator().manual_seed(step)
    return dataclasses.replace(batch_of(count), gumbel_NR=3 * torch.randn(count, 3, generator=generator))


def test_sub_batches_of_any_size_share_graphs() -> None:
    graphs = []

    def kept(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    compiled, plain = small_model(), small_model()
    compile_backbone(compiled.backbone, backend=kept)
    measure_costs(compiled)  # counting on the network must not prevent its compilation
    counts = []
    for _ in range(2):
        for step, count in enumerate((16, 15, 5, 13, 3, 10)):
            sums, expected = (
                build_objective(model, JOINT, COSTS_R)(routed(count, step)) for model in (compiled, plain)
            )
            torch.testing.assert_close(sums["loss"], expected["loss"], rtol=1e-4, atol=1e-5)
        counts.append(len(graphs))
    assert 6 <= counts[0] == counts[1] < 20, "of 36 passes, each of another size"
    for model in (compiled, plain):
        build_objective(model, DISTILLATION, COSTS_R)(batch_of(16))
    for parameter, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # by an import of torch's compiler
def test_training_compile_gives_the_gradient_of_the_plain_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled, plain = small_model().train(), small_model().train()
    equip_for_training(compiled, config_of(training={"compile": True}))
    for model in (compiled, plain):
        model.static_logits(batch_of(8).images, 2).logsumexp(dim=1).sum().backward()
    assert compiled.backbone._compiled_call_impl is not None
    for (name, parameter), other in zip(compiled.backbone.named_parameters(), plain.backbone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)
