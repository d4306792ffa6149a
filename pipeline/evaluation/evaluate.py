"""Accuracy on the validation images during training, exact over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.predictions import collect_predictions
from pipeline.evaluation.statistics import oracle_choice
from pipeline.models.cost import Costs
from pipeline.models.drnet import DRNet
from pipeline.training import distributed


def evaluate(
    model: DRNet, batches: Iterable, costs: Costs, backbone_logits: Callable[[Tensor], Tensor] | None = None
) -> dict[str, float]:
    """Top-1 at each resolution and routed, mean cost (predictor included) and shares. Every rank must call it.

    `share_SIDE` is how much goes to a resolution, `oracle_share_SIDE` how much would go to the cheapest that is right.

    Args:
        batches: this rank's part of the validation images.
        backbone_logits: as for `collect_predictions`.
    """
    found = collect_predictions(model, batches, backbone_logits)
    right_NR = found.logits_NRK.argmax(axis=2) == found.labels_N[:, None]
    choice_N = found.predictor_logits_NR.argmax(axis=1)
    oracle_N = oracle_choice(right_NR, costs.backbone)
    chosen_NR, oracle_NR = (picks_N[:, None] == np.arange(len(model.resolutions)) for picks_N in (choice_N, oracle_N))
    counts_4R = np.stack([right_NR, right_NR & chosen_NR, chosen_NR, oracle_NR]).sum(axis=1)
    sums = torch.as_tensor(np.append(counts_4R, len(right_NR)), dtype=torch.float64)
    *total, count = distributed.sum_over_ranks(sums.to(next(model.parameters()).device)).tolist()
    right_R, routed_right_R, chosen_R, oracle_R = np.reshape(total, counts_4R.shape)
    values = {
        f"{key}_{side}": number / count
        for key, numbers in (("accuracy", right_R), ("share", chosen_R), ("oracle_share", oracle_R))
        for side, number in zip(model.resolutions, numbers.tolist(), strict=True)
    }
    shares = (chosen_R / count).tolist()
    values |= {"accuracy_routed": float(routed_right_R.sum() / count), "gflops_routed": costs.mean_gflops(shares)}
    return values if costs.latency is None else values | {"milliseconds_routed": costs.mean(shares)}
