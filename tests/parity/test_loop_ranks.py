"""The loop over k ranks is the loop in one process: gradients are summed, then clipped, then move the weights."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.models.norms import synchronize_batch_norms
from pipeline.training.loop import train
from tests.ranks import run_ranks
from tests.synthetic import Recorder, config_of, run_of, without_timings

pytestmark = pytest.mark.distributed

ROUTED = {"epochs": 1, "lr": 0.02, "alpha_gflops": 0.0006, "eta": 0.5, "clip_grad_norm": 0.1}
STAGES = {
    "backbone": {"epochs": 1, "lr": 0.02, "distillation": "learned", "clip_grad_norm": 0.1},
    "predictor": ROUTED | {"logits": "live"},
    "joint": ROUTED,
}


def run_rank(rank: int, world_size: int, folder: str, stages: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    predictor = {"input_size": 24, "width": 0.125, "dropout": 0.0}  # ranks draw dropout of their own
    config = config_of(stages=stages, model={"predictor": predictor}, training={"checkpoint_steps": None})
    recorder = Recorder()
    run = run_of(config, recorder)
    synchronize_batch_norms(run.model)
    train(run)
    values = [without_timings(values) for values in recorder.values]
    torch.save((run.model.state_dict(), recorder.losses, values), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@functools.cache
def results_of(world_size: int, clipped: bool = True) -> list[tuple]:
    stages = {name: stage | ({} if clipped else {"clip_grad_norm": None}) for name, stage in STAGES.items()}
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(run_rank, world_size, folder, stages)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def test_two_ranks_end_as_one_process() -> None:
    ((expected, losses, values),) = results_of(1)
    assert expected["predictor.offset_R"].any()
    for state, other_losses, other_values in results_of(2):
        assert other_losses == pytest.approx(losses, rel=1e-3)
        for value, other in zip(values, other_values, strict=True):
            assert other == pytest.approx(value, rel=1e-3)
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_the_gradient_was_large_enough_to_be_clipped() -> None:
    ((clipped, *_),), ((free, *_),) = results_of(1), results_of(1, clipped=False)
    assert any(not torch.allclose(value, free[name], rtol=1e-2, atol=1e-3) for name, value in clipped.items())
