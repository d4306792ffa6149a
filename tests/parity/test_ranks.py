"""k ranks take the step that one process takes on the whole batch, for every stage and however the batch falls."""

import functools
import math
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.cluster.checkpoints import DamagedCheckpointError, read_state_on_all_ranks
from pipeline.config.load import parse_config
from pipeline.config.schema import BackboneStage, JointStage, PredictorStage
from pipeline.models.norms import synchronize_batch_norms
from pipeline.training import distributed, objectives
from pipeline.training.checkpoint import STATE_FILE, TrainingState
from pipeline.training.distributed import GradientReducer
from pipeline.training.monitoring import DivergedError, DivergenceMonitor, Meter
from pipeline.training.objectives import StepBatch, build_objective
from pipeline.training.optim import MovingAverage, build_optimizer, completion_order
from pipeline.training.run import Progress, costs_of_run, precision_of_run
from tests.ranks import run_ranks
from tests.small import COSTS_R, batch_of, small_model

pytestmark = pytest.mark.distributed

# alpha lies within the reachable costs, so E[F] over the global batch decides whether the penalty acts.
STAGES = {
    "backbone": BackboneStage(epochs=1, lr=0.05),
    "frozen": BackboneStage(epochs=1, lr=0.05, freeze_epochs=1, head_lr_scale=3),
    "distillation": BackboneStage(epochs=1, lr=0.05, distillation="learned"),
    "backbone together": BackboneStage(epochs=1, lr=0.05),
    "distillation together": BackboneStage(epochs=1, lr=0.05, distillation="learned"),
    "predictor": PredictorStage(epochs=1, lr=0.05, alpha_gflops=1.2, eta=1.0),
    "correctness": PredictorStage(epochs=1, lr=0.05, objective="correctness"),
    "joint": JointStage(epochs=1, lr=0.05, alpha_gflops=1.2, eta=1.0),
    "joint all": JointStage(epochs=1, lr=0.05, alpha_gflops=1.2, eta=1.0, norm_statistics="all"),
    "joint routed": JointStage(epochs=1, lr=0.05, alpha_gflops=1.2, eta=1.0, norm_statistics="routed"),
}
RANKS = 3
# How ranks share a batch of 5: one rank has no image. In two slices, the ranks together hold the same images of a slice
# as one process.
PARTS = {1: [[0, 1, 2, 3, 4]], RANKS: [[0, 2, 3], [], [1, 4]]}
# Batch norm with running statistics, or with the batch's over all ranks: with a rank's own, k ranks differ by design.
# With running statistics, k ranks take k slices, and one process takes the whole batch.
NUM_SLICES: dict[str, int | None] = {"running": None, "synchronized": 1, "synchronized, sliced": 2}
BUCKET_BYTES = 16_384
"""Several messages even for the predictor."""
CASES = [f"{stage} {norm}" for stage in STAGES for norm in NUM_SLICES]

States = dict[str, tuple[dict[str, torch.Tensor], dict[str, float]]]


def part_of(rank: int, world_size: int, num_slices: int) -> StepBatch:
    """Return a rank's part of the batch of 5."""
    whole, mine = batch_of(5), torch.tensor(PARTS[world_size][rank], dtype=torch.long)
    images = {side: images[mine] for side, images in whole.images.items()}
    return StepBatch(images, whole.labels_N[mine], whole.gumbel_NR[mine], global_size=5, num_slices=num_slices)


def steps_of(rank: int, world_size: int, norm: str) -> States:
    """Two steps of every stage on this rank's part; the weights after them and the meter's means."""
    objectives.MIN_IMAGES_FOR_STATISTICS = 1000 if norm == "running" else 2
    batch = part_of(rank, world_size, NUM_SLICES[norm] or world_size)
    results = {}
    for name, stage in STAGES.items():
        model, meter = small_model(), Meter()
        if norm != "running":
            synchronize_batch_norms(model)
        objective = build_objective(model, stage, COSTS_R, backward="together" if "together" in name else "apart")
        optimizer, averaged = build_optimizer(model, stage, objective.own), MovingAverage(model, 0.5)
        with GradientReducer(*completion_order(model, objective.own), bucket_bytes=BUCKET_BYTES) as reducer:
            for _ in range(2):
                sums = objective(batch, reducer.last_pass)
                meter.update(sums, batch.global_size)
                loss = reducer.finish(sums["loss"])
                optimizer.step()
                optimizer.zero_grad()
                averaged.update_parameters(model)
        distributed.average_running_statistics(model)
        distributed.average_running_statistics(averaged.module)
        state = model.state_dict() | objective.own.state_dict()
        state |= {f"averaged.{name}": value for name, value in averaged.module.state_dict().items()}
        results[f"{name} {norm}"] = (state, meter.means() | {"last_loss": loss.item()})
    return results


def messages_of(rank: int, world_size: int) -> dict[str, list[int]]:
    """Return how many messages have left whenever a backward pass reaches the first layer.

    There, the last pass waits until all ranks have the sum of the first message.
    """
    found = {}
    for name in ("backbone", "backbone together", "joint"):
        model, counts = small_model(), []
        objective = build_objective(model, STAGES[name], COSTS_R, backward=name.partition(" ")[2] or "apart")
        with GradientReducer(*completion_order(model, objective.own), bucket_bytes=BUCKET_BYTES) as reducer:

            def reached(gradient: torch.Tensor, reducer=reducer, counts=counts) -> None:
                counts.append(reducer._num_sent)
                if reducer._num_sent:
                    reducer._early[0].sent.result(60)

            def watch(layer: nn.Module, inputs: tuple, output: torch.Tensor, reached=reached) -> None:
                if output.requires_grad:
                    output.register_hook(reached)

            stem = model.backbone.network.stem
            assert isinstance(stem, nn.Sequential)
            stem[0].register_forward_hook(watch)
            reducer.finish(objective(part_of(rank, world_size, 1), reducer.last_pass)["loss"])
        found[name] = counts
    return found


def rounded_of(rank: int, world_size: int) -> tuple[torch.Tensor, ...]:
    """Return gradients of an early and a late parameter before and after they are summed as bfloat16."""
    torch.manual_seed(rank)
    early, late = (nn.Parameter(torch.zeros(33)) for _ in range(2))
    gradients = [torch.randn(33), torch.randn(33)]
    early.grad, late.grad = (gradient.clone() for gradient in gradients)
    with GradientReducer([early], [late], wire=torch.bfloat16) as reducer:
        loss = reducer.finish(torch.tensor(1 / 3))
    return (*gradients, early.grad, late.grad, loss)


def divergence_of(rank: int, world_size: int) -> str:
    """Return a rank's error when the loss of the last rank is NaN in the second step."""
    watch = DivergenceMonitor(max_loss=None, last_checkpoint="checkpoint_x")
    for step in (1, 2, 3):
        loss = torch.tensor(math.nan if (step, rank) == (2, world_size - 1) else 1.0)
        with GradientReducer([]) as reducer:
            total = reducer.finish(loss)
        watch.step(Progress("joint", 0, 1, 7, step, 9), total, torch.tensor(1.0), torch.tensor([10 * step + rank]))
    try:
        watch.check()
    except DivergedError as error:
        return str(error)
    return "nothing"


def costs_on(folder: str) -> list[float]:
    """Return the milliseconds that this rank trains with; one rank measures them."""
    tree = {"name": "ranks", "cost": "milliseconds", "cost_batch_size": 2, "stages": {"backbone": {"epochs": 1}}}
    config = parse_config(tree | {"data": {"dataset": "glyphs", "folder": folder}})
    costs = costs_of_run(small_model(), config, Path(folder) / "latency.json", resumed=False)
    return [*costs.backbone, costs.predictor]


def precision_on(rank: int, folder: str) -> list[str]:
    """Return the precision that this rank trains with, and the one it resumes with; rank 1's CPU lacks bfloat16."""
    tree = {"name": "ranks", "training": {"precision": "auto"}, "stages": {"backbone": {"epochs": 1}}}
    config = parse_config(tree | {"data": {"dataset": "glyphs", "folder": folder}})
    chosen, cpuinfo = [], Path(folder) / f"cpuinfo-{rank}"
    for lacking in (1, None):
        cpuinfo.write_text("flags: avx2" if rank == lacking else "flags: amx_bf16")
        found = precision_of_run(config, torch.device("cpu"), Path(folder) / "precision.json", cpuinfo=cpuinfo)
        chosen.append(str(found))
    return chosen


def damage_on(rank: int, folder: str) -> str:
    """Return a rank's error when only rank 0 finds the checkpoint in its storage."""
    storage = Path(folder) / f"storage-{rank}"
    storage.mkdir()
    if rank == 0:
        tree = {"name": "ranks", "stages": {"backbone": {"epochs": 1}}}
        config = parse_config(tree | {"data": {"dataset": "glyphs", "folder": folder}})
        TrainingState.finished(small_model(), config, "digest").save(storage / STATE_FILE)
    try:
        return f"read {read_state_on_all_ranks(storage).name}"
    except DamagedCheckpointError as error:
        return str(error)


def run_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    results: dict = {case: result for norm in NUM_SLICES for case, result in steps_of(rank, world_size, norm).items()}
    results |= {
        "precision": precision_on(rank, folder),
        "divergence": divergence_of(rank, world_size),
        "damage": damage_on(rank, folder),
        "milliseconds": costs_on(folder),
        "messages": messages_of(rank, world_size),
        "rounded": rounded_of(rank, world_size),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _plain(name: str) -> str:
    """Return the model's name for an entry of the moving average."""
    return name.removeprefix("averaged.")


@functools.cache
def results_of(world_size: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(run_rank, world_size, folder)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_one_process(case: str) -> None:
    (whole,) = results_of(1)
    expected_state, expected_means = whole[case]
    for result in results_of(RANKS):
        state, means = result[case]
        for name, value in state.items():
            torch.testing.assert_close(value, expected_state[name], rtol=1e-4, atol=1e-6, msg=f"{case}: {name}")
        assert means == pytest.approx(expected_means, rel=1e-4)


def test_a_checkpoint_that_one_rank_cannot_read_is_refused_on_all() -> None:
    assert results_of(1)[0]["damage"].startswith("read checkpoint_")
    (said,) = {result["damage"] for result in results_of(RANKS)}
    assert "storage-1/state.pt does not exist" in said


@pytest.mark.parametrize("case", CASES)
def test_the_steps_moved_the_weights(case: str) -> None:
    (whole,) = results_of(1)
    before = small_model().state_dict() | {"scores_R": torch.zeros(3)}
    moved = {name for name, value in whole[case][0].items() if not torch.equal(value, before[_plain(name)])}
    assert any(name.endswith("weight") for name in moved)
    assert any(name.endswith("running_var") for name in moved) == ("synchronized" in case and "frozen" not in case)
    assert ("scores_R" in moved) == case.startswith("distillation")


def test_a_frozen_backbone_keeps_its_bits_on_any_number_of_ranks() -> None:
    """The key of a logit table depends on them."""
    before = small_model().state_dict()
    for result in (*results_of(1), *results_of(RANKS)):
        for norm in NUM_SLICES:
            state, _ = result[f"predictor {norm}"]
            frozen = [name for name in state if _plain(name).startswith("backbone.")]
            assert all(torch.equal(state[name], before[_plain(name)]) for name in frozen)
            assert len(frozen) == 2 * sum(name.startswith("backbone.") for name in before)


def test_frozen_statistics_keep_their_bits_on_any_number_of_ranks() -> None:
    before = small_model().state_dict()
    for result in (*results_of(1), *results_of(RANKS)):
        for norm in NUM_SLICES:
            state, _ = result[f"joint {norm}"]
            frozen = [name for name in before if name.startswith("backbone.") and "running" in name]
            assert frozen
            assert all(torch.equal(state[name], before[name]) for name in frozen)
            assert all(torch.equal(state[f"averaged.{name}"], before[name]) for name in frozen)


def test_all_ranks_end_with_the_same_bits() -> None:
    first, *others = results_of(RANKS)
    for other in others:
        for case in CASES:
            assert all(torch.equal(value, other[case][0][name]) for name, value in first[case][0].items())


def test_messages_leave_before_the_last_backward_pass_ends() -> None:
    for result in results_of(RANKS):
        smaller, middle, largest = result["messages"]["backbone"]
        assert smaller == middle == 0, "these passes are not the last"
        assert largest > 0
        assert len(result["messages"]["backbone together"]) == 3
        # All resolutions go through a layer before any goes through the one before it.
        assert min(result["messages"]["backbone together"]) > 0
        assert min(result["messages"]["joint"]) > 0


def test_bfloat16_messages_are_summed_in_float32() -> None:
    early, late, summed, late_summed, loss = zip(*(result["rounded"] for result in results_of(RANKS)), strict=True)
    expected = torch.stack([gradient.bfloat16().float() for gradient in early]).sum(dim=0).bfloat16().float()
    for rank in range(RANKS):
        assert torch.equal(summed[rank], expected)
        torch.testing.assert_close(late_summed[rank], torch.stack(late).sum(dim=0))
        torch.testing.assert_close(loss[rank], torch.tensor(RANKS / 3))


def test_all_ranks_have_the_same_milliseconds_to_the_bit() -> None:
    first, *others = (result["milliseconds"] for result in results_of(RANKS))
    assert min(first) > 0
    assert others == [first] * (RANKS - 1)


@pytest.mark.parametrize(
    ("world_size", "chosen"),
    [(1, "bfloat16, because the CPU has amx_bf16"), (RANKS, "float32, because the CPU has no bfloat16 arithmetic")],
)
def test_all_ranks_have_the_precision_that_every_device_computes_and_keep_it(world_size: int, chosen: str) -> None:
    assert [result["precision"] for result in results_of(world_size)] == world_size * [[chosen, chosen]]


@pytest.mark.parametrize("world_size", [1, RANKS])
def test_all_ranks_stop_at_the_step_at_which_one_diverged(world_size: int) -> None:
    first, *others = (result["divergence"] for result in results_of(world_size))
    assert "stage joint, epoch 1 of 1, step 2 of 9: loss nan, gradient norm 1." in first
    assert f"those at {[20, 21, 22][:world_size]} of the training data" in first
    assert "checkpoint_x" in first
    assert others == [first] * (world_size - 1)
