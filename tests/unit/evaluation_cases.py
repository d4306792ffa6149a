"""Predictions with known properties, for the tests of the evaluation."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.evaluation.predictions import Predictions
from pipeline.models.cost import Costs

SIDES = (96, 64, 32)
COSTS = Costs(SIDES, (0.9, 0.4, 0.1), 0.03)


def predictions_of(correct_NR: np.ndarray, chosen_N: np.ndarray, num_classes: int = 4, sides=SIDES) -> Predictions:
    """Predictions that are right exactly where `correct_NR` says and route as `chosen_N` says."""
    N, R = correct_NR.shape
    labels_N = np.arange(N) % num_classes
    answers_NR = np.where(correct_NR, labels_N[:, None], (labels_N[:, None] + 1) % num_classes)
    logits_NRK = np.eye(num_classes, dtype=np.float32)[answers_NR]
    return Predictions(tuple(sides), labels_N, np.arange(N), logits_NRK, np.eye(R, dtype=np.float32)[chosen_N])


def easy_and_hard(N: int = 600, skill: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """correct (N, 3), chosen (N,) and a height (N,): tall images are right at every side, small ones at 96 px only.

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
    """A small picture that depends on `index`."""
    pixels = np.random.default_rng(index).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((40, 30)).save(buffer, format="JPEG")
    return buffer.getvalue()
