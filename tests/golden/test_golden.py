"""A fixed run's losses stay what they were."""

from __future__ import annotations

import json

import pytest

from tests.golden.curve import FILE, losses

# Other kernels for the same formulas (NCHW, no oneDNN, AVX2, SSE) change a loss by at most 3e-7 of it. Weights that
# start 1e-6 apart change it by 1.2e-6; from 1e-5 on, single ReLUs flip and change it by up to 7e-3. Another formula
# changes it more: with Nesterov momentum, four of the first six losses are outside this tolerance.
RTOL = 1e-3


def test_the_losses_of_a_fixed_run_are_the_golden_ones() -> None:
    golden, curve = json.loads(FILE.read_text()), losses()
    assert {stage: len(values) for stage, values in curve.items()} == {"backbone": 6, "predictor": 3, "joint": 3}
    for stage, values in curve.items():
        assert values == pytest.approx(golden[stage], rel=RTOL), f"{stage}; intended? Run tests.golden.renew"
