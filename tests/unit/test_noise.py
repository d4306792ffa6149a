import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.training.objectives import gumbel_noise, step_seed


def test_noise_depends_on_seed_epoch_and_sample_only() -> None:
    whole = gumbel_noise(3, 5, torch.arange(100), 3)
    assert torch.equal(whole[[7, 91]], gumbel_noise(3, 5, torch.tensor([7, 91]), 3))
    assert torch.equal(whole[:, :2], gumbel_noise(3, 5, torch.arange(100), 2))
    for other in (gumbel_noise(4, 5, torch.arange(100), 3), gumbel_noise(3, 6, torch.arange(100), 3)):
        assert not torch.isclose(whole, other).any()


def test_noise_is_standard_gumbel_and_independent_over_resolutions() -> None:
    noise = gumbel_noise(0, 0, torch.arange(20000), 3).numpy()
    for column in noise.T:
        assert stats.kstest(column, "gumbel_r").pvalue > 1e-3
    correlation = np.corrcoef(noise.T)
    assert np.abs(correlation - np.eye(3)).max() < 0.03


def test_empty_part_of_a_batch() -> None:
    assert gumbel_noise(0, 0, torch.arange(0), 3).shape == (0, 3)


@pytest.mark.parametrize("other", [(1, 2, 4, 0), (1, 2, 3, 1), (1, 3, 3, 0), (2, 2, 3, 0)])
def test_step_seeds_differ(other: tuple[int, int, int, int]) -> None:
    assert step_seed(*other) != step_seed(1, 2, 3, 0)
    assert 0 <= step_seed(*other) < 2**63
