"""Accuracy on the validation images during training, exact over all ranks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from pipeline.evaluation.predictions import collect_predictions
from pipeline.models.cost import Costs
from pipeline.models.drnet import DRNet
from pipeline.training import distributed


def evaluate(model: DRNet, batches: Iterable, costs: Costs) -> dict[str, float]:
    """Top-1 at each resolution and routed, mean GFLOPs (predictor included) and shares. Every rank must call it.

    Args:
        batches: this rank's part of the validation images.
    """
    found = collect_predictions(model, batches)
    right_NR = found.logits_NRK.argmax(axis=2) == found.labels_N[:, None]
    choice_N = found.predictor_logits_NR.argmax(axis=1)
    chosen_NR = choice_N[:, None] == np.arange(len(model.resolutions))
    sums = np.concatenate([[len(right_NR)], right_NR.sum(0), [(right_NR & chosen_NR).sum()], chosen_NR.sum(0)])
    device = next(model.parameters()).device
    total = distributed.sum_over_ranks(torch.as_tensor(sums, dtype=torch.float64).to(device)).tolist()
    count, num = total[0], len(model.resolutions)
    shares_R = [share / count for share in total[num + 2 :]]
    values = {f"accuracy_{side}": total[1 + j] / count for j, side in enumerate(model.resolutions)}
    values |= {f"share_{side}": shares_R[j] for j, side in enumerate(model.resolutions)}
    return values | {"accuracy_routed": total[num + 1] / count, "gflops_routed": costs.mean_gflops(shares_R)}
