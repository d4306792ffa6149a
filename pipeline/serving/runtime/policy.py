"""Where an image starts and when it stops: the one decision that evaluation, the registered model and the server share.

It is stored with each registered model, so it imports nothing of this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

STOP = -1
ALWAYS, NEVER = 0.0, 2.0
"""thresholds at which every image stops, and at which none does: a confidence is above 0 and at most 1"""


@dataclass(frozen=True)
class Policy:
    """A rule that sends each image through one or more of the candidate resolutions.

    An image starts at one of `members`. It stops there when the largest softmax probability reaches the member's
    threshold. Otherwise it runs again at the next member and pays for both. At the last member it always stops.

    Attributes:
        members: indices of the resolutions that may run, cheapest first.
        thresholds: for each member but the last, the confidence at which an image stops.
        start_bias: None starts at the first member. A number starts at the member that the predictor chooses:
            argmax_j(logits_j + start_bias * c_j), where c_j is the relative cost of resolution j, 0 to 1.

    Raises:
        ValueError: no member, members that repeat, or a number of thresholds that does not fit.
    """

    members: tuple[int, ...]
    thresholds: tuple[float, ...] = ()
    start_bias: float | None = None

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
        """static, predictor, cascade or predictor+cascade."""
        if len(self.members) == 1:
            return "static"
        if self.start_bias is None:
            return "cascade"
        return "predictor" if max(self.thresholds) <= ALWAYS else "predictor+cascade"

    @property
    def needs_predictor(self) -> bool:
        return self.kind.startswith("predictor")

    def to_json(self) -> dict[str, Any]:
        """The policy as plain values; `Policy(**values)` is the same policy."""
        return asdict(self)


def static_policy(index: int) -> Policy:
    """Every image runs once, at resolution `index`."""
    return Policy((index,))


def predictor_policy(cheapest_first: Sequence[int], bias: float = 0.0) -> Policy:
    """Every image runs once, at the resolution that the predictor chooses."""
    return Policy(tuple(cheapest_first), (ALWAYS,) * (len(cheapest_first) - 1), bias)


def first_resolution(
    policy: Policy, predictor_logits_NR: Tensor | None, relative_costs_R: Tensor, num_images: int
) -> Tensor:
    """The index of the resolution at which each image starts, int64 (N,).

    Args:
        predictor_logits_NR: needed where `policy.needs_predictor`.
        relative_costs_R: 0 for the cheapest resolution to 1 for the most expensive.
    """
    if not policy.needs_predictor:
        return torch.full((num_images,), policy.members[0])
    assert policy.start_bias is not None
    assert predictor_logits_NR is not None
    members = torch.tensor(policy.members)
    biased_NR = predictor_logits_NR.double() + policy.start_bias * relative_costs_R.double()
    return members[biased_NR[:, members].argmax(dim=1)]


def next_resolution(policy: Policy, index: int, confidence_N: Tensor) -> Tensor:
    """Where images that have just run at resolution `index` run next, int64 (N,); STOP where they are done.

    Args:
        confidence_N: of the answers at that resolution.
    """
    position = policy.members.index(index)
    if position == len(policy.members) - 1:
        return torch.full((len(confidence_N),), STOP)
    return torch.where(confidence_N >= policy.thresholds[position], STOP, policy.members[position + 1])


def confidence(logits_NK: Tensor) -> Tensor:
    """The largest softmax probability, float32 (N,), above 0 and at most 1."""
    return logits_NK.float().softmax(dim=1).amax(dim=1)


def can_stop(policy: Policy, index: int) -> bool:
    """Whether the answer at resolution `index` has to be known before it is clear what runs next."""
    position = policy.members.index(index)
    return position < len(policy.members) - 1 and policy.thresholds[position] > ALWAYS
