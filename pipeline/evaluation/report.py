"""The report of a run: what dynamic resolution saves and costs, beside every static resolution of the same backbone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from datasets.files import write_whole
from pipeline.evaluation.budget import budget_curve
from pipeline.evaluation.figures import draw_figures, draw_gallery, pick_tiles
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.render import render_html, render_markdown
from pipeline.evaluation.statistics import (
    COLLAPSED_SHARE,
    CONFIDENCE,
    RESAMPLES,
    Estimate,
    Resamples,
    accuracy,
    by_attribute,
    line_accuracy,
    line_neighbours,
    mcnemar_p,
    oracle_choice,
    paired_difference,
    percentile_interval,
    resample,
    shares,
)
from pipeline.evaluation.style import DARK, LIGHT
from pipeline.evaluation.tables import cost_words, gflops, percent, signed
from pipeline.models.cost import Costs, Latency


def table_rows(
    correct_NR: np.ndarray, chosen_N: np.ndarray, oracle_N: np.ndarray, costs: Costs, resampled: Resamples
) -> list[dict[str, Any]]:
    """The rows, each with `id`, `kind`, `label`, `resolution`, `n`, `top1`, `top1_low`, `top1_high`, `interval` (its
    method), `mean_gflops`, `backbone_gflops` (without the predictor), `mean_cost` (in the report's unit of cost, which
    is what is compared by) and `shares` (per resolution).

    Kinds: `static` (one a resolution), then, with more than one resolution, `routed` (argmax of the predictor),
    `random` (the same shares drawn without looking: its expected accuracy sum_j share_j * accuracy_j, counted at the
    routed network's cost), `interpolation` (the line between the neighbouring static resolutions at the routed
    network's cost) and `oracle` (the cheapest resolution at which an image is right, else the cheapest; no predictor).
    """
    N, R = correct_NR.shape
    static_R = correct_NR.mean(axis=0)
    rows = static_rows(correct_NR, costs)
    if R == 1:
        return rows
    shares_R = shares(chosen_N, R)
    routed_cost = mean_costs(shares_R, costs, with_predictor=True)
    line_R = interpolation_shares(costs, routed_cost["mean_cost"])
    lower, upper = interpolation_ends(costs, routed_cost["mean_cost"])
    line_label = f"static {upper} px" if lower == upper else f"line, static {lower} to {upper} px"
    random = percentile_interval(static_R @ shares_R, random_accuracy(resampled))
    line = percentile_interval(static_R @ line_R, interpolation_accuracy(resampled, costs))
    return [
        *rows,
        result_row("routed", "routed", "routed", N, accuracy(_count_right(correct_NR, chosen_N), N), "wilson")
        | routed_cost,
        result_row("random", "random", "random, same shares", N, random, "bootstrap") | routed_cost,
        result_row("interpolation", "interpolation", line_label, N, line, "bootstrap")
        | mean_costs(line_R, costs, with_predictor=False),
        oracle_row(correct_NR, oracle_N, costs),
    ]


def static_rows(correct_NR: np.ndarray, costs: Costs) -> list[dict[str, Any]]:
    """The rows of `table_rows` of kind `static`."""
    N, R = correct_NR.shape
    return [
        result_row(
            f"static-{side}", "static", f"static {side} px", N, accuracy(int(correct_NR[:, j].sum()), N), "wilson"
        )
        | {"resolution": side}
        | mean_costs(np.eye(R)[j], costs, with_predictor=False)
        for j, side in enumerate(costs.resolutions)
    ]


def oracle_row(correct_NR: np.ndarray, oracle_N: np.ndarray, costs: Costs) -> dict[str, Any]:
    """The row of `table_rows` of kind `oracle`."""
    N, R = correct_NR.shape
    top1 = accuracy(_count_right(correct_NR, oracle_N), N)
    cost = mean_costs(shares(oracle_N, R), costs, with_predictor=False)
    return result_row("oracle", "oracle", "oracle", N, top1, "wilson") | cost


def compare(
    correct_NR: np.ndarray,
    chosen_N: np.ndarray,
    oracle_N: np.ndarray,
    costs: Costs,
    resampled: Resamples,
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """The routed network minus every other row, by that row's id, on the same images.

    Each with `difference_points`, `low_points`, `high_points`, `interval` (its method), `cost_ratio` and `gflops_ratio`
    (the routed network's over the other's; `cost_ratio` in the report's unit of cost). Against one fixed answer an
    image (static, oracle) also `only_routed_right`, `only_other_right` and `mcnemar_p` (exact, two-sided); null against
    the two mixtures.
    """
    by_id = {row["id"]: row for row in rows}
    routed, routed_N = by_id["routed"], _right(correct_NR, chosen_N)
    answers = {f"static-{side}": correct_NR[:, j] for j, side in enumerate(costs.resolutions)}
    answers["oracle"] = _right(correct_NR, oracle_N)
    mixtures = {"random": random_accuracy(resampled), "interpolation": interpolation_accuracy(resampled, costs)}
    found: dict[str, dict[str, Any]] = {}
    for other, other_N in answers.items():
        only_routed, only_other = int((routed_N & ~other_N).sum()), int((~routed_N & other_N).sum())
        difference = paired_difference(only_routed, only_other, len(routed_N))
        found[other] = difference_row(difference, "bonett-price", routed, by_id[other]) | {
            "only_routed_right": only_routed,
            "only_other_right": only_other,
            "mcnemar_p": mcnemar_p(only_routed, only_other),
        }
    for other, other_B in mixtures.items():
        gain = percentile_interval(routed["top1"] - by_id[other]["top1"], resampled.routed_B - other_B)
        found[other] = difference_row(gain, "bootstrap", routed, by_id[other]) | dict.fromkeys(
            ("only_routed_right", "only_other_right", "mcnemar_p")
        )
    return {row["id"]: found[row["id"]] for row in rows if row["id"] in found}


def random_accuracy(resampled: Resamples) -> np.ndarray:
    """(B,): expected accuracy of random routing with the resample's shares."""
    return (resampled.shares_BR * resampled.static_BR).sum(axis=1)


def interpolation_accuracy(resampled: Resamples, costs: Costs) -> np.ndarray:
    """(B,): accuracy on the static line at the resample's routed cost, predictor included."""
    routed_cost_B = resampled.shares_BR @ np.asarray(costs.backbone) + costs.predictor
    return line_accuracy(costs.backbone, resampled.static_BR, routed_cost_B)


def interpolation_shares(costs: Costs, cost: float) -> np.ndarray:
    """(R,): the mixture of the two neighbouring static resolutions that costs `cost`."""
    lower, upper, weight = line_neighbours(costs.backbone, np.array([cost]))
    identity = np.eye(len(costs.resolutions))
    return (1 - weight[0]) * identity[lower[0]] + weight[0] * identity[upper[0]]


def interpolation_ends(costs: Costs, cost: float) -> tuple[int, int]:
    """Sides in pixels of the cheaper and the dearer neighbour; both the dearest where `cost` lies beyond it."""
    lower, upper, weight = line_neighbours(costs.backbone, np.array([cost]))
    dearer = costs.resolutions[upper[0]]
    return (dearer if weight[0] == 1 else costs.resolutions[lower[0]]), dearer


def _right(correct_NR: np.ndarray, choice_N: np.ndarray) -> np.ndarray:
    return correct_NR[np.arange(len(choice_N)), choice_N]


def _count_right(correct_NR: np.ndarray, choice_N: np.ndarray) -> int:
    return int(_right(correct_NR, choice_N).sum())


def result_row(identity: str, kind: str, label: str, n: int, top1: Estimate, interval: str) -> dict[str, Any]:
    """A row of `table_rows` without its cost."""
    return {
        "id": identity,
        "kind": kind,
        "label": label,
        "resolution": None,
        "n": n,
        "top1": float(top1.value),
        "top1_low": top1.low,
        "top1_high": top1.high,
        "interval": interval,
    }


def mean_costs(shares_R: Sequence[float] | np.ndarray, costs: Costs, with_predictor: bool) -> dict[str, Any]:
    """The cost of a row of `table_rows`, from its shares."""
    shares_list = [float(share) for share in shares_R]
    return {
        "mean_gflops": costs.mean_gflops(shares_list, with_predictor),
        "backbone_gflops": costs.mean_gflops(shares_list, with_predictor=False),
        "mean_cost": costs.mean(shares_list, with_predictor),
        "shares": shares_list,
    }


def difference_row(
    difference: Estimate, interval: str, routed: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, Any]:
    """One of the differences of `compare`, without its tests."""
    return {
        "difference_points": 100 * float(difference.value),
        "low_points": 100 * difference.low,
        "high_points": 100 * difference.high,
        "interval": interval,
        "cost_ratio": routed["mean_cost"] / other["mean_cost"],
        "gflops_ratio": routed["mean_gflops"] / other["mean_gflops"],
    }


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
    if shares[most] > COLLAPSED_SHARE:
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


SCHEMA_VERSION = 2
BOOTSTRAP_SEED = 0
FIGURES = ("tradeoff", "budget", "shares", "attribute", "gallery")


def build_report(
    predictions: Predictions,
    costs: Costs,
    *,
    classes: Sequence[str],
    attributes: Mapping[str, Sequence[float]],
    name: str,
    context: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that report.json holds, as plain Python values without NaN.

    Args:
        classes: names of the K classes.
        attributes: for each attribute one value for every image of the validation beton, in its order.
        name: of the run.
        context: `dataset`, `git_commit`, `created` (ISO 8601) and `references` (published results of others, a list of
            `{"label", "top1", "note"}`) where they are known; all else is put under `environment`.

    Returns:
        Accuracies are fractions of 1, differences points (percent), GFLOPs 1e9 multiply-adds an image. What is called
        cost is in the unit that `costs` names, gflops or (measured) milliseconds, and is what is compared by. Lists
        over resolutions follow `resolutions`, largest first. Keys: `schema_version`, `name`, `created`, `git_commit`,
        `dataset`, `n`, `num_classes`, `classes`, `resolutions`, `costs`; `outcome`, `verdict`, `verdict_details` (see
        `verdict.judge`); `headline` (what the model reaches as deployed); `best_static` (id of a row); `rows` (see
        `comparison.table_rows`); `comparisons` (row id -> the routed network against it, see `comparison.compare`);
        `budget_curve` (see `budget.budget_curve`); `routing`; `attributes`; `majority_class_top1`; `references`;
        `method`; `environment`. With one resolution `comparisons` and `routing` are null, `budget_curve` is empty.

    Raises:
        ValueError: predictions, costs, classes and attributes do not belong together.
    """
    problems = list(_mismatches(predictions, costs, classes, attributes))
    if problems:
        raise ValueError(f"no report can be made: {'; '.join(problems)}")
    correct_NR, chosen_N = predictions.correct_NR, predictions.chosen_N
    oracle_N = oracle_choice(correct_NR, costs.backbone)
    resampled = resample(correct_NR, chosen_N, BOOTSTRAP_SEED)
    rows = table_rows(correct_NR, chosen_N, oracle_N, costs, resampled)
    routed = len(costs.resolutions) > 1
    report = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "created": context.get("created"),
        "git_commit": context.get("git_commit"),
        "dataset": context.get("dataset"),
        "n": predictions.num_images,
        "num_classes": len(classes),
        "classes": list(classes),
        "resolutions": list(costs.resolutions),
        "costs": {
            "unit": costs.unit,
            "backbone_gflops": list(costs.backbone_gflops),
            "predictor_gflops": costs.predictor_gflops,
            "latency": None if costs.latency is None else _latency(costs.latency),
        },
        "headline": next(row for row in rows if row["kind"] == ("routed" if routed else "static")),
        "best_static": max((row for row in rows if row["kind"] == "static"), key=_accurate_then_cheap)["id"],
        "rows": rows,
        "comparisons": compare(correct_NR, chosen_N, oracle_N, costs, resampled, rows) if routed else None,
        "budget_curve": budget_curve(predictions.predictor_logits_NR, correct_NR, costs) if routed else [],
        "routing": _routing(correct_NR, chosen_N, oracle_N) if routed else None,
        "attributes": {
            attribute: by_attribute(np.asarray(values, np.float64)[predictions.indices_N], correct_NR, chosen_N, costs)
            for attribute, values in attributes.items()
        },
        "majority_class_top1": float(np.bincount(predictions.labels_N).max() / predictions.num_images),
        "references": [
            {"label": str(found["label"]), "top1": float(found["top1"]), "note": str(found.get("note", ""))}
            for found in context.get("references", ())
        ],
        "method": {"confidence": CONFIDENCE, "bootstrap_resamples": RESAMPLES, "bootstrap_seed": BOOTSTRAP_SEED},
        "environment": {key: value for key, value in context.items() if key not in _NAMED_CONTEXT},
    }
    return report | judge(report)


def write_report(
    folder: Path,
    predictions: Predictions,
    costs: Costs,
    *,
    classes: Sequence[str],
    attributes: Mapping[str, Sequence[float]],
    read_image: Callable[[int], bytes] | None,
    name: str,
    context: Mapping[str, Any],
) -> dict[str, Any]:
    """Write report.json, report.md, report.html and the figures into `folder`; returns what report.json holds.

    Each file is whole or absent, and report.json comes last. Figures of an earlier report that this one does not have
    are removed.

    Args:
        read_image: JPEG bytes of the image at an index of the validation beton, for the gallery; None leaves it out.

    Raises:
        ValueError: as `build_report`, or `context` holds what JSON cannot.
    """
    created = datetime.now(UTC).isoformat(timespec="seconds")
    report = build_report(
        predictions,
        costs,
        classes=classes,
        attributes=attributes,
        name=name,
        context={"created": created, **context},
    )
    text = to_json(report)
    tiles = [] if read_image is None else pick_tiles(predictions, classes, read_image)
    light, dark = draw_figures(report, LIGHT), draw_figures(report, DARK)
    files = {f"{figure}.png": content for figure, content in light.items()}
    if tiles:
        files["gallery.png"] = draw_gallery(tiles, report)
    files["report.md"] = render_markdown(report, files).encode()
    files["report.html"] = render_html(report, light, dark, tiles).encode()
    files["report.json"] = text.encode()
    folder.mkdir(parents=True, exist_ok=True)
    for figure in FIGURES:
        if f"{figure}.png" not in files:
            (folder / f"{figure}.png").unlink(missing_ok=True)
    for file, content in files.items():
        write_whole(folder / file, content)
    return report


def to_json(report: Mapping[str, Any]) -> str:
    """Strict JSON.

    Raises:
        ValueError: a value is NaN, infinite, or of a type that JSON does not have.
    """
    try:
        return json.dumps(report, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"the report holds what JSON cannot: {error}; give context as text and numbers") from error


_NAMED_CONTEXT = ("dataset", "git_commit", "created", "references")


def _accurate_then_cheap(row: Mapping[str, Any]) -> tuple[float, float]:
    return row["top1"], -row["mean_cost"]


def _mismatches(
    predictions: Predictions, costs: Costs, classes: Sequence[str], attributes: Mapping[str, Sequence[float]]
) -> Iterator[str]:
    if predictions.num_images == 0:
        yield "there are no predictions"
        return
    if predictions.resolutions != tuple(costs.resolutions):
        yield f"predictions are for {list(predictions.resolutions)} px, costs for {list(costs.resolutions)} px"
    if len(classes) != predictions.num_classes:
        yield f"there are {len(classes)} class names for {predictions.num_classes} logits"
    last = int(predictions.indices_N.max())
    for name, values in attributes.items():
        if len(values) <= last:
            yield f"attribute {name} has {len(values)} values, but image {last} was predicted"
        elif not np.isfinite(np.asarray(values, np.float64)).all():
            yield f"attribute {name} has values that are NaN or infinite"


def _latency(latency: Latency) -> dict[str, Any]:
    """What was measured, and in a line how: `measured`."""
    sides = list(latency.backbone_milliseconds)
    return asdict(latency) | {"backbone_milliseconds": sides, "measured": str(latency)}


def _routing(correct_NR: np.ndarray, chosen_N: np.ndarray, oracle_N: np.ndarray) -> dict[str, Any]:
    """How the predictor's choice compares with the oracle's, and how hard the images of each choice are."""
    R = correct_NR.shape[1]
    chosen_NR = chosen_N[:, None] == np.arange(R)
    counts_R = chosen_NR.sum(axis=0)
    right_RR = chosen_NR.T.astype(np.int64) @ correct_NR
    right_N = correct_NR[np.arange(len(chosen_N)), chosen_N]
    anywhere_N = np.any(correct_NR, axis=1)
    confusion_RR = chosen_NR.T.astype(np.int64) @ (oracle_N[:, None] == np.arange(R))
    return {
        "counts_by_chosen": counts_R.tolist(),
        "static_top1_by_chosen": [
            (right_RR[j] / counts_R[j]).tolist() if counts_R[j] else [None] * R for j in range(R)
        ],
        "chosen_by_oracle": confusion_RR.tolist(),
        "right_nowhere_by_chosen": (chosen_NR & ~anywhere_N[:, None]).sum(axis=0).tolist(),
        "agreement_with_oracle": float((chosen_N == oracle_N).mean()),
        "wrong": int((~right_N).sum()),
        "wrong_but_right_elsewhere": int((~right_N & anywhere_N).sum()),
    }
