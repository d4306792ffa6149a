"""Decide whether the joint stage helped, by comparing the models from before and after it at the same cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.budget import biased_choice, fit_bias
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.statistics import class_weights
from pipeline.models.cost import Costs


@dataclass(frozen=True)
class Comparison:
    """Accuracies of two models, as fractions, at the same mean backbone cost or less, in `unit`."""

    accuracy_before: float
    accuracy_after: float
    cost: float
    unit: str
    balanced: bool = False

    @property
    def is_after(self) -> bool:
        """Whether the model from after the joint stage is at least as accurate."""
        return self.accuracy_after >= self.accuracy_before

    def __str__(self) -> str:
        unit = "GFLOPs" if self.unit == "gflops" else "ms"
        return (
            f"the model from {'after' if self.is_after else 'before'} it is kept: at {self.cost:.4g} {unit} of the "
            f"backbone, the accuracy{' over the classes' if self.balanced else ''} on validation images is "
            f"{100 * self.accuracy_after:.2f} % after it and {100 * self.accuracy_before:.2f} % before it"
        )


def better(
    before: Predictions, after: Predictions, costs: Costs, mask_N: np.ndarray | None = None, balanced: bool = False
) -> Comparison:
    """Compare the routed accuracy of two models on the same images, at the mean cost of the cheaper model.

    A bias on its predictor's logits lowers the more expensive model to that cost.

    Args:
        before, after: merged predictions (see `merge`), so that images are in the same order.
        mask_N: which images are compared, bool; None is all.
        balanced: compare the mean accuracy over the classes.

    Raises:
        ValueError: the predictions are for different images or resolutions, or no image is left to compare.
    """
    if not np.array_equal(before.indices_N, after.indices_N) or before.resolutions != after.resolutions:
        raise ValueError("the predictions before and after the joint stage have different images or resolutions")
    rows = np.flatnonzero(np.ones(before.num_images, bool) if mask_N is None else mask_N)
    if len(rows) == 0:
        raise ValueError("there is no image to compare the models before and after the joint stage on")
    cost_R = np.asarray(costs.backbone)
    cost = min(float(cost_R[each.chosen_N[rows]].mean()) for each in (before, after))
    labels_N, accuracies = before.labels_N[rows], []
    weights_N = class_weights(labels_N) if balanced else np.ones(len(rows))
    for each in (before, after):
        logits_NR = each.predictor_logits_NR[rows]
        choice_N = biased_choice(logits_NR, costs, fit_bias(logits_NR, costs, cost))
        accuracies.append(float(np.average(each.correct_NR[rows, choice_N], weights=weights_N)))
    return Comparison(*accuracies, cost=cost, unit=costs.unit, balanced=balanced)
