"""The tables and notes of a report as text, which Markdown and HTML both show."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BUDGET_ROWS = 9
POLICY_ROWS = 6
CLASS_ROWS = 20
BUDGET_NOTE = (
    "A bias b on the predictor's logits (logit_j + b * c_j) trades accuracy against cost without retraining. c_j is a "
    "resolution's GFLOPs on a scale from 0 (the cheapest) to 1 (the most expensive), in every report; b = 0 is the "
    "predictor as trained. The registered model takes b as `budget_bias`. Each interval holds for its point alone; "
    "differences are paired, against b = 0."
)

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""The header and the body of a table."""


@dataclass(frozen=True)
class CostWords:
    """The words that a report uses for its cost."""

    unit: str
    noun: str
    axis: str


_COST_WORDS = {
    "gflops": CostWords("GFLOPs", "FLOPs", "cost of one image, GFLOPs (1e9 multiply-adds, predictor included)"),
    "milliseconds": CostWords("ms", "time", "cost of one image, measured ms (predictor included)"),
}


def cost_words(report: Mapping[str, Any]) -> CostWords:
    """Return the words for the report's unit of cost."""
    return _COST_WORDS[report["costs"]["unit"]]


def cost_headers(report: Mapping[str, Any]) -> list[str]:
    """Return the headers of `cost_cells`: the report's unit, then GFLOPs if that is another unit."""
    return list(dict.fromkeys([cost_words(report).unit, "GFLOPs"]))


def cost_cells(report: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """Return the cost cells of a row or of a point of the budget curve."""
    both = {cost_words(report).unit: row["mean_cost"], "GFLOPs": row["mean_gflops"]}
    return [gflops(both[header]) for header in cost_headers(report)]


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. The first column is aligned left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join(f"| {' | '.join(cell(text) for text in line)} |" for line in lines)


def markdown_figure(name: str, caption: str, figures: Collection[str]) -> str:
    """Return a link to the figure, or an empty string if NAME.png is not one of `figures`."""
    return f"![{caption}]({name}.png)" if f"{name}.png" in figures else ""


def method_notes(report: Mapping[str, Any]) -> list[str]:
    """Return notes on how the numbers were measured, one or two sentences each."""
    method = report["method"]
    notes = [
        f"Top-1 on {report['n']:,} validation images, each counted once, with {method['confidence']:.0%} Wilson "
        f"intervals. Always answering the most frequent class would reach {percent(report['majority_class_top1'])}.",
        "Cost is GFLOPs (1e9 multiply-adds) per image, from torch's FLOP counter, which counts convolutions and matrix "
        "products. It includes the predictor where the predictor runs.",
    ]
    latency = report["costs"]["latency"]
    if latency is not None:
        notes.append(
            f"Cost in this report is measured time: {latency['measured']}. It leaves out decoding and resizing, and "
            "assumes that the images of one resolution arrive in full batches."
        )
    if report["comparisons"] is None:
        return notes
    against = "Bonett and Price's interval"
    if report["compared_by"] == "top1":
        against += " and McNemar's exact test"
    return [
        *notes,
        "Routed: the chosen policy. A static policy runs every image at one resolution. A predictor sends each image "
        "to one resolution. A cascade runs the cheapest resolution first and stops when the largest softmax "
        "probability reaches a threshold; otherwise it runs a larger one and pays for both.",
        "Random: images assigned to resolutions at random, with the same shares. Its accuracy is the exact "
        "expectation. It is listed at the routed network's cost, but would cost less: it needs no "
        "predictor and no second pass.",
        "Envelope: the upper concave envelope of all static networks. It is the accuracy of a random mix of two of "
        f"them at the same {cost_words(report).noun}. A routed network that is not above it saves nothing.",
        "Oracle: each image at the cheapest resolution that is correct, or at the cheapest of all if none is. No "
        "policy can be more accurate with this network. A placebo oracle chooses among as many answers, but all from "
        "the largest resolution, for crops that are shifted by a sixteenth of their side: what it gains is luck.",
        f"Differences are paired, on the same images: {against} against single networks; "
        f"{method['bootstrap_resamples']:,} bootstrap resamples of the images against mixtures.",
        "Intervals cover the choice of validation images, not the seed of the training: compare several seeds.",
    ]


def provenance(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return data set, date, commit, costs and machine as pairs of key and value."""
    named = {
        "backbone GFLOPs": ", ".join(
            f"{gflops(cost)} at {side} px"
            for side, cost in zip(report["resolutions"], report["costs"]["backbone_gflops"], strict=True)
        ),
        "predictor GFLOPs": gflops(report["costs"]["predictor_gflops"]),
        "classes": str(report["num_classes"]),
    }
    latency = report["costs"]["latency"]
    if latency is not None:
        sides = zip(report["resolutions"], latency["backbone_milliseconds"], strict=True)
        named["backbone ms"] = ", ".join(f"{gflops(cost)} at {side} px" for side, cost in sides)
        named["predictor ms"] = gflops(latency["predictor_milliseconds"])
        named["ms measured as"] = latency["measured"]
    return provenance_pairs(report, named)


def provenance_pairs(report: Mapping[str, Any], named: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return a report's data set, date and commit, then the pairs in `named`, then the report's environment."""
    about = {"data set": report["dataset"], "created": report["created"], "git commit": report["git_commit"]}
    pairs = [*about.items(), *named.items(), *report["environment"].items()]
    return [(str(key), str(value)) for key, value in pairs if value is not None]


def percent(fraction: float | None, digits: int = 1) -> str:
    """Format a fraction of 1 as percent."""
    return "-" if fraction is None else f"{100 * fraction:.{digits}f} %"


def interval(row: Mapping[str, Any], digits: int = 1) -> str:
    """Return the interval of a row's top-1, in percent."""
    return f"{100 * row['top1_low']:.{digits}f} to {100 * row['top1_high']:.{digits}f}"


def signed(points: float) -> str:
    """Format a difference with its sign and one decimal; zero is +0.0."""
    return f"{round(points, 1) + 0.0:+.1f}"


def gflops(value: float) -> str:
    """Format a cost with three significant digits, never in scientific notation."""
    return np.format_float_positional(value, precision=3, unique=False, fractional=False, trim="k").rstrip(".")


def p_value(value: float | None) -> str:
    """Format a p value. None, which means no test, becomes a dash."""
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def result_table(report: Mapping[str, Any], digits: int = 1) -> Table:
    """Return the table of all rows: accuracy with interval, cost, shares."""
    sides = report["resolutions"]
    body = [
        (
            row["label"],
            percent(row["top1"], digits),
            interval(row, digits),
            percent(row["balanced_top1"]),
            *cost_cells(report, row),
            *(percent(share) if share else "" for share in row["shares"]),
        )
        for row in report["rows"]
    ]
    return ("", "top-1", "95 % interval", "balanced", *cost_headers(report), *(f"at {side} px" for side in sides)), body


def reference_table(report: Mapping[str, Any]) -> Table:
    """Return the table of published results of others."""
    return ("", "top-1", "protocol"), [
        (reference["label"], percent(reference["top1"]), reference["note"]) for reference in report["references"]
    ]


def comparison_table(report: Mapping[str, Any]) -> Table:
    """Return the table of the routed network minus every other row."""
    labels = {row["id"]: row["label"] for row in report["rows"]}
    body = [
        (
            labels[other],
            signed(found["difference_points"]),
            f"{signed(found['low_points'])} to {signed(found['high_points'])}",
            f"{found['cost_ratio']:.2f}",
            "-" if found["mcnemar_p"] is None else f"{found['only_routed_right']:,} / {found['only_other_right']:,}",
            p_value(found["mcnemar_p"]),
        )
        for other, found in report["comparisons"].items()
    ]
    ratio = f"{cost_words(report).noun} ratio"
    return ("routed minus", "points", "95 % interval", ratio, "only routed / only other correct", "McNemar p"), body


def budget_table(report: Mapping[str, Any]) -> Table:
    """Return the table of a few points of the budget curve."""
    sides = (f"at {side} px" for side in report["resolutions"])
    header = ("bias b", *cost_headers(report), "top-1", "95 % interval", "points against b = 0", *sides)
    return header, [
        (
            bias_text(point["budget_bias"]),
            *cost_cells(report, point),
            percent(point["top1"]),
            interval(point),
            _against_trained(point),
            *(percent(share) if share else "" for share in point["shares"]),
        )
        for point in every(report["budget_curve"], BUDGET_ROWS)
    ]


def policy_note(report: Mapping[str, Any]) -> str:
    """Say which images policies were fitted on, which budget chose one, and which images the numbers are for."""
    found, words = report["policies"], cost_words(report)
    budget = found["budget"]
    limits = [] if budget["cost"] is None else [f"at most {gflops(budget['cost'])} {words.unit}"]
    if budget["max_drop"] is not None:
        drop = 100 * budget["max_drop"]
        limits.append(f"at most {drop:g} point{'' if drop == 1 else 's'} below the best static resolution")
    rule = f"The budget was {' and '.join(limits)}; it" if limits else "No budget was set, so the highest accuracy"
    if found["folds"] is None:
        where = f"fitted on {found['num_select']:,} validation images and applied to the {report['n']:,} others"
    else:
        where = f"fitted on {found['num_select']:,} images each, {found['folds']} times, and applied to those left out"
    return (
        f"Policies are {where}. {rule} chose {found['chosen']['label']}. The table shows what the best policy of each "
        "kind reaches at rising cost."
    )


def policy_table(report: Mapping[str, Any]) -> Table:
    """Return the table of the accuracy of each kind's best policy at rising cost."""
    curves = report["policies"]["curves"]
    rows = []
    for kind, points in curves.items():
        last = len(points) - 1
        for place in sorted({round(last * part / (POLICY_ROWS - 1)) for part in range(POLICY_ROWS)}):
            point = points[place]
            name = "any" if kind == "all" else kind
            rows.append((name, *cost_cells(report, point), percent(point["top1"]), interval(point)))
    return ("policy", *cost_headers(report), "top-1", "95 % interval"), rows


def class_table(report: Mapping[str, Any]) -> Table:
    """Return the table of the classes, with the lowest accuracy first if there are many."""
    sides, routed = report["resolutions"], report["comparisons"] is not None
    rows = report["by_class"]
    if len(rows) > CLASS_ROWS:
        key = "routed_top1" if routed else "static_top1"
        rows = sorted(rows, key=lambda row: row[key])[:CLASS_ROWS]
    header = ("class", "images", *(f"static {side} px" for side in sides))
    body = [(row["name"], f"{row['n']:,}", *(percent(value) for value in row["static_top1"])) for row in rows]
    if routed:
        header = (*header, "routed", *(f"at {side} px" for side in sides))
        body = [
            (*cells, percent(row["routed_top1"]), *(percent(share) if share else "" for share in row["shares"]))
            for cells, row in zip(body, rows, strict=True)
        ]
    return header, body


def by_chosen_table(report: Mapping[str, Any]) -> Table:
    """Return the table of static accuracy by chosen resolution, which shows how difficult the images of each choice
    are."""
    sides, routing = report["resolutions"], report["routing"]
    return ("sent to", "images", *(f"static {side} px" for side in sides)), [
        (f"{side} px", f"{count:,}", *(percent(value) for value in values))
        for side, count, values in zip(
            sides, routing["counts_by_chosen"], routing["static_top1_by_chosen"], strict=True
        )
    ]


def confusion_table(report: Mapping[str, Any]) -> Table:
    """Return the table of chosen resolutions against the oracle's."""
    sides, routing = report["resolutions"], report["routing"]
    return ("sent to", *(f"oracle {side} px" for side in sides), "never correct"), [
        (f"{side} px", *(f"{count:,}" for count in counts), f"{nowhere:,}")
        for side, counts, nowhere in zip(
            sides, routing["chosen_by_oracle"], routing["right_nowhere_by_chosen"], strict=True
        )
    ]


def attribute_table(name: str, found: Mapping[str, Any]) -> Table:
    """Return the table of an attribute by chosen resolution."""
    return ("sent to", "images", f"mean {name}", f"median {name}"), [
        (
            f"{part['resolution']} px",
            f"{part['n']:,}",
            *("-" if part[key] is None else f"{part[key]:.3g}" for key in ("mean", "median")),
        )
        for part in found["by_chosen"]
    ]


def every(points: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Return about `count` of the points, evenly spaced, including both ends and bias 0."""
    last = len(points) - 1
    wanted = {round(last * k / (count - 1)) for k in range(count)} if last >= 0 else set()
    return [point for k, point in enumerate(points) if k in wanted or point["budget_bias"] == 0]


def cell(text: object) -> str:
    """Escape text so that it cannot end a table cell or open an HTML tag."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _against_trained(point: Mapping[str, Any]) -> str:
    if point["budget_bias"] == 0:
        return ""
    return f"{signed(point['difference_points'])} ({signed(point['low_points'])} to {signed(point['high_points'])})"


def bias_text(value: float) -> str:
    """Format a budget bias with its sign."""
    return "0" if value == 0 else f"{'+' if value > 0 else '-'}{gflops(abs(value))}"
