"""A checkpoint holds the whole state, and a foreign one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.training.checkpoint import OtherRunError, TrainingState, load_model, save_model
from pipeline.training.loop import train
from tests.synthetic import Recorder, config_of, run_of


@pytest.fixture(scope="module")
def states() -> list[TrainingState]:
    """Every checkpoint of a run: three steps an epoch, four epochs."""
    recorder = Recorder()
    train(run_of(config_of(), recorder))
    return recorder.states


def leaves(value: object) -> list[object]:
    """Return the values of a tree of mappings and lists, in order."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in [key, *leaves(item)]]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]


def test_checkpoints_fall_within_epochs_and_at_their_ends(states: list[TrainingState]) -> None:
    assert [state.name for state in states] == [
        "checkpoint_0000_000002_backbone",
        "checkpoint_0001_000000_backbone",
        "checkpoint_0001_000002_backbone",
        "checkpoint_0002_000000_backbone",
        "checkpoint_0002_000002_predictor",
        "checkpoint_0003_000000_predictor",
        "checkpoint_0003_000002_joint",
        "checkpoint_0004_000000_joint",
    ]


@pytest.mark.parametrize("index", [0, 4, 6], ids=["backbone", "predictor", "joint"])
def test_a_saved_state_is_read_back_bit_for_bit(states: list[TrainingState], index: int, tmp_path: Path) -> None:
    state = states[index]
    state.save(tmp_path / "state.pt")
    loaded = TrainingState.load(tmp_path / "state.pt")
    assert loaded.meter["images"] == 16
    assert (loaded.averaged is None) == (state.stage == "backbone")
    for field in TrainingState.__dataclass_fields__:
        for found, expected in zip(leaves(getattr(loaded, field)), leaves(getattr(state, field)), strict=True):
            same = torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected
            assert same, field


def test_a_copy_stays_the_same_while_training_continues(states: list[TrainingState]) -> None:
    state = states[0].copy()
    copied = state.copy()
    weight, momentum = state.model["backbone.network.fc.weight"], state.optimizer["state"][0]["momentum_buffer"]
    before = weight.clone(), momentum.clone()
    weight.zero_()
    momentum.zero_()
    assert torch.equal(copied.model["backbone.network.fc.weight"], before[0])
    assert torch.equal(copied.optimizer["state"][0]["momentum_buffer"], before[1])
    assert before[0].any()
    assert before[1].any()


def test_a_state_of_another_configuration_is_refused_with_the_changed_keys(states: list[TrainingState]) -> None:
    changed = config_of(training={"batch_size": 6, "accumulate": 2})
    with pytest.raises(OtherRunError) as caught:
        train(run_of(changed, Recorder()), states[0])
    message = str(caught.value)
    assert "training.accumulate: 1 -> 2\n" in message
    assert "training.batch_size: 8 -> 6\n" in message
    assert message.count("->") == 2
    assert states[0].name in message


def test_a_state_of_other_data_is_refused_by_the_digest(states: list[TrainingState]) -> None:
    with pytest.raises(OtherRunError, match=f"digest of the prepared data: {states[0].data_digest} -> ffff"):
        states[0].refuse_other(config_of(), "ffff")


def test_free_fields_and_the_path_of_the_data_may_differ(states: list[TrainingState]) -> None:
    config = config_of(
        training={"max_loss": 5.0},
        cluster={"max_failures": 9, "storage": "elsewhere"},
        data={"folder": "/elsewhere"},
        loader={"num_threads": 3},
    )
    states[0].refuse_other(config, run_of(config, Recorder()).manifest.digest)


def test_a_model_is_read_with_its_own_mean_and_std(tmp_path: Path) -> None:
    run = run_of(config_of(), Recorder())
    run.model.mean.copy_(torch.tensor([0.125, 0.25, 0.5]))  # those of another model, from which a stage started
    save_model(tmp_path / "model.pt", run.model, run.config, classes=run.manifest.classes)
    loaded = load_model(tmp_path / "model.pt")
    assert loaded.mean == (0.125, 0.25, 0.5)
    assert loaded.std == tuple(run.model.std.tolist())


def test_a_damaged_or_foreign_file_is_refused(states: list[TrainingState], tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    with pytest.raises(ValueError, match="does not exist"):
        TrainingState.load(path)
    states[0].save(path)
    with pytest.raises(ValueError, match="not a checkpoint of format 1"):
        load_model(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        TrainingState.load(path)
