"""Apply a policy to images with stored logits: which resolutions run, which answer counts, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.models.cost import Costs
from pipeline.serving.runtime.policy import STOP, Policy, confidence, first_resolution, next_resolution


@dataclass(frozen=True, eq=False)
class Images:
    """What policies need to know about N images at R resolutions.

    Attributes:
        confidence_NR: confidence of the answer at each resolution (see `confidence`), float32.
        correct_NR: whether each answer is correct, bool.
        predictor_logits_NR: the predictor's logits, float32; None without a predictor.
        weights_N: weights of the images in an accuracy, float64, with mean 1.
        costs: cost of each resolution and of the predictor.
        exhausted_NR: whether each image is exhausted at each resolution (see `Policy`), bool.
    """

    confidence_NR: np.ndarray
    correct_NR: np.ndarray
    predictor_logits_NR: np.ndarray | None
    weights_N: np.ndarray
    costs: Costs
    exhausted_NR: np.ndarray

    @classmethod
    def of(
        cls,
        logits_NRK: np.ndarray,
        labels_N: np.ndarray,
        predictor_logits_NR: np.ndarray | None,
        costs: Costs,
        weights_N: np.ndarray | None = None,
        extents_N: np.ndarray | None = None,
    ) -> Images:
        """Build the images from stored logits and true classes (N,).

        Args:
            weights_N: weights of the images in an accuracy; None weights all images equally.
            extents_N: side of each image's crop before it is resized, in pixels; None if unknown: then no image is
                exhausted.
        """
        weights_N = np.ones(len(labels_N)) if weights_N is None else weights_N / weights_N.mean()
        confidence_NR = confidence(torch.from_numpy(logits_NRK).flatten(0, 1)).view(logits_NRK.shape[:2]).numpy()
        correct_NR = logits_NRK.argmax(axis=2) == labels_N[:, None]
        extents_N = np.full(len(labels_N), np.inf) if extents_N is None else extents_N
        exhausted_NR = extents_N[:, None] <= np.asarray(costs.resolutions)
        return cls(confidence_NR, correct_NR, predictor_logits_NR, weights_N, costs, exhausted_NR)

    def __len__(self) -> int:
        return len(self.correct_NR)

    def rows(self, rows_M: np.ndarray) -> Images:
        """Return the images at the given rows, in that order. Their weights are scaled to mean 1."""
        predictor, weights_M = self.predictor_logits_NR, self.weights_N[rows_M]
        return replace(
            self,
            confidence_NR=self.confidence_NR[rows_M],
            correct_NR=self.correct_NR[rows_M],
            predictor_logits_NR=None if predictor is None else predictor[rows_M],
            weights_N=weights_M / weights_M.mean(),
            exhausted_NR=self.exhausted_NR[rows_M],
        )


@dataclass(frozen=True, eq=False)
class Routed:
    """The decisions of a policy for N images.

    Attributes:
        ran_NR: which resolutions ran, bool; an image pays for each of them.
        last_N: index of the resolution whose answer counts, int64.
        predictor_N: whether the predictor ran, bool.
    """

    ran_NR: np.ndarray
    last_N: np.ndarray
    predictor_N: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Routed]) -> Routed:
        """Concatenate the images of several parts."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def rows(self, rows_M: np.ndarray) -> Routed:
        """Return the decisions for the given rows, in that order."""
        return Routed(self.ran_NR[rows_M], self.last_N[rows_M], self.predictor_N[rows_M])

    def cost_N(self, costs: Costs) -> np.ndarray:
        """Return the cost of each image, in the unit of `costs`, including the predictor where it ran."""
        return self.ran_NR @ np.asarray(costs.backbone) + costs.predictor * self.predictor_N

    def gflops_N(self, costs: Costs) -> np.ndarray:
        """Return the GFLOPs of each image, including the predictor where it ran."""
        return self.ran_NR @ np.asarray(costs.backbone_gflops) + costs.predictor_gflops * self.predictor_N

    def correct_N(self, correct_NR: np.ndarray) -> np.ndarray:
        """Return whether the answer that counts is correct for each image, bool."""
        return correct_NR[np.arange(len(self.last_N)), self.last_N]


def route(policy: Policy, images: Images) -> Routed:
    """Apply a policy to images and return its decisions."""
    N, R = images.correct_NR.shape
    confidence_NR, exhausted_NR = torch.from_numpy(images.confidence_NR), torch.from_numpy(images.exhausted_NR)
    predictor = None if images.predictor_logits_NR is None else torch.from_numpy(images.predictor_logits_NR)
    now_N = first_resolution(policy, predictor, torch.tensor(images.costs.relative), N)
    ran_NR, last_N = torch.zeros(N, R, dtype=torch.bool), now_N.clone()
    for index in policy.members:  # cheapest first: an image only moves to a later member
        here = (now_N == index).nonzero().flatten()
        ran_NR[here, index] = True
        last_N[here] = index
        now_N[here] = next_resolution(policy, index, confidence_NR[here, index], exhausted_NR[here, index])
    assert bool((now_N == STOP).all())
    return Routed(ran_NR.numpy(), last_N.numpy(), np.full(N, policy.needs_predictor))
