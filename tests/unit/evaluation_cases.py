"""Build predictions with known properties, for the tests of the evaluation."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.report import Evaluation, build_report
from pipeline.models.cost import Costs
from pipeline.policies.calibrate import ALL, Calibration
from pipeline.policies.fit import FittedPolicy
from pipeline.policies.route import Images, route
from pipeline.serving.runtime.policy import predictor_policy

SIDES = (96, 64, 32)
COSTS = Costs(SIDES, (0.9, 0.4, 0.1), 0.03)


def predictions_of(correct_NR: np.ndarray, chosen_N: np.ndarray, num_classes: int = 4, sides=SIDES) -> Predictions:
    """Return predictions that are correct exactly where `correct_NR` is true and route as `chosen_N` says."""
    N, R = correct_NR.shape
    labels_N = np.arange(N) % num_classes
    answers_NR = np.where(correct_NR, labels_N[:, None], (labels_N[:, None] + 1) % num_classes)
    logits_NRK = np.eye(num_classes, dtype=np.float32)[answers_NR]
    return Predictions(tuple(sides), labels_N, np.arange(N), logits_NRK, np.eye(R, dtype=np.float32)[chosen_N])


def easy_and_hard(N: int = 600, skill: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return correct (N, 3), chosen (N,) and height (N,): tall images are easy at every side, small ones at 96 px only.

    With `skill` 1 the choice follows the height, with 0 it is random.
    """
    generator = np.random.default_rng(seed)
    height_N = generator.uniform(0, 1, N)
    right_N1, easiest_N = generator.random((N, 1)), np.select([height_N < 0.3, height_N < 0.6], [0, 1], 2)
    accuracy_NR = np.where(np.arange(3) <= easiest_N[:, None], 0.97, 0.4)
    random_N = generator.integers(0, 3, N)
    chosen_N = np.where(generator.random(N) < skill, easiest_N, random_N)
    return right_N1 < accuracy_NR, chosen_N, height_N


def jpeg(index: int) -> bytes:
    """Return a small JPEG that depends on `index`."""
    pixels = np.random.default_rng(index).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((40, 30)).save(buffer, format="JPEG")
    return buffer.getvalue()


CLASSES = ("ant", "bee", "cat", "dog")
CONTEXT = {"dataset": "glyphs", "git_commit": "abc123", "created": "2026-01-02T03:04:05+00:00", "torch": "2.13"}


def evaluation_of(predictions: Predictions, costs: Costs = COSTS) -> Evaluation:
    """Return an evaluation in which the predictor's own choice is the policy and every image is held out.

    The tests say which image goes where. Other tests check which policy a budget chooses.
    """
    N = predictions.num_images
    evaluation = Evaluation(predictions, costs, np.arange(N, dtype=np.uint64))
    if len(costs.resolutions) > 1:
        images = Images.of(predictions.logits_NRK, predictions.labels_N, predictions.predictor_logits_NR, costs)
        policy = predictor_policy(np.argsort(costs.backbone).tolist())
        routed = route(policy, images)
        point = FittedPolicy(policy, float(routed.cost_N(costs).mean()), float(predictions.correct_NR.mean()))
        fronts, curves = {"predictor": [point], ALL: [point]}, {"predictor": [routed], ALL: [routed]}
        calibration = Calibration(fronts, point, np.arange(N), {ALL: routed}, curves, N, None, np.zeros(0))
        evaluation.__dict__["calibration"] = calibration
    return evaluation


def report_of(correct_NR: np.ndarray, chosen_N: np.ndarray, **changed) -> dict:
    given = {"classes": CLASSES, "attributes": {}, "name": "run", "context": CONTEXT, "costs": COSTS} | changed
    costs = given.pop("costs")
    return build_report(evaluation_of(predictions_of(correct_NR, chosen_N, sides=costs.resolutions), costs), **given)


def outcomes(*groups: tuple[int, tuple[int, int, int], int]) -> tuple[np.ndarray, np.ndarray]:
    """Return correct (N, 3) and chosen (N,) from groups of (number of images, correct at 96, 64, 32 px, chosen)."""
    correct = [np.tile(np.array(right, bool), (count, 1)) for count, right, _ in groups]
    return np.concatenate(correct), np.repeat([chosen for *_, chosen in groups], [count for count, *_ in groups])


# Easy images are correct everywhere, hard ones at 96 px only: static 96, 64, 32 px reach 98, 70, 60 %.
PERFECT = outcomes((600, (1, 1, 1), 2), (100, (1, 1, 0), 1), (280, (1, 0, 0), 0), (20, (0, 0, 0), 2))
