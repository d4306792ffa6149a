"""What the benches of policies compare with, and which runs they train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import policies, variants
from pipeline.models.cost import Costs
from pipeline.policies.route import Images


def images_of(correct_NR: np.ndarray) -> Images:
    """Return images of ResNet-50 at 224, 168 and 112 px, whose networks are equally confident."""
    return Images(
        confidence_NR=np.full(correct_NR.shape, 0.9, np.float32),
        correct_NR=correct_NR,
        predictor_logits_NR=None,
        weights_N=np.ones(len(correct_NR)),
        costs=Costs((224, 168, 112), (4.09, 2.50, 1.08), predictor_gflops=0.0),
        exhausted_NR=np.zeros(correct_NR.shape, bool),
    )


def test_limits_that_no_policy_meets_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "DROP_SPLITS", 2)
    images = images_of(np.random.default_rng(0).random((200, 3)) < 0.8)
    limits = policies.unseen_limits(images.costs)
    assert limits == [share * 4.09 for share in policies.UNSEEN_SHARES[1:]]
    assert len(policies.unseen(images, limits)) == 1 + len(limits)


def test_a_drop_is_measured_from_the_resolution_that_is_best_on_the_fitted_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three equally good resolutions. The best of three on the held-out images would be better by luck."""
    monkeypatch.setattr(policies, "DROP_SPLITS", 40)
    images = images_of(np.random.default_rng(0).random((300, 3)) < 0.7)
    assert policies.exceeded(images, 0.01) == (0, 0)


def test_a_run_without_split_keys_is_trained_again(tmp_path: Path) -> None:
    for name in (variants.COSTS, variants.PREDICTIONS):
        (tmp_path / name).touch()
    assert not variants.is_trained(tmp_path)
    (tmp_path / variants.KEYS).touch()
    assert variants.is_trained(tmp_path)
