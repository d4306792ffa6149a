"""The paper's formulas against slow references."""

import math

import pytest
import torch

from pipeline.training.objectives import cost_penalty, mixed_logits, straight_through_choice, summed_cross_entropy

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def test_choice_is_exactly_one_hot_at_the_perturbed_maximum() -> None:
    logits_NR, gumbel_NR = random(500, 3) * 5, random(500, 3)
    choice_NR = straight_through_choice(logits_NR, gumbel_NR, tau=0.3)
    for row in range(500):
        total = sum(math.exp(value) for value in logits_NR[row].tolist())
        scores = [
            math.log(math.exp(value) / total) + noise
            for value, noise in zip(logits_NR[row].tolist(), gumbel_NR[row].tolist(), strict=True)
        ]
        expected = [1.0 if score == max(scores) else 0.0 for score in scores]
        assert choice_NR[row].tolist() == expected


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_gradient_of_the_choice_is_that_of_the_relaxed_choice(tau: float) -> None:
    logits_NR, gumbel_NR, weight_NR = random(7, 3), random(7, 3), random(7, 3)
    hard = logits_NR.clone().requires_grad_()
    (straight_through_choice(hard, gumbel_NR, tau) * weight_NR).sum().backward()
    soft = logits_NR.clone().requires_grad_()
    relaxed = torch.exp((torch.log_softmax(soft, 1) + gumbel_NR) / tau)
    ((relaxed / relaxed.sum(1, keepdim=True)) * weight_NR).sum().backward()
    torch.testing.assert_close(hard.grad, soft.grad)
    # And by hand: dr_j / dl_k = r_j (1[j = k] - r_k) / tau, r = softmax((log p + g) / tau).
    assert hard.grad is not None
    for logits, noise, weight, gradient in zip(
        *(each.tolist() for each in (logits_NR, gumbel_NR, weight_NR, hard.grad)), strict=True
    ):
        powers = [math.exp((logit + g) / tau) for logit, g in zip(logits, noise, strict=True)]
        r = [power / sum(powers) for power in powers]
        slow = [sum(weight[j] * r[j] * ((j == k) - r[k]) / tau for j in range(3)) for k in range(3)]
        assert gradient == pytest.approx(slow, rel=1e-4, abs=1e-6)


def test_mixed_logits_of_a_one_hot_choice_are_the_chosen_ones() -> None:
    logits_NRK = random(5, 3, 4)
    chosen = [2, 0, 1, 1, 2]
    mixed = mixed_logits(torch.nn.functional.one_hot(torch.tensor(chosen), 3).float(), logits_NRK)
    assert torch.equal(mixed, torch.stack([logits_NRK[row, index] for row, index in enumerate(chosen)]))


def test_cross_entropy_sums_and_smooths() -> None:
    logits_NK, labels_N = random(6, 4), torch.tensor([0, 1, 2, 3, 1, 0])
    slow = 0.0
    for row, label in enumerate(labels_N.tolist()):
        log_p = torch.log_softmax(logits_NK[row], 0)
        slow += float(-(0.9 * log_p[label] + 0.1 * log_p.mean()))
    assert float(summed_cross_entropy(logits_NK, labels_N, 0.1)) == pytest.approx(slow, rel=1e-5)


@pytest.mark.parametrize(
    ("mean_cost", "alpha", "expected"),
    [(3.0, 2.0, 1.0 / 3.0), (2.0, 2.0, 0.0), (1.5, 2.0, 0.0), (4.0, 1.0, 1.0)],
)
def test_penalty_follows_the_formula_not_the_prose(mean_cost: float, alpha: float, expected: float) -> None:
    costs_R = torch.tensor([4.0, 2.0, 1.0])
    local = torch.tensor(mean_cost - 0.5, requires_grad=True)
    penalty = cost_penalty(local, torch.tensor(0.5), costs_R, alpha)
    assert penalty.item() == pytest.approx(expected)
    penalty.backward()
    # No pressure below the target, and the full slope above it, whatever part of the mean is on this rank.
    assert local.grad is not None
    if mean_cost != alpha:
        assert local.grad.item() == pytest.approx(1 / 3 if mean_cost > alpha else 0.0)
