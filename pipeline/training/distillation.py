"""The teacher of the backbone stage: an ensemble of the resolutions' logits that each of them learns from."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Weighted mean of the logits at R resolutions (Wang et al., "Resolution Switchable Networks", ECCV 2020).

    The weights are softmax(scores). They start equal and, where they are learned, follow the cross entropy of the
    ensemble, whose gradient goes to them alone; the logits come from the students of the same step. This is the
    paper's multi-resolution ensemble distillation in its plain form, without further losses between two resolutions;
    temperature 1, as there.

    Args:
        num_resolutions: R.
        learned: False keeps the weights equal.
    """

    def __init__(self, num_resolutions: int, *, learned: bool):
        super().__init__()
        self.scores_R = nn.Parameter(torch.zeros(num_resolutions), requires_grad=learned)

    def forward(self, logits_NRK: Tensor) -> Tensor:
        """The teacher's logits (N, K), with gradient for the scores only."""
        return torch.einsum("r,nrk->nk", self.scores_R.softmax(dim=0), logits_NRK.detach())
