"""The paper's losses: straight-through Gumbel-softmax, mixture of logits, cost regulariser.

Equations: Zhu et al., "Dynamic Resolution Network", NeurIPS 2021, section 3. Shapes: N batch, R resolutions,
K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def straight_through_choice(predictor_logits_NR: Tensor, gumbel_NR: Tensor, tau: float) -> Tensor:
    """One-hot choices (N, R) with the gradient of the relaxed choice.

    h = one_hot(argmax_j(log p_j + g_j)); its gradient is that of softmax((log p + g) / tau).
    """
    perturbed_NR = functional.log_softmax(predictor_logits_NR.float(), dim=1) + gumbel_NR
    relaxed_NR = functional.softmax(perturbed_NR / tau, dim=1)
    hard_NR = functional.one_hot(perturbed_NR.argmax(dim=1), perturbed_NR.shape[1]).to(relaxed_NR.dtype)
    # In this order, (relaxed - relaxed) is exactly zero, so the forward value is one-hot to the last bit.
    return hard_NR + (relaxed_NR - relaxed_NR.detach())


def mixed_logits(choice_NR: Tensor, logits_NRK: Tensor) -> Tensor:
    """The network's output y = sum_j h_j y_j, (N, K)."""
    return torch.einsum("nr,nrk->nk", choice_NR, logits_NRK)


def summed_cross_entropy(logits_NK: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Cross entropy summed over the batch; the caller divides by the global batch's size.

    Args:
        targets: classes (N,), or the probability of each class (N, K).
    """
    return functional.cross_entropy(logits_NK.float(), targets, reduction="sum", label_smoothing=label_smoothing)


def summed_distillation(student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """KL(p_teacher || p_student) of two sets of logits, summed over the batch; the teacher gets no gradient."""
    log_student_NK = functional.log_softmax(student_NK.float(), dim=1)
    log_teacher_NK = functional.log_softmax(teacher_NK.detach().float(), dim=1)
    return functional.kl_div(log_student_NK, log_teacher_NK, reduction="sum", log_target=True)


def cost_penalty(local_cost: Tensor, others_cost: Tensor, costs_R: Tensor, alpha: float) -> Tensor:
    """L_reg = max(0, (E[F] - alpha) / (C_max - C_min)), with E[F] the mean over the *global* batch.

    Args:
        local_cost: this rank's share of E[F], sum_n F_n / N_global, carrying gradient.
        others_cost: the other ranks' share, without gradient.
        costs_R: C_j, in GFLOPs or milliseconds.
        alpha: target in the same unit.
    """
    excess = (local_cost + others_cost - alpha) / (costs_R.max() - costs_R.min())
    return excess.clamp(min=0)
