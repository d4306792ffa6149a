"""Two ranks make the logit table that one process makes, and train the same predictor on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.training import objectives
from pipeline.training.logit_table import UnfillableTableError
from pipeline.training.loop import train
from tests.ranks import run_ranks
from tests.table_runs import config_of, run_of, write_data

pytestmark = pytest.mark.distributed


def train_predictor(data: Path, tables: Path) -> tuple[dict[str, Tensor], list[dict[str, float]], list[str]]:
    """Train two epochs on a new table; returns the weights, each epoch's values, and messages about the table."""
    # Batch norm by running statistics: with a rank's own, k ranks differ from one process by design.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "MIN_IMAGES_FOR_STATISTICS", 1000)
        run, recorder = run_of(config_of(data, epochs=2), tables)
        train(run)
    return run.model.state_dict(), recorder.values, [line.rpartition("  ")[0] for line in recorder.messages]


def refusal_of(data: Path, tables: Path) -> str:
    """Return the error for a backbone whose logits do not fit float16."""
    run, _ = run_of(config_of(data), tables)
    with torch.no_grad():
        run.model.backbone.network.fc.bias.fill_(1e5)
    with pytest.raises(UnfillableTableError) as error:
        train(run)
    return str(error.value)


def run_rank(rank: int, world_size: int, data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    results = (*train_predictor(data, folder / "of-two"), refusal_of(data, folder / "refused"))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    data = write_data(tmp_path)
    expected_state, expected_values, expected_messages = train_predictor(data, tmp_path / "of-one")
    run_ranks(run_rank, 2, data, tmp_path)
    assert files_of(tmp_path / "of-two") == files_of(tmp_path / "of-one")
    for rank in range(2):
        state, values, messages, refusal = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert messages == expected_messages
        assert "beyond float16 (65504) for sample 0 of train" in refusal, "its chunk was rank 0's alone"
        for name, value in state.items():
            torch.testing.assert_close(value, expected_state[name], rtol=1e-4, atol=1e-6, msg=name)
        for found, expected in zip(values, expected_values, strict=True):
            for name in ("train_loss", "accuracy_routed", "accuracy_48", "gflops_routed"):
                assert found[name] == pytest.approx(expected[name], rel=1e-4), name
