"""Policies: at which resolution an image starts, and when it stops. Evaluation, registered models and the server share
it.

This module is stored with each registered model, so it imports nothing of this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

STOP = -1
"""The index that stands for "no further resolution runs"."""
ALWAYS, NEVER = 0.0, 2.0
"""Thresholds that every confidence reaches, and that none does: a confidence is above 0 and at most 1."""


@dataclass(frozen=True)
class Policy:
    """A rule that sends each image through one or more of the candidate resolutions.

    An image starts at one of `members`. It stops there if the largest softmax probability reaches the member's
    threshold. Otherwise it runs again at the next member and pays for both. At the last member it always stops.

    An image is exhausted at a resolution if its crop has no more pixels than the resolution before it is resized. A
    higher resolution then shows no more detail.

    Attributes:
        members: indices of the resolutions that may run, cheapest first.
        thresholds: for each member except the last, the confidence from which an image stops.
        start_bias: None starts every image at the first member. A number starts an image at the member that the
            predictor chooses: argmax_j(logits_j + start_bias * c_j), where c_j in [0, 1] is the relative cost of
            resolution j.
        stops_exhausted: whether an exhausted image stops, whatever its confidence.

    Raises:
        ValueError: there is no member, a member repeats, or the number of thresholds does not match.
    """

    members: tuple[int, ...]
    thresholds: tuple[float, ...] = ()
    start_bias: float | None = None
    stops_exhausted: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(self.members))
        object.__setattr__(self, "thresholds", tuple(self.thresholds))
        if not self.members or len({*self.members}) < len(self.members):
            raise ValueError(f"a policy has members {list(self.members)}; give one or more different resolutions")
        if len(self.thresholds) != len(self.members) - 1:
            raise ValueError(
                f"a policy has {len(self.members)} members and {len(self.thresholds)} thresholds; "
                "give a threshold for each member but the last"
            )

    @property
    def kind(self) -> str:
        """The kind of policy: static, predictor, cascade or predictor+cascade."""
        if len(self.members) == 1:
            return "static"
        if self.start_bias is None:
            return "cascade"
        return "predictor" if max(self.thresholds) <= ALWAYS else "predictor+cascade"

    @property
    def needs_predictor(self) -> bool:
        """Whether the policy uses the predictor's logits."""
        return self.kind.startswith("predictor")

    def to_json(self) -> dict[str, Any]:
        """Return the policy as plain values, such that `Policy(**values)` is the same policy."""
        return asdict(self)


def static_policy(index: int) -> Policy:
    """Return the policy that runs every image once, at resolution `index`."""
    return Policy((index,))


def predictor_policy(cheapest_first: Sequence[int], bias: float = 0.0) -> Policy:
    """Return the policy that runs every image once, at the resolution that the predictor chooses.

    Args:
        cheapest_first: indices of the resolutions.
        bias: the policy's `start_bias`.
    """
    return Policy(tuple(cheapest_first), (ALWAYS,) * (len(cheapest_first) - 1), bias)


def first_resolution(
    policy: Policy, predictor_logits_NR: Tensor | None, relative_costs_R: Tensor, num_images: int
) -> Tensor:
    """Return the index of the resolution at which each image starts, int64 (N,).

    Args:
        predictor_logits_NR: the predictor's logits; required if `policy.needs_predictor`.
        relative_costs_R: cost of each resolution on a scale from 0 (cheapest) to 1 (most expensive).
    """
    if not policy.needs_predictor:
        return torch.full((num_images,), policy.members[0])
    assert policy.start_bias is not None
    assert predictor_logits_NR is not None
    members = torch.tensor(policy.members)
    biased_NR = predictor_logits_NR.double() + policy.start_bias * relative_costs_R.double()
    return members[biased_NR[:, members].argmax(dim=1)]


def next_resolution(policy: Policy, index: int, confidence_N: Tensor, exhausted_N: Tensor | None = None) -> Tensor:
    """Return the index of the resolution at which each image runs next, int64 (N,), or STOP for images that are done.

    Args:
        index: the resolution at which the images have just run.
        confidence_N: confidence of the answers at that resolution.
        exhausted_N: whether the images are exhausted at that resolution, bool; None stands for no such image.
    """
    position = policy.members.index(index)
    if position == len(policy.members) - 1:
        return torch.full((len(confidence_N),), STOP)
    stops_N = confidence_N >= policy.thresholds[position]
    if policy.stops_exhausted and exhausted_N is not None:
        stops_N = stops_N | exhausted_N
    return torch.where(stops_N, STOP, policy.members[position + 1])


def confidence(logits_NK: Tensor) -> Tensor:
    """Return the largest softmax probability of each image, float32 (N,), above 0 and at most 1."""
    return logits_NK.float().softmax(dim=1).amax(dim=1)


def can_stop(policy: Policy, index: int) -> bool:
    """Return whether what runs after resolution `index` depends on the answer there."""
    position = policy.members.index(index)
    return position < len(policy.members) - 1 and policy.thresholds[position] > ALWAYS
