"""Gumbel noise from a counter-based generator: a pure function of (seed, epoch, sample index, resolution).

A sample's noise therefore depends neither on the number of workers nor on where a run was interrupted.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def gumbel_noise(seed: int, epoch: int, indices_N: Tensor, num_resolutions: int) -> Tensor:
    """Standard Gumbel noise (N, R), float32 on the CPU, for samples `indices_N` in an epoch."""
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.uint64(seed % 2**64)) + np.uint64(epoch))
        sample_N1 = _mix(key + indices_N.cpu().numpy().astype(np.uint64) * _GOLDEN)[:, None]
        bits_NR = _mix(sample_N1 + np.arange(1, num_resolutions + 1, dtype=np.uint64) * _GOLDEN)
    # 53 random bits, moved off 0 and 1 by half a step so that both logarithms are finite.
    uniform_NR = ((bits_NR >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return torch.from_numpy(-np.log(-np.log(uniform_NR))).float()


def step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Seed of torch's own generator (dropout) for one step, so that it needs no saving."""
    with np.errstate(over="ignore"):
        value = np.uint64(seed % 2**64)
        for part in (epoch, step, rank):
            value = _mix(value + _GOLDEN * np.uint64(part + 1))
    return int(value >> np.uint64(1))


def _mix(value: np.ndarray | np.uint64) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    value = np.asarray(value, dtype=np.uint64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
