"""Both sides of bench step take the same step, and bench step and overhead measure what they claim."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import step as bench_step
from benchmarks.harness import read_events
from benchmarks.overhead import steady_epochs, steady_seconds
from benchmarks.step import BATCH, WORK, naive_step, our_step, predictor
from datasets.prepare.prepare import prepare
from datasets.sources.glyphs import GlyphSettings
from pipeline.config.schema import JointStage
from pipeline.training.checkpoint import TrainingState
from tests.conftest import ROOT
from tests.small import batch_of, small_model


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glyphs")
    settings = GlyphSettings(num_train=70, num_validation=20)
    prepare("glyphs", folder, glyphs=settings, num_processes=1)
    return folder


ROUTED = bench_step.STAGES["joint"].model_copy(update={"norm_statistics": "routed"})
STAGES = {**bench_step.STAGES, "joint, routed statistics": ROUTED}


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_both_sides_end_with_the_same_weights(stage) -> None:
    ours, naive = small_model().to(memory_format=torch.channels_last), small_model()
    before, steps = naive.state_dict(), (our_step(ours, stage), naive_step(naive, stage))
    before = {name: value.clone() for name, value in before.items()}
    # About 5 images choose each resolution: a single image would differ, because batch norm has no statistics for it.
    wanted_NR = nn.functional.one_hot(torch.arange(16) % 3, 3)
    for scale in (3.0, 4.0):
        batch = batch_of(16)
        batch = replace(batch, gumbel_NR=batch.gumbel_NR + scale * wanted_NR)
        for step in steps:
            step(batch)
    state = naive.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-5, msg=name)
    moved = {name.split(".")[0] for name, value in state.items() if not torch.equal(value, before[name])}
    assert moved == {"backbone", "predictor"} if isinstance(stage, JointStage) else {"backbone"}


@pytest.mark.parametrize("shares", [work["shares"] for work in WORK.values() if "shares" in work])
def test_the_joint_stage_is_routed_as_stated(shares: list[int]) -> None:
    chosen_N = bench_step._batch(BATCH, shares).gumbel_NR.argmax(dim=1)
    counts = chosen_N.bincount(minlength=3).tolist()
    for count, share in zip(counts, shares, strict=True):
        assert count == pytest.approx(BATCH * share / sum(shares), abs=1)


MEMORY_OF_STEPS = """
import torch
from benchmarks.step import _measured
from tests.small import batch_of

sizes = iter([100, 100, 60])  # all above 32 MB: below it glibc may reuse memory

def step(_):
    torch.ones(next(sizes) * 250_000)

values = _measured(step, batch_of(2), "memory")
print(*(next(values) for _ in range(3)))
"""


def test_memory_is_the_peak_of_a_step_beyond_the_model() -> None:
    """In a process of its own: in this one, earlier tests have left free memory that a step may reuse."""
    command = [sys.executable, "-c", MEMORY_OF_STEPS]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    first, second, third = map(float, found.stdout.split())
    assert first == pytest.approx(second, abs=5)
    assert second == pytest.approx(100, abs=5)
    assert second - third == pytest.approx(40, abs=5)


@pytest.mark.parametrize("logits", ["table", "live"])
def test_the_predictor_stage_is_measured_in_whole_epochs(logits, glyphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.step.MIN_SECONDS", 1e-9)
    once, *values = (next(side) for side in [predictor("glyphs", str(glyphs), logits, 1)] for _ in range(3))
    assert (once > 0) == (logits == "table")
    assert min(values) > 0


@pytest.mark.distributed
def test_the_loop_runs_under_torchrun(glyphs: Path, tmp_path: Path) -> None:
    stages = {"backbone": 2, "predictor": 2, "joint": 1}
    changed = [f"data.folder={glyphs}", *(f"stages.{name}.epochs={epochs}" for name, epochs in stages.items())]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "benchmarks.overhead", "glyphs", str(tmp_path), *changed]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    events = read_events(tmp_path)
    assert [(event["stage"], event["epoch"]) for event in events] == [
        (name, epoch) for name, epochs in stages.items() for epoch in range(epochs)
    ]
    assert {event["steps"] for event in events} == {2}, "70 images in batches of 64 on both ranks"
    assert [stage for stage, _ in steady_epochs(tmp_path)] == ["backbone", "predictor"]
    assert (
        steady_seconds(tmp_path)
        == events[1]["values"]["train_epoch_seconds"] + events[3]["values"]["train_epoch_seconds"]
    )
    assert TrainingState.load(tmp_path / "state.pt").name == "checkpoint_0005_000000_joint"
