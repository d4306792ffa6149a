"""Which model a run keeps: the one from before the joint stage, or the one from after it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cluster.driver import _collect, kept_model
from pipeline.cluster.worker import PREDICTIONS
from pipeline.config.run_folder import RunFolder
from pipeline.evaluation.budget import biased_choice, fit_bias
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.report import Evaluation
from pipeline.models.cost import Costs, Latency
from pipeline.policies.calibrate import Budget, JointComparison, Split
from pipeline.training.run import BEFORE_JOINT

COSTS = Costs((96, 64, 32), (9.0, 4.0, 1.0), 0.5)
MILLISECONDS = Costs((96, 64, 32), (9.0, 4.0, 1.0), 0.5, Latency((3.0, 1.5, 1.0), 0.1, 1, "float32", "CPU", 1, "2"))
N = 400
KEYS_N = np.arange(N, dtype=np.uint64)


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


def compared(before: Predictions, after: Predictions, **changed: Any) -> JointComparison:
    """Compare two models as a run does, on cross-fitted policies of all images unless `split` is given."""
    kept = [Evaluation(each, COSTS, KEYS_N, **changed) for each in (before, after)]
    return kept_model(*kept)


def with_confidence(predictions: Predictions, seed: int) -> Predictions:
    """Make the answers of the smallest resolution tell whether they are right: right ones are surer."""
    generator = np.random.default_rng(seed)
    sure_N = np.where(predictions.correct_NR[:, -1], 6.0, 1.0) + generator.normal(size=N) / 4
    logits_NRK = predictions.logits_NRK.copy()
    logits_NRK[:, -1] *= sure_N[:, None].astype(np.float32)
    return replace(predictions, logits_NRK=logits_NRK)


def test_the_more_accurate_model_is_kept() -> None:
    before, after = random_predictions(1), random_predictions(1, top1_R=(0.5, 0.4, 0.3))
    worse = compared(before, after)
    assert not worse.is_after
    assert "the model from before it is kept" in str(worse)
    assert compared(after, before).is_after
    assert compared(before, before).is_after, "without a difference the run ends as it was configured"


def test_models_are_compared_by_their_cascades_and_not_by_their_predictors_alone() -> None:
    """Both predictors always choose the largest resolution. Only one model's confidence tells when to stop earlier."""
    plain = random_predictions(2)
    plain = replace(plain, predictor_logits_NR=np.tile(np.array([[9.0, 0.0, 0.0]], np.float32), (N, 1)))
    confident = with_confidence(plain, 2)
    assert np.array_equal(plain.correct_NR, confident.correct_NR)
    found = compared(plain, confident)
    assert found.accuracy_after > found.accuracy_before + 0.03
    assert not compared(confident, plain).is_after


def test_with_a_budget_only_the_accuracy_at_its_cost_counts() -> None:
    cheap_is_good = random_predictions(3, top1_R=(0.7, 0.7, 0.7))
    large_is_good = random_predictions(3, top1_R=(0.99, 0.4, 0.3))
    at_small, at_large = (
        compared(cheap_is_good, large_is_good, budget=Budget(cost)) for cost in (min(COSTS.backbone), 9.0)
    )
    assert not at_small.is_after
    assert at_large.is_after
    assert "of 1 GFLOPs" in str(at_small)


def test_only_images_for_choosing_are_compared_and_never_by_policies_fitted_on_them() -> None:
    split = Split(cross_fit_below=0)
    (select, held_out), *_ = split.parts(KEYS_N)
    folds = split.choosing_folds(KEYS_N)
    assert len(folds) == split.folds
    assert sorted(np.concatenate([apply for _, apply in folds])) == sorted(select)
    for fit, apply in folds:
        assert not set(fit) & (set(apply) | set(held_out))
    good, bad = random_predictions(4), random_predictions(4, top1_R=(0.1, 0.1, 0.1))
    logits_NRK = good.logits_NRK.copy()
    logits_NRK[held_out] = bad.logits_NRK[held_out]
    mixed = replace(good, logits_NRK=logits_NRK)
    found = compared(good, mixed, split=split)
    assert found.accuracy_before == found.accuracy_after
    assert compared(good, mixed).accuracy_after < found.accuracy_after - 0.2


def test_images_with_the_same_key_stay_in_one_fold() -> None:
    keys_N = np.arange(N, dtype=np.uint64) // 20
    for split in (Split(), Split(cross_fit_below=0)):
        for fit, apply in split.choosing_folds(keys_N):
            assert not set(keys_N[fit]) & set(keys_N[apply])


@pytest.mark.parametrize("split", [Split(), Split(cross_fit_below=0)])
def test_too_few_groups_are_refused(split: Split) -> None:
    with pytest.raises(ValueError, match=r"the 400 validation images .* they form only 1 groups"):
        split.parts(np.zeros(N, np.uint64))


def test_models_of_other_costs_are_refused() -> None:
    one = Evaluation(random_predictions(4), COSTS, KEYS_N)
    with pytest.raises(ValueError, match="different costs"):
        kept_model(one, replace(one, costs=MILLISECONDS))


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
def test_the_run_ends_with_the_better_model_and_the_predictions_of_both(
    helped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = random_predictions(5), random_predictions(5, top1_R=(0.5, 0.4, 0.3))
    before, after = (bad, good) if helped else (good, bad)
    run = RunFolder(tmp_path)
    run.before_joint.write_bytes(b"before")

    def evaluation(predictions: Predictions) -> Evaluation:
        return Evaluation(predictions, COSTS, KEYS_N[predictions.indices_N])

    checkpoint = write_checkpoint(tmp_path / "checkpoint", {PREDICTIONS: after, BEFORE_JOINT: before})
    for _ in range(2):  # again, where the driver died after it
        kept = _collect(checkpoint, run, evaluation)
        assert kept == str(kept_model(evaluation(before), evaluation(after)))
        assert capsys.readouterr().out == f"joint stage: {kept}\n"
        assert run.model.read_bytes() == (b"after" if helped else b"before")
        saved = {run.predictions: good, run.predictions_before_joint: before, run.predictions_after_joint: after}
        for file, expected in saved.items():
            assert np.array_equal(Predictions.load(file).logits_NRK, expected.logits_NRK)


def test_a_run_without_a_joint_stage_ends_with_its_only_model(tmp_path: Path) -> None:
    run, only = RunFolder(tmp_path), random_predictions(6)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", {PREDICTIONS: only})
    assert _collect(checkpoint, run, lambda predictions: Evaluation(predictions, COSTS, KEYS_N)) is None
    assert run.model.read_bytes() == b"after"
    assert np.array_equal(Predictions.load(run.predictions).logits_NRK, only.logits_NRK)
    assert not run.predictions_before_joint.exists()


def test_by_balanced_accuracy_a_rare_class_counts_as_much_as_the_others() -> None:
    """One model gets nine of ten images right, but none of the rare class; the other one six of ten of each class."""
    labels_N = (np.arange(N) % 10 == 0).astype(np.int64)
    right = {"common": labels_N == 0, "both": np.arange(N) // 10 % 5 < 3}
    found = {}
    for name, right_N in right.items():
        logits_NRK = np.eye(2, dtype=np.float32)[np.where(right_N, labels_N, 1 - labels_N)]
        logits_NRK = np.repeat(logits_NRK[:, None], 3, axis=1)
        logits_NR = np.eye(3, dtype=np.float32)[np.zeros(N, int)]
        found[name] = Predictions(COSTS.resolutions, labels_N, np.arange(N), logits_NRK, logits_NR)
    plain = compared(found["common"], found["both"])
    assert (plain.accuracy_before, plain.accuracy_after) == pytest.approx((0.9, 0.6))
    balanced = compared(found["common"], found["both"], balanced=True)
    assert (balanced.accuracy_before, balanced.accuracy_after) == pytest.approx((0.5, 0.6))
