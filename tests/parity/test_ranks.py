"""k ranks take the step that one process takes on the whole batch, for every stage and however the batch falls."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.config import BackboneStage, JointStage, PredictorStage
from pipeline.training import distributed, stages
from pipeline.training.metrics import Meter
from pipeline.training.stages import StepBatch, build_objective, build_optimizer, trained_parameters
from tests.small import COSTS_R, batch_of, small_model

# alpha lies within the reachable costs, so E[F] over the global batch decides whether the penalty acts.
STAGES = {
    "backbone": BackboneStage(epochs=1, lr=0.05),
    "predictor": PredictorStage(epochs=1, lr=0.05, alpha_gflops=1.2, eta=1.0),
    "joint": JointStage(epochs=1, lr=0.05, alpha_gflops=1.2, eta=1.0),
}
# Parts of a batch of 5 that ranks hold: one of them none, one of them a single image.
PARTS = {1: [range(5)], 2: [range(4), range(4, 5)], 3: [range(3), range(3), range(3, 5)]}
PARTS[3][1] = range(0)


def steps_of(rank: int, world_size: int) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, float]]]:
    """Two steps of every stage on this rank's part; the weights after them and the meter's means."""
    # Batch norm by running statistics: with a rank's own, k ranks differ from one process by design.
    stages.MIN_IMAGES_FOR_STATISTICS = 1000
    whole = batch_of(5)
    mine = torch.tensor([*PARTS[world_size][rank]], dtype=torch.long)
    batch = StepBatch(
        {side: images[mine] for side, images in whole.images.items()}, whole.labels_N[mine], whole.gumbel_NR[mine], 5
    )
    results = {}
    for name, stage in STAGES.items():
        model, meter = small_model(), Meter()
        objective, optimizer = build_objective(model, stage, COSTS_R), build_optimizer(model, stage)
        for _ in range(2):
            meter.update(objective(batch), batch.global_size)
            distributed.sum_gradients(trained_parameters(optimizer))
            optimizer.step()
            optimizer.zero_grad()
        distributed.average_running_statistics(model)
        results[name] = (model.state_dict(), meter.means())
    return results


def run_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    torch.save(steps_of(rank, world_size), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@functools.cache
def results_of(world_size: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (world_size, folder), nprocs=world_size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one_process(world_size: int, stage: str) -> None:
    (whole,) = results_of(1)
    expected_state, expected_means = whole[stage]
    for result in results_of(world_size):
        state, means = result[stage]
        for name, value in state.items():
            torch.testing.assert_close(value, expected_state[name], rtol=1e-4, atol=1e-6, msg=name)
        assert means == pytest.approx(expected_means, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_the_steps_moved_the_weights(stage: str) -> None:
    (whole,) = results_of(1)
    before = small_model().state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in whole[stage][0].items())


def test_all_ranks_end_with_the_same_bits() -> None:
    first, *others = results_of(3)
    for other in others:
        for stage in STAGES:
            assert all(torch.equal(value, other[stage][0][name]) for name, value in first[stage][0].items())
