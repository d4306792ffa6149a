"""What a policy does with images whose logits are stored: which resolutions run, which answer counts, what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.models.cost import Costs
from pipeline.serving.runtime.policy import STOP, Policy, confidence, first_resolution, next_resolution


@dataclass(frozen=True, eq=False)
class Images:
    """What policies need to know of N images at R resolutions.

    Attributes:
        confidence_NR: of the answer at each resolution, float32.
        correct_NR: whether each answer is right, bool.
        predictor_logits_NR: float32; None where there is no predictor.
        weights_N: of the images in an accuracy, float64; their mean is 1.
    """

    confidence_NR: np.ndarray
    correct_NR: np.ndarray
    predictor_logits_NR: np.ndarray | None
    weights_N: np.ndarray
    costs: Costs

    @classmethod
    def of(
        cls,
        logits_NRK: np.ndarray,
        labels_N: np.ndarray,
        predictor_logits_NR: np.ndarray | None,
        costs: Costs,
        weights_N: np.ndarray | None = None,
    ) -> Images:
        """Images by their stored logits; without weights they all count the same."""
        weights_N = np.ones(len(labels_N)) if weights_N is None else weights_N / weights_N.mean()
        confidence_NR = confidence(torch.from_numpy(logits_NRK).flatten(0, 1)).view(logits_NRK.shape[:2]).numpy()
        correct_NR = logits_NRK.argmax(axis=2) == labels_N[:, None]
        return cls(confidence_NR, correct_NR, predictor_logits_NR, weights_N, costs)

    def __len__(self) -> int:
        return len(self.correct_NR)

    def rows(self, rows_M: np.ndarray) -> Images:
        """Some of the images."""
        predictor = self.predictor_logits_NR
        return replace(
            self,
            confidence_NR=self.confidence_NR[rows_M],
            correct_NR=self.correct_NR[rows_M],
            predictor_logits_NR=None if predictor is None else predictor[rows_M],
            weights_N=self.weights_N[rows_M],
        )


@dataclass(frozen=True, eq=False)
class Routed:
    """What a policy does with N images.

    Attributes:
        ran_NR: which resolutions ran, bool; an image pays for each.
        last_N: index of the resolution whose answer counts, int64.
        predictor_N: whether the predictor ran, bool.
    """

    ran_NR: np.ndarray
    last_N: np.ndarray
    predictor_N: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Routed]) -> Routed:
        """The images of several parts, one after another."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def rows(self, rows_M: np.ndarray) -> Routed:
        """Some of the images, in the given order."""
        return Routed(self.ran_NR[rows_M], self.last_N[rows_M], self.predictor_N[rows_M])

    def cost_N(self, costs: Costs) -> np.ndarray:
        """The cost of each image in the unit of the costs, with the predictor where it ran."""
        return self.ran_NR @ np.asarray(costs.backbone) + costs.predictor * self.predictor_N

    def gflops_N(self, costs: Costs) -> np.ndarray:
        """The GFLOPs of each image, with the predictor where it ran."""
        return self.ran_NR @ np.asarray(costs.backbone_gflops) + costs.predictor_gflops * self.predictor_N

    def correct_N(self, correct_NR: np.ndarray) -> np.ndarray:
        """Whether the answer that counts is right, bool."""
        return correct_NR[np.arange(len(self.last_N)), self.last_N]


def route(policy: Policy, images: Images) -> Routed:
    """Apply a policy to images."""
    N, R = images.correct_NR.shape
    confidence_NR = torch.from_numpy(images.confidence_NR)
    predictor = None if images.predictor_logits_NR is None else torch.from_numpy(images.predictor_logits_NR)
    now_N = first_resolution(policy, predictor, torch.tensor(images.costs.relative), N)
    ran_NR, last_N = torch.zeros(N, R, dtype=torch.bool), now_N.clone()
    for index in policy.members:  # cheapest first, and an image only ever moves on to a later one
        here = (now_N == index).nonzero().flatten()
        ran_NR[here, index] = True
        last_N[here] = index
        now_N[here] = next_resolution(policy, index, confidence_NR[here, index])
    assert bool((now_N == STOP).all())
    return Routed(ran_NR.numpy(), last_N.numpy(), np.full(N, policy.needs_predictor))
