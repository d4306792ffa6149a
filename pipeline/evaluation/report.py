"""Report what dynamic resolution saves and costs, compared with every static resolution of the same backbone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datasets.files import write_whole
from pipeline.evaluation.budget import budget_curve
from pipeline.evaluation.comparison import (
    BOOTSTRAP_SEED,
    HeldOut,
    class_table,
    compare,
    curve_points,
    predictor_gains,
    table_rows,
)
from pipeline.evaluation.figures import Tile, draw_figures, draw_gallery, pick_tiles
from pipeline.evaluation.gate import ANSWERS_FILE, Answers
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.render import render_html, render_markdown
from pipeline.evaluation.statistics import COLLAPSED_SHARE, CONFIDENCE, RESAMPLES, by_attribute, class_weights
from pipeline.evaluation.style import DARK, LIGHT
from pipeline.evaluation.tables import cost_words, gflops, percent, signed
from pipeline.models.cost import Costs, Latency
from pipeline.policies.calibrate import ALL, Budget, Calibration, Split, calibrate
from pipeline.policies.fit import FittedPolicy
from pipeline.policies.route import Images, route
from pipeline.serving.runtime.policy import Policy


def judge(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return `outcome`, `verdict` (a text that states the outcome) and `verdict_details` (further sentences).

    If predictors were compared, the first sentence says at which costs a predictor pays off.

    Outcomes: `constant` (not proven better than always answering the most frequent class), `static` (the chosen policy
    is a static resolution), `dominated` (a static resolution costs no more and is no less accurate), `below_line`
    (below the envelope of the static resolutions at equal cost), `unproven` (above the envelope, but one of the 95 %
    intervals against envelope and random contains 0), `gain` (above both, with both intervals), `single_resolution`
    (nothing to route).
    """
    rows = {row["id"]: row for row in report["rows"]}
    words = cost_words(report)
    if (constant := _constant(report)) is not None:
        return {"outcome": "constant", "verdict": constant, "verdict_details": []}
    if report["comparisons"] is None:
        row = report["headline"]
        text = (
            f"There is only one resolution, so nothing is routed: {row['label']} reaches {percent(row['top1'])} "
            f"(95 % CI {percent(row['top1_low'])} to {percent(row['top1_high'])}) "
            f"at {gflops(row['mean_cost'])} {words.unit}."
        )
        return {"outcome": "single_resolution", "verdict": text, "verdict_details": []}
    line, random = report["comparisons"]["envelope"], report["comparisons"]["random"]
    dominating = _dominating(report, rows)
    if report["policies"]["chosen"]["kind"] == "static":
        outcome = "static"
        label = rows["routed"]["label"].removeprefix("routed: ")
        text = f"Static wins: within the budget no policy is better than {label}. {_trade(report, rows)}."
    elif dominating is not None:
        outcome, text = "dominated", _dominated_text(report, dominating)
    elif line["difference_points"] <= 0:
        sure = "Static wins" if line["high_points"] < 0 else "Routing shows no gain"
        outcome = "below_line"
        text = f"{sure}: the routed network is {_against_envelope(report)}. {_trade(report, rows)}."
    elif min(line["low_points"], random["low_points"]) <= 0:
        outcome = "unproven"
        text = (
            f"A gain is not proven: the routed network is {_against_envelope(report)}, and "
            f"{_side(random['difference_points'], 'random routing')} ({_interval(random)}); an interval contains 0. "
            f"{_trade(report, rows)}."
        )
    else:
        outcome, text = "gain", f"{_trade(report, rows)}, and {_against_envelope(report)}."
    text = " ".join(filter(None, (predictor_sentence(report), text)))
    if report["compared_by"] == "balanced_top1":
        text = f"Accuracy is the mean over the classes here. {text}"
    return {"outcome": outcome, "verdict": text, "verdict_details": list(_details(report, rows))}


def _constant(report: Mapping[str, Any]) -> str | None:
    """Return the verdict that the model is no better than a constant answer, unless an accuracy proves otherwise."""
    head, majority = report["headline"], report["majority_class_top1"]
    if head["top1_low"] > majority or head["balanced_low"] > 1 / len(report["by_class"]):
        return None
    return (
        f"No better than a constant answer: {head['label']} reaches {percent(head['top1'])} (95 % CI "
        f"{percent(head['top1_low'])} to {percent(head['top1_high'])}), and always answering the most frequent class "
        f"reaches {percent(majority)}. Its mean accuracy over the classes is {percent(head['balanced_top1'])}."
    )


def predictor_sentence(report: Mapping[str, Any]) -> str | None:
    """Say whether and at which costs a predictor pays off. Return None if no predictor was compared."""
    found = report.get("predictor")
    if found is None or not found["points"]:
        return None
    unit = cost_words(report).unit
    if found["pays_from"] is None:
        best = max(found["points"], key=lambda point: point["difference_points"])
        return (
            "A predictor does not pay off here: at no cost is a policy with a predictor proven more accurate than the "
            f"best policy without one (at best {signed(best['difference_points'])} points at "
            f"{gflops(best['mean_cost'])} {unit}, simultaneous {_interval(best)})."
        )
    best = max(found["points"], key=lambda point: point["low_points"])
    costs = [gflops(found[key]) for key in ("pays_from", "pays_to")]
    num_paying, num_limits = sum(point["low_points"] > 0 for point in found["points"]), len(found["points"])
    where = f"a cost limit of {costs[0]} {unit}"
    if num_paying > 1:
        where = f"{num_paying} of {num_limits} cost limits, between {costs[0]} and {costs[1]} {unit}"
    return (
        f"A predictor pays off at {where}: {best['kind']} is {best['difference_points']:.1f} points more accurate than "
        f"the best policy without a predictor at {gflops(best['mean_cost'])} {unit} (simultaneous {_interval(best)})."
    )


def _dominating(report: Mapping[str, Any], rows: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the most accurate static resolution that costs no more than the routed network and is no less accurate."""
    routed, key = rows["routed"], report["compared_by"]
    better = [
        row
        for row in report["rows"]
        if row["kind"] in STATIC_KINDS and row["mean_cost"] <= routed["mean_cost"] and row[key] >= routed[key]
    ]
    return max(better, key=lambda row: (row[key], -row["mean_cost"])) if better else None


def _dominated_text(report: Mapping[str, Any], static: Mapping[str, Any]) -> str:
    found = report["comparisons"][static["id"]]
    points, low, high = (-found[key] for key in ("difference_points", "high_points", "low_points"))
    clearly = low > 0 and points >= 0.05
    accurate = f"{points:.1f} points more accurate than" if clearly else "at least as accurate as"
    by = "" if clearly else f"{signed(points)} points, "
    test = "" if found["mcnemar_p"] is None else f", McNemar {_p(found['mcnemar_p'])}"
    return (
        f"Static wins: {static['label']} is {accurate} the routed network ({by}95 % CI {signed(low)} "
        f"to {signed(high)}{test}) at {1 / found['cost_ratio']:.2f} of its "
        f"{cost_words(report).noun}."
    )


def _trade(report: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    """Compare the routed network with the most accurate static resolution, in a sentence without a period."""
    best, found = rows[report["best_static"]], report["comparisons"][report["best_static"]]
    return (
        f"At {found['cost_ratio']:.2f} of the {cost_words(report).noun} of {best['label']} the routed network is "
        f"{_side(found['difference_points'], 'it')} ({_interval(found)})"
    )


def _against_envelope(report: Mapping[str, Any]) -> str:
    found = report["comparisons"]["envelope"]
    what = f"the envelope of the static resolutions at equal {cost_words(report).noun}"
    return f"{_side(found['difference_points'], what)} ({_interval(found)})"


def _details(report: Mapping[str, Any], rows: Mapping[str, Any]) -> Iterator[str]:
    shares = rows["routed"]["shares"]
    most = max(range(len(shares)), key=lambda j: shares[j])
    chosen = report["policies"]["chosen"]
    if shares[most] > COLLAPSED_SHARE and chosen["kind"] != "static":
        yield (
            f"{percent(shares[most])} of the images are answered at {report['resolutions'][most]} px: the routing has "
            "collapsed. The result is a static network that also pays for the routing."
        )
    yield from _rivals(report, rows)
    found = report["comparisons"]["random"]
    yield (
        "Compared with random routing with the same shares, choosing by the image changes accuracy by "
        f"{signed(found['difference_points'])} points ({_interval(found)})."
    )
    oracle, routing, key = rows["oracle"], report["routing"], report["compared_by"]
    yield (
        f"An oracle, which knows the cheapest correct resolution, would reach {percent(oracle[key])} at "
        f"{gflops(oracle['mean_cost'])} {cost_words(report).unit}. Of the routed network's {routing['wrong']} wrong "
        f"answers, {routing['wrong_but_right_elsewhere']} are correct at another resolution."
    )
    if "placebo" in rows:
        placebo = rows["placebo"]
        static = next(row for row in report["rows"] if row["kind"] == "static" and row["shares"] == placebo["shares"])
        placebo_points, oracle_points = (100 * (row[key] - static[key]) for row in (placebo, oracle))
        yield (
            f"The oracle is {oracle_points:.1f} points above {static['label']}. The {placebo['label']}, whose crops "
            f"differ only by a small shift, is {placebo_points:.1f} points above it by luck alone."
        )


def _rivals(report: Mapping[str, Any], rows: Mapping[str, Any]) -> Iterator[str]:
    """Yield sentences that compare the chosen policy with the best policy of each other kind that costs no more."""
    for row in report["rows"]:
        if row["kind"] == "policy" and row["policy"] not in ("static", report["policies"]["chosen"]["kind"]):
            found = report["comparisons"][row["id"]]
            yield (
                f"The best {row['label']} that costs no more reaches {percent(row[report['compared_by']])} at "
                f"{gflops(row['mean_cost'])} {cost_words(report).unit}: the chosen policy is "
                f"{_side(found['difference_points'], 'it')} ({_interval(found)})."
            )


def _side(points: float, what: str) -> str:
    if abs(points) < 0.05:
        return f"level with {what}"
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'} {what}"


def _interval(found: Mapping[str, Any]) -> str:
    return f"95 % CI {signed(found['low_points'])} to {signed(found['high_points'])}"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


SCHEMA_VERSION = 3
FIGURES = ("tradeoff", "budget", "shares", "attribute", "gallery")
STATIC_KINDS = ("static", "other")
"""The kinds of rows that are static networks."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The inputs of a report.

    Attributes:
        predictions: predictions of the network that is deployed.
        other: predictions of another network that could have been deployed, on the same images: the one from before the
            joint stage, or from after it.
        other_name: short description of that network, such as "before joint".
        keys_N: uint64 keys that identify the images, such as the checksums of their bytes; they decide the split.
        budget: the budget by which a policy is chosen.
        split: which images policies are fitted on, and which results are reported on.
        balanced: whether policies are chosen by the mean accuracy over the classes.
        has_predictor: whether the predictor was trained; otherwise no policy uses it.
    """

    predictions: Predictions
    costs: Costs
    keys_N: np.ndarray
    other: Predictions | None = None
    other_name: str = "before joint"
    budget: Budget = field(default_factory=Budget)
    split: Split = field(default_factory=Split)
    balanced: bool = False
    has_predictor: bool = True

    @cached_property
    def images(self) -> Images:
        """All validation images, as policies need them."""
        labels_N, weights_N = self.predictions.labels_N, None
        if self.balanced:
            weights_N = class_weights(labels_N)
        predictor_NR = self.predictions.predictor_logits_NR if self.has_predictor else None
        logits = self.predictions.logits_NRK, labels_N, predictor_NR
        return Images.of(*logits, self.costs, weights_N, self.predictions.extents_N)

    @cached_property
    def calibration(self) -> Calibration | None:
        """The fitted policies; None with one resolution."""
        if len(self.costs.resolutions) == 1:
            return None
        return calibrate(self.images, self.keys_N, self.budget, self.split)

    @property
    def held_out_M(self) -> np.ndarray:
        """The rows of the images that results are reported on: with one resolution, of all images."""
        return np.arange(self.predictions.num_images) if self.calibration is None else self.calibration.held_out


def build_report(
    evaluation: Evaluation,
    *,
    classes: Sequence[str],
    attributes: Mapping[str, Sequence[float]],
    name: str,
    context: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of report.json, as plain Python values without NaN.

    Args:
        classes: names of the K classes.
        attributes: maps the name of an attribute to one value per image of the validation beton, in its order.
        name: name of the run.
        context: `dataset`, `git_commit`, `created` (ISO 8601) and `references` (published results of others, a list of
            `{"label", "top1", "note"}`) if known; all other keys are stored under `environment`.

    Returns:
        Accuracies are fractions of 1, differences are percentage points, GFLOPs are 1e9 multiply-adds per image. Costs
        are in the unit of the run, GFLOPs or measured milliseconds, and comparisons use them. Lists over resolutions
        follow `resolutions`, largest first. Keys: `schema_version`, `name`, `created`, `git_commit`, `dataset`, `n`
        (number of held-out images that results are reported on), `num_classes`, `classes`, `resolutions`, `costs`;
        `outcome`, `verdict`, `verdict_details` (see `judge`); `headline` (the deployed model's results); `best_static`
        (id of a row); `compared_by` (the key of the rows that is compared, top1 or balanced_top1); `rows` (see
        `comparison.table_rows`); `comparisons` (maps a row's id to the routed network's difference from it, see
        `comparison.compare`); `policies` (see `_policies`); `predictor` (whether a predictor pays off, see
        `comparison.predictor_gains`; null without one); `budget_curve` (see `budget.budget_curve`); `routing`;
        `by_class` (see `comparison.class_table`); `attributes`; `majority_class_top1`; `references`; `method`;
        `environment`. With one resolution, `comparisons`, `policies`, `predictor` and `routing` are null, and
        `budget_curve` is empty.

    Raises:
        ValueError: predictions, costs, classes and attributes do not belong together, or no policy meets the budget.
    """
    predictions, costs = evaluation.predictions, evaluation.costs
    problems = list(_mismatches(evaluation, classes, attributes))
    if problems:
        raise ValueError(f"cannot build a report: {'; '.join(problems)}")
    calibration = evaluation.calibration
    held_out_M = evaluation.held_out_M
    held_out = HeldOut(
        predictions.labels_N[held_out_M],
        predictions.correct_NR[held_out_M],
        None if evaluation.other is None else evaluation.other.correct_NR[held_out_M],
        evaluation.other_name,
        {} if calibration is None else calibration.routed,
        costs,
        predictions.shifted_correct_NV[held_out_M],
        evaluation.balanced,
    )
    labels = {} if calibration is None else _labels(calibration, costs)
    rows = table_rows(held_out, labels)
    statics, key = [row for row in rows if row["kind"] in STATIC_KINDS], held_out.top1_key
    last_N = held_out.routed[ALL].last_N if held_out.is_routed else np.zeros(len(held_out_M), np.int64)
    report = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "created": context.get("created"),
        "git_commit": context.get("git_commit"),
        "dataset": context.get("dataset"),
        "n": len(held_out_M),
        "num_classes": len(classes),
        "classes": list(classes),
        "resolutions": list(costs.resolutions),
        "costs": {
            "unit": costs.unit,
            "backbone_gflops": list(costs.backbone_gflops),
            "predictor_gflops": costs.predictor_gflops,
            "latency": None if costs.latency is None else _latency(costs.latency),
        },
        "headline": next(row for row in rows if row["kind"] == ("routed" if held_out.is_routed else "static")),
        "best_static": max(statics, key=lambda row: (row[key], -row["mean_cost"]))["id"],
        "compared_by": key,
        "rows": rows,
        "comparisons": compare(held_out, rows) if held_out.is_routed else None,
        "policies": None if calibration is None else _policies(calibration, evaluation, held_out),
        "predictor": predictor_gains(held_out, calibration.curves, calibration.costs_C)
        if calibration is not None and evaluation.has_predictor
        else None,
        "budget_curve": budget_curve(predictions.predictor_logits_NR[held_out_M], held_out.correct_NR, costs)
        if held_out.is_routed and evaluation.has_predictor
        else [],
        "routing": _routing(held_out.correct_NR, last_N, held_out.oracle_N) if held_out.is_routed else None,
        "by_class": class_table(held_out, classes),
        "attributes": {
            attribute: by_attribute(
                np.asarray(values, np.float64)[predictions.indices_N[held_out_M]], held_out.correct_NR, last_N, costs
            )
            for attribute, values in attributes.items()
        },
        "majority_class_top1": float(np.bincount(held_out.labels_N).max() / len(held_out_M)),
        "references": [
            {"label": str(found["label"]), "top1": float(found["top1"]), "note": str(found.get("note", ""))}
            for found in context.get("references", ())
        ],
        "method": {"confidence": CONFIDENCE, "bootstrap_resamples": RESAMPLES, "bootstrap_seed": BOOTSTRAP_SEED},
        "environment": {key: value for key, value in context.items() if key not in _NAMED_CONTEXT},
    }
    return report | judge(report)


def _labels(calibration: Calibration, costs: Costs) -> dict[str, str]:
    routed = f"routed: {described(calibration.chosen.policy, costs.resolutions)}"
    return {kind: kind for kind in calibration.routed} | {ALL: routed}


def described(policy: Policy, resolutions: Sequence[int]) -> str:
    """Describe a policy in a few words, such as `cascade 32, 48, 96 px`."""
    sides = ", ".join(str(resolutions[index]) for index in policy.members)
    return f"{policy.kind} {sides} px{' without enlarging' if policy.stops_exhausted else ''}"


def _policies(calibration: Calibration, evaluation: Evaluation, held_out: HeldOut) -> dict[str, Any]:
    """Return how policies were chosen.

    Keys: `budget` (`cost`, `max_drop`), `num_select` (images that each policy was fitted on), `folds` (null for two
    halves), `chosen` and `front` (each policy with `kind`, `label`, the fields of `Policy`, and its `cost` and expected
    `accuracy` on the images of the fit; `gflops` is its mean cost on the held-out images), and `curves` (maps a kind to
    `comparison.curve_points` on the held-out images).
    """
    resolutions, images = evaluation.costs.resolutions, evaluation.images.rows(calibration.held_out)

    def plain(point: FittedPolicy) -> dict[str, Any]:
        named = {"kind": point.policy.kind, "label": described(point.policy, resolutions)}
        values = point.policy.to_json() | {"cost": point.cost, "accuracy": point.accuracy}
        values["gflops"] = float(route(point.policy, images).gflops_N(evaluation.costs).mean())
        return named | {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    return {
        "budget": asdict(evaluation.budget),
        "num_select": calibration.num_select,
        "folds": calibration.folds,
        "chosen": plain(calibration.chosen),
        "front": [plain(point) for point in calibration.fronts[ALL]],
        "curves": {
            kind: curve_points(curve, held_out.correct_NR, evaluation.costs)
            for kind, curve in calibration.curves.items()
            if kind != "static"
        },
    }


def write_report(
    folder: Path,
    evaluation: Evaluation,
    *,
    classes: Sequence[str],
    attributes: Mapping[str, Sequence[float]],
    read_image: Callable[[int], bytes] | None,
    name: str,
    context: Mapping[str, Any],
) -> dict[str, Any]:
    """Write report.json, answers.npz, the pages and the figures into `folder`. Return the content of report.json.

    Each file is complete or absent, and report.json is written last. Figures of an earlier report that this report
    lacks are removed.

    Args:
        read_image: function from an index of the validation beton to JPEG bytes, for the gallery; None for no gallery.

    Raises:
        ValueError: as in `build_report`, or `context` contains a value that JSON cannot represent.
    """
    created = datetime.now(UTC).isoformat(timespec="seconds")
    report = build_report(
        evaluation,
        classes=classes,
        attributes=attributes,
        name=name,
        context={"created": created, **context},
    )
    text = to_json(report)
    tiles = [] if read_image is None else _tiles(evaluation, classes, read_image)
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
    _answers(evaluation, context, report).save(folder / ANSWERS_FILE)
    for file, content in files.items():
        write_whole(folder / file, content)
    return report


def _answers(evaluation: Evaluation, context: Mapping[str, Any], report: Mapping[str, Any]) -> Answers:
    """Return which held-out images the deployed policy classifies correctly, for the gate between registered models."""
    predictions, calibration = evaluation.predictions, evaluation.calibration
    held_out_M = evaluation.held_out_M
    indices_N, correct_NR = predictions.indices_N[held_out_M], predictions.correct_NR[held_out_M]
    correct_N = correct_NR[:, 0] if calibration is None else calibration.routed[ALL].correct_N(correct_NR)
    order_N = np.argsort(indices_N)
    return Answers(
        data_digest=str(context.get("data digest", "")),
        indices_N=indices_N[order_N],
        right_N=correct_N[order_N],
        mean_gflops=float(report["headline"]["mean_gflops"]),
        static_right_NR=correct_NR[order_N],
        static_gflops_R=np.asarray(evaluation.costs.backbone_gflops),
    )


def _tiles(evaluation: Evaluation, classes: Sequence[str], read_image: Callable[[int], bytes]) -> list[list[Tile]]:
    """Return the gallery's images: held-out images, grouped by the resolution whose answer counts."""
    calibration, shown = evaluation.calibration, evaluation.predictions.rows(evaluation.held_out_M)
    last_N = np.zeros(shown.num_images, np.int64) if calibration is None else calibration.routed[ALL].last_N
    return pick_tiles(shown, last_N, classes, read_image)


def to_json(report: Mapping[str, Any]) -> str:
    """Return the report as strict JSON.

    Raises:
        ValueError: a value is NaN, infinite, or of a type that JSON does not have.
    """
    try:
        return json.dumps(report, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"JSON cannot represent the report: {error}; give context as text and numbers") from error


_NAMED_CONTEXT = ("dataset", "git_commit", "created", "references")


def _mismatches(
    evaluation: Evaluation, classes: Sequence[str], attributes: Mapping[str, Sequence[float]]
) -> Iterator[str]:
    predictions, costs, other = evaluation.predictions, evaluation.costs, evaluation.other
    if predictions.num_images == 0:
        yield "there are no predictions"
        return
    if predictions.resolutions != tuple(costs.resolutions):
        yield f"predictions are for {list(predictions.resolutions)} px, costs for {list(costs.resolutions)} px"
    if len(classes) != predictions.num_classes:
        yield f"there are {len(classes)} class names for {predictions.num_classes} logits"
    if len(evaluation.keys_N) != predictions.num_images:
        yield f"there are {len(evaluation.keys_N)} keys for {predictions.num_images} images"
    if other is not None and not np.array_equal(other.indices_N, predictions.indices_N):
        yield f"the predictions {evaluation.other_name} are for other images"
    last = int(predictions.indices_N.max())
    for name, values in attributes.items():
        if len(values) <= last:
            yield f"attribute {name} has {len(values)} values, but image {last} was predicted"
        elif not np.isfinite(np.asarray(values, np.float64)).all():
            yield f"attribute {name} has values that are NaN or infinite"


def _latency(latency: Latency) -> dict[str, Any]:
    """Return the measured latency, with a description of the measurement under `measured`."""
    sides = list(latency.backbone_milliseconds)
    return asdict(latency) | {"backbone_milliseconds": sides, "measured": str(latency)}


def _routing(correct_NR: np.ndarray, chosen_N: np.ndarray, oracle_N: np.ndarray) -> dict[str, Any]:
    """Compare each answer's resolution with the oracle's, and measure how difficult each resolution's images are."""
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
