"""The trainer reports a collapsed predictor, and says what to change."""

import pytest

from pipeline.config.schema import JointStage, PredictorStage
from pipeline.models.cost import Costs
from pipeline.training.monitoring import collapse_warning

COSTS = Costs((96, 48, 32), (4.0, 2.0, 1.0), 0.1)
STAGE = JointStage(epochs=1, alpha_gflops=2.5, eta=0.5, tau=2.0)


def warning_of(shares: tuple[float, ...], oracle: tuple[float, ...], stage: JointStage = STAGE) -> str | None:
    values = {f"share_{side}": share for side, share in zip(COSTS.resolutions, shares, strict=True)}
    values |= {f"oracle_share_{side}": share for side, share in zip(COSTS.resolutions, oracle, strict=True)}
    return collapse_warning("joint", stage, COSTS, values)


@pytest.mark.parametrize(
    ("shares", "stage", "change"),
    [
        ((0.0, 0.995, 0.005), STAGE, "Lower stages.joint.alpha_gflops below it"),
        ((0.0, 0.995, 0.005), STAGE.model_copy(update={"alpha_gflops": 1.5}), "Raise stages.joint.eta (0.5)"),
        ((1.0, 0.0, 0.0), STAGE, "Raise stages.joint.eta (0.5)"),
        ((0.0, 0.0, 1.0), STAGE, "Lower stages.joint.eta (0.5) or raise alpha_gflops (2.5)"),
    ],
    ids=["middle, within alpha", "middle, above alpha", "largest", "smallest"],
)
def test_a_collapse_warning_says_what_to_change(shares: tuple[float, ...], stage: JointStage, change: str) -> None:
    warning = warning_of(shares, (0.2, 0.3, 0.5), stage)
    assert warning is not None
    index = shares.index(max(shares))
    oracle = ("20.0", "30.0", "50.0")[index]
    assert f"{100 * max(shares):.1f} % of the validation images go to {COSTS.resolutions[index]} px" in warning
    assert f"the oracle sends {oracle} % there" in warning
    assert change in warning
    assert "raise tau (2)" in warning


@pytest.mark.parametrize(
    ("shares", "oracle"),
    [
        ((0.01, 0.98, 0.01), (0.2, 0.3, 0.5)),
        ((0.3, 0.3, 0.4), (0.0, 0.0, 1.0)),
        ((0.0, 0.0, 1.0), (0.0, 0.01, 0.99)),
    ],
    ids=["two resolutions", "all of them", "as the oracle does"],
)
def test_other_shares_are_not_a_collapse(shares: tuple[float, ...], oracle: tuple[float, ...]) -> None:
    assert warning_of(shares, oracle) is None


def test_most_often_correct_at_the_largest_resolution_is_not_a_collapse() -> None:
    """Without alpha, a policy decides later what the largest resolution is worth."""
    stage = PredictorStage(epochs=1, objective="correctness")
    values = {"share_96": 1.0, "share_48": 0.0, "share_32": 0.0, "oracle_share_96": 0.1}
    assert collapse_warning("predictor", stage, COSTS, values) is None
