"""Which model a run keeps: the one from before the joint stage, or the one from after it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.cluster.driver import _collect
from pipeline.cluster.worker import PREDICTIONS
from pipeline.config.run_folder import RunFolder
from pipeline.evaluation.budget import biased_choice, fit_bias
from pipeline.evaluation.comparison import better
from pipeline.evaluation.predictions import Predictions
from pipeline.models.cost import Costs, Latency
from pipeline.training.run import BEFORE_JOINT

COSTS = Costs((96, 64, 32), (9.0, 4.0, 1.0), 0.5)
MILLISECONDS = Costs((96, 64, 32), (9.0, 4.0, 1.0), 0.5, Latency((3.0, 1.5, 1.0), 0.1, 1, "float32", "CPU", 1, "2"))
N = 400


def random_predictions(seed: int, top1_R: tuple[float, ...] = (0.9, 0.8, 0.6)) -> Predictions:
    generator = np.random.default_rng(seed)
    labels_N = generator.integers(0, 5, N)
    answers_NR = np.where(generator.random((N, 3)) < top1_R, labels_N[:, None], (labels_N[:, None] + 1) % 5)
    logits_NRK = np.eye(5, dtype=np.float32)[answers_NR]
    logits_NR = generator.normal(size=(N, 3)).astype(np.float32)
    return Predictions(COSTS.resolutions, labels_N, np.arange(N), logits_NRK, logits_NR)


def cost_of(predictions: Predictions, costs: Costs, bias: float) -> float:
    return float(np.asarray(costs.backbone)[biased_choice(predictions.predictor_logits_NR, costs, bias)].mean())


@pytest.mark.parametrize("costs", [COSTS, MILLISECONDS])
@pytest.mark.parametrize("share", [0.1, 0.35, 0.8])
def test_the_bias_is_the_one_with_the_highest_cost_within_the_target(costs: Costs, share: float) -> None:
    predictions = random_predictions(0)
    low, high = min(costs.backbone), max(costs.backbone)
    target = low + share * (high - low)
    found = cost_of(predictions, costs, fit_bias(predictions.predictor_logits_NR, costs, target))
    assert target * 0.99 < found <= target
    tried = (cost_of(predictions, costs, bias) for bias in np.linspace(-10, 10, 4001))
    assert found >= max(cost for cost in tried if cost <= target)


def test_a_target_that_is_met_or_out_of_reach_needs_no_search() -> None:
    predictions = random_predictions(0)
    logits_NR = predictions.predictor_logits_NR
    assert fit_bias(logits_NR, COSTS, cost_of(predictions, COSTS, 0.0)) == 0.0
    assert cost_of(predictions, COSTS, fit_bias(logits_NR, COSTS, 0.5)) == 1.0
    assert cost_of(predictions, COSTS, fit_bias(logits_NR, COSTS, 99.0)) == 9.0


def test_images_that_all_switch_at_once_stay_within_the_target() -> None:
    logits_NR = np.tile(np.array([[0.0, 1.0, 0.0]], np.float32), (50, 1))
    assert fit_bias(logits_NR, COSTS, 5.0) == 0.0


def test_the_more_accurate_model_at_the_cost_of_the_cheaper_one_is_kept() -> None:
    before, after = random_predictions(1), random_predictions(1, top1_R=(0.5, 0.4, 0.3))
    worse = better(before, after, COSTS)
    assert not worse.is_after
    assert worse.accuracy_before == before.correct_NR[np.arange(N), before.chosen_N].mean()
    assert "the model from before it is kept" in str(worse)
    assert better(after, before, COSTS).is_after
    assert better(before, before, COSTS).is_after, "without a difference the run ends as it was configured"


def test_a_model_that_is_right_more_often_only_because_it_costs_more_is_not_better() -> None:
    before = random_predictions(2)
    dearer_NR = (before.predictor_logits_NR + 3 * np.asarray(COSTS.relative)).astype(np.float32)
    after = Predictions(before.resolutions, before.labels_N, before.indices_N, before.logits_NRK, dearer_NR)
    routed = [float(each.correct_NR[np.arange(N), each.chosen_N].mean()) for each in (before, after)]
    assert routed[1] > routed[0] + 0.05
    found = better(before, after, COSTS)
    assert found.cost == pytest.approx(cost_of(before, COSTS, 0.0))
    assert found.accuracy_after == pytest.approx(found.accuracy_before, abs=2 / N)


def test_only_the_images_of_the_mask_are_compared() -> None:
    good, bad = random_predictions(3), random_predictions(3, top1_R=(0.1, 0.1, 0.1))
    first = np.arange(N) < N // 2
    mixed = Predictions(
        good.resolutions,
        good.labels_N,
        good.indices_N,
        np.where(first[:, None, None], good.logits_NRK, bad.logits_NRK),
        good.predictor_logits_NR,
    )
    assert better(mixed, good, COSTS, first).accuracy_before == better(mixed, good, COSTS, first).accuracy_after
    assert better(good, mixed, COSTS, ~first).accuracy_after < better(good, mixed, COSTS, ~first).accuracy_before
    with pytest.raises(ValueError, match="no image"):
        better(good, bad, COSTS, np.zeros(N, bool))


def test_predictions_of_other_images_are_refused() -> None:
    one = random_predictions(4)
    other = Predictions(one.resolutions, one.labels_N, one.indices_N + 1, one.logits_NRK, one.predictor_logits_NR)
    with pytest.raises(ValueError, match="different images"):
        better(one, other, COSTS)


def write_checkpoint(folder: Path, models: dict[str, Predictions]) -> Path:
    """Write what two ranks report at a run's end: even and odd images of each model, and the model."""
    folder.mkdir()
    (folder / "model.pt").write_bytes(b"after")
    for name, predictions in models.items():
        for rank in range(2):
            arrays = (predictions.labels_N, predictions.indices_N, predictions.logits_NRK)
            part = [array[rank::2] for array in (*arrays, predictions.predictor_logits_NR)]
            Predictions(predictions.resolutions, *part).save(folder / f"{name}-{rank}.npz")
    return folder


@pytest.mark.parametrize("helped", [True, False])
def test_the_run_ends_with_the_better_model_and_the_predictions_of_both(helped: bool, tmp_path: Path) -> None:
    good, bad = random_predictions(5), random_predictions(5, top1_R=(0.5, 0.4, 0.3))
    before, after = (bad, good) if helped else (good, bad)
    run = RunFolder(tmp_path)
    run.before_joint.write_bytes(b"before")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", {PREDICTIONS: after, BEFORE_JOINT: before})
    for _ in range(2):  # again, where the driver died after it
        kept = _collect(checkpoint, run, COSTS)
        assert kept == str(better(before, after, COSTS))
        assert run.model.read_bytes() == (b"after" if helped else b"before")
        saved = {run.predictions: good, run.predictions_before_joint: before, run.predictions_after_joint: after}
        for file, expected in saved.items():
            assert np.array_equal(Predictions.load(file).logits_NRK, expected.logits_NRK)


def test_a_run_without_a_joint_stage_ends_with_its_only_model(tmp_path: Path) -> None:
    run, only = RunFolder(tmp_path), random_predictions(6)
    assert _collect(write_checkpoint(tmp_path / "checkpoint", {PREDICTIONS: only}), run, COSTS) is None
    assert run.model.read_bytes() == b"after"
    assert np.array_equal(Predictions.load(run.predictions).logits_NRK, only.logits_NRK)
    assert not run.predictions_before_joint.exists()


def test_by_balanced_accuracy_a_rare_class_counts_as_much_as_the_others() -> None:
    """One model gets nine of ten images right, but none of the rare class; the other one half of each class."""
    labels_N = (np.arange(N) % 10 == 0).astype(np.int64)
    right = {"common": labels_N == 0, "both": np.arange(N) // 10 % 5 < 3}
    found = {}
    for name, right_N in right.items():
        logits_NRK = np.eye(2, dtype=np.float32)[np.where(right_N, labels_N, 1 - labels_N)]
        logits_NRK = np.repeat(logits_NRK[:, None], 3, axis=1)
        logits_NR = np.eye(3, dtype=np.float32)[np.zeros(N, int)]
        found[name] = Predictions(COSTS.resolutions, labels_N, np.arange(N), logits_NRK, logits_NR)
    plain = better(found["common"], found["both"], COSTS)
    assert (plain.accuracy_before, plain.accuracy_after) == pytest.approx((0.9, 0.6))
    balanced = better(found["common"], found["both"], COSTS, balanced=True)
    assert (balanced.accuracy_before, balanced.accuracy_after) == pytest.approx((0.5, 0.6))
    assert "accuracy over the classes" in str(balanced)
