"""Notice that the predictor sends everything to one resolution, and say what to change."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.config import RoutedStage
from pipeline.models.cost import Costs

COLLAPSED_SHARE = 0.98


def collapse_warning(name: str, stage: RoutedStage, costs: Costs, values: Mapping[str, float]) -> str | None:
    """What to tell of an epoch in which the predictor collapsed, or None where it did not.

    It has collapsed where one resolution takes more than COLLAPSED_SHARE of the validation images while the oracle,
    the cheapest resolution that is right, gives that one less.

    Args:
        name: the stage's name.
        values: of `evaluate`: `share_SIDE` and `oracle_share_SIDE` for every resolution.
    """
    share, side, cost = max(
        (values[f"share_{side}"], side, cost) for side, cost in zip(costs.resolutions, costs.backbone, strict=True)
    )
    wanted = values[f"oracle_share_{side}"]
    if share <= COLLAPSED_SHARE or wanted > COLLAPSED_SHARE:
        return None
    section, key = f"stages.{name}", f"alpha_{costs.unit}"
    said = f"{cost:.3g} {'GFLOPs' if costs.latency is None else 'ms'}"
    if cost == min(costs.backbone):
        reason = "the cheapest"
        change = f"lower {section}.eta ({stage.eta:g}) or raise {key} ({stage.alpha:g})"
    elif cost <= stage.alpha:
        reason = f"whose {said} are within {key} ({stage.alpha:g}), so nothing asks for less"
        change = f"lower {section}.{key} below it, or put model.resolutions further apart"
    else:
        reason = f"though its {said} are above {key} ({stage.alpha:g})"
        change = f"raise {section}.eta ({stage.eta:g})"
    return (
        f"{name}: the predictor has collapsed: {100 * share:.1f} % of the validation images go to {side} px, {reason}; "
        f"the oracle sends {100 * wanted:.1f} % there. {change[0].upper()}{change[1:]}; raise tau ({stage.tau:g}) or "
        f"tau_start, so that unused resolutions keep a gradient; or train stages.backbone for longer, so that "
        f"resolutions differ in what they get right"
    )
