"""The verdict: one sentence computed from the numbers, which says plainly when a static resolution does better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.evaluation.tables import cost_words, gflops, percent, signed

COLLAPSED_SHARE = 0.99


def judge(report: Mapping[str, Any]) -> dict[str, Any]:
    """`outcome`, `verdict` (text; its first sentence is the outcome) and `verdict_details` (further sentences).

    Outcomes: `dominated` (a static resolution costs no more and is no less accurate), `below_line` (below the line
    between the neighbouring static resolutions at equal cost), `unproven` (above it, but the 95 % interval holds 0),
    `gain` (above it, and the interval is above 0), `single_resolution` (nothing to route).
    """
    rows = {row["id"]: row for row in report["rows"]}
    if report["comparisons"] is None:
        row = report["headline"]
        text = (
            f"There is one resolution, so nothing is routed: {row['label']} reaches {percent(row['top1'])} "
            f"(95 % CI {percent(row['top1_low'])} to {percent(row['top1_high'])}) "
            f"at {gflops(row['mean_cost'])} {cost_words(report).unit}."
        )
        return {"outcome": "single_resolution", "verdict": text, "verdict_details": []}
    line = report["comparisons"]["interpolation"]
    dominating = _dominating(report, rows)
    if dominating is not None:
        outcome, text = "dominated", _dominated_text(report, dominating)
    elif line["difference_points"] <= 0:
        sure = "Static wins" if line["high_points"] < 0 else "Routing shows no gain"
        outcome = "below_line"
        text = (
            f"{sure}: at equal {cost_words(report).noun} the routed network is {_against_line(report, rows)}. "
            f"{_trade(report, rows)}."
        )
    elif line["low_points"] <= 0:
        outcome = "unproven"
        text = (
            f"A gain is not proven: the routed network is {_against_line(report, rows)}, an interval that holds 0. "
            f"{_trade(report, rows)}."
        )
    else:
        outcome, text = "gain", f"{_trade(report, rows)}, and {_against_line(report, rows)}."
    return {"outcome": outcome, "verdict": text, "verdict_details": list(_details(report, rows))}


def _dominating(report: Mapping[str, Any], rows: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The most accurate static resolution that costs no more than the routed network and is no less accurate."""
    routed = rows["routed"]
    better = [
        row
        for row in report["rows"]
        if row["kind"] == "static" and row["mean_cost"] <= routed["mean_cost"] and row["top1"] >= routed["top1"]
    ]
    return max(better, key=lambda row: (row["top1"], -row["mean_cost"])) if better else None


def _dominated_text(report: Mapping[str, Any], static: Mapping[str, Any]) -> str:
    found = report["comparisons"][static["id"]]
    points, low, high = (-found[key] for key in ("difference_points", "high_points", "low_points"))
    clearly = low > 0 and points >= 0.05
    accurate = f"{points:.1f} points more accurate than" if clearly else "as accurate as"
    by = "" if clearly else f"{signed(points)} points, "
    return (
        f"Static wins: {static['label']} is {accurate} the routed network ({by}95 % CI {signed(low)} "
        f"to {signed(high)}, McNemar {_p(found['mcnemar_p'])}) at {1 / found['cost_ratio']:.2f} of its "
        f"{cost_words(report).noun}."
    )


def _trade(report: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    """The routed network against the most accurate static resolution, without a full stop."""
    best, found = rows[report["best_static"]], report["comparisons"][report["best_static"]]
    return (
        f"At {found['cost_ratio']:.2f} of the {cost_words(report).noun} of {best['label']} the routed network is "
        f"{_side(found['difference_points'], 'it')} ({_interval(found)})"
    )


def _against_line(report: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    found, line = report["comparisons"]["interpolation"], rows["interpolation"]
    equal = f"at equal {cost_words(report).noun}"
    if sum(share > 0 for share in line["shares"]) == 1:
        ends = rows["routed"]["mean_cost"] > line["mean_cost"] * (1 + 1e-9)
        where = ", where the static line ends" if ends else f" {equal}"
        return f"{_side(found['difference_points'], line['label'])}{where} ({_interval(found)})"
    lower, upper = (side for side, share in zip(report["resolutions"], line["shares"], strict=True) if share > 0)
    return (
        f"{_side(found['difference_points'], 'the line')} between static {min(lower, upper)} px and "
        f"{max(lower, upper)} px {equal} ({_interval(found)})"
    )


def _details(report: Mapping[str, Any], rows: Mapping[str, Any]) -> Iterator[str]:
    shares = rows["routed"]["shares"]
    most = max(range(len(shares)), key=lambda j: shares[j])
    if shares[most] >= COLLAPSED_SHARE:
        yield (
            f"The predictor sends {percent(shares[most])} of the images to {report['resolutions'][most]} px: "
            "the choice has collapsed, which leaves a static network that also pays for a predictor."
        )
    found = report["comparisons"]["random"]
    yield (
        "Choosing by looking at the image, rather than at random with the same shares, is worth "
        f"{signed(found['difference_points'])} points ({_interval(found)})."
    )
    oracle, routing = rows["oracle"], report["routing"]
    yield (
        f"An oracle, which knows the cheapest resolution that is right, would reach {percent(oracle['top1'])} at "
        f"{gflops(oracle['mean_cost'])} {cost_words(report).unit}. Of the routed network's {routing['wrong']} wrong "
        f"answers, {routing['wrong_but_right_elsewhere']} are right at another resolution."
    )


def _side(points: float, what: str) -> str:
    if abs(points) < 0.05:
        return f"level with {what}"
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'} {what}"


def _interval(found: Mapping[str, Any]) -> str:
    return f"95 % CI {signed(found['low_points'])} to {signed(found['high_points'])}"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"
