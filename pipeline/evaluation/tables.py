"""What the report says in tables and notes, as text: Markdown and HTML lay out the same words."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BUDGET_ROWS = 9
BUDGET_NOTE = (
    "A bias b on the predictor's logits (logit_j + b * c_j) trades accuracy against cost without retraining; c_j is a "
    "resolution's cost from 0, the cheapest, to 1, the dearest, and b = 0 is the routed network. It is `budget_bias` "
    "of the registered model, and is of GFLOPs whatever the report counts in. Intervals are of each point for itself; "
    "differences are paired, against b = 0."
)

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""header and body"""


@dataclass(frozen=True)
class CostWords:
    """How a report speaks of its cost."""

    unit: str
    noun: str
    axis: str


_COST_WORDS = {
    "gflops": CostWords("GFLOPs", "FLOPs", "cost of one image, GFLOPs (1e9 multiply-adds, predictor included)"),
    "milliseconds": CostWords("ms", "time", "cost of one image, measured ms (predictor included)"),
}


def cost_words(report: Mapping[str, Any]) -> CostWords:
    """By the report's unit of cost."""
    return _COST_WORDS[report["costs"]["unit"]]


def cost_headers(report: Mapping[str, Any]) -> list[str]:
    """Headers of `cost_cells`: the report's unit first, and always GFLOPs."""
    return list(dict.fromkeys([cost_words(report).unit, "GFLOPs"]))


def cost_cells(report: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """The cost of a row, or of a point of the budget curve."""
    both = {cost_words(report).unit: row["mean_cost"], "GFLOPs": row["mean_gflops"]}
    return [gflops(both[header]) for header in cost_headers(report)]


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is aligned left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join(f"| {' | '.join(cell(text) for text in line)} |" for line in lines)


def markdown_figure(name: str, caption: str, figures: Collection[str]) -> str:
    """A link to the figure, or nothing if NAME.png is not one of `figures`."""
    return f"![{caption}]({name}.png)" if f"{name}.png" in figures else ""


def method_notes(report: Mapping[str, Any]) -> list[str]:
    """How the numbers came about, one sentence or two a note."""
    method = report["method"]
    notes = [
        f"Top-1 on {report['n']:,} validation images, each counted once, with {method['confidence']:.0%} Wilson "
        f"intervals. Always answering the most frequent class would reach {percent(report['majority_class_top1'])}.",
        "Cost is counted by torch's FLOP counter (convolutions and matrix products) in GFLOPs of 1e9 multiply-adds an "
        "image, the predictor included wherever it runs.",
    ]
    latency = report["costs"]["latency"]
    if latency is not None:
        notes.append(
            f"What is compared, drawn and called cost here is measured time: {latency['measured']}. Decoding and "
            "resizing are not in it, and images of one resolution are taken to come in full batches."
        )
    if report["comparisons"] is None:
        return notes
    words, latency = cost_words(report), report["costs"]["latency"]
    predictor = report["costs"]["predictor_gflops"] if latency is None else latency["predictor_milliseconds"]
    return [
        *notes,
        "Routed: each image at the resolution with the largest predictor logit, without noise.",
        "Random: the same shares, drawn without looking at the image. Its accuracy is the exact expectation. It is "
        f"placed at the routed network's cost; without the predictor it would cost {gflops(predictor)} {words.unit} "
        "less.",
        "Line: what a random mixture of the two neighbouring static resolutions, which needs no predictor, reaches for "
        f"the same {words.noun}. A routed network that is not above it saves nothing.",
        "Oracle: each image at the cheapest resolution that is right, without a predictor; where none is right, at the "
        "cheapest. It bounds what any predictor could reach with this backbone.",
        "Differences are paired, on the same images: Bonett and Price's interval and McNemar's exact test against "
        f"single networks; {method['bootstrap_resamples']:,} bootstrap resamples of the images against mixtures.",
        "Intervals cover the choice of validation images, not the seed of the training: compare several seeds. The "
        "best static resolution and the budget curve are read off the same images.",
    ]


def provenance(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What, when and on which machine, as pairs of key and value."""
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
    """Data set, date and commit of a report, then what is `named`, then its environment."""
    about = {"data set": report["dataset"], "created": report["created"], "git commit": report["git_commit"]}
    pairs = [*about.items(), *named.items(), *report["environment"].items()]
    return [(str(key), str(value)) for key, value in pairs if value is not None]


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction of 1 as percent."""
    return "-" if fraction is None else f"{100 * fraction:.{digits}f} %"


def interval(row: Mapping[str, Any], digits: int = 1) -> str:
    """The interval of a row's top-1, in percent."""
    return f"{100 * row['top1_low']:.{digits}f} to {100 * row['top1_high']:.{digits}f}"


def signed(points: float) -> str:
    """A difference with its sign and one decimal; what rounds to 0 is +0.0."""
    return f"{round(points, 1) + 0.0:+.1f}"


def gflops(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    return np.format_float_positional(value, precision=3, unique=False, fractional=False, trim="k").rstrip(".")


def p_value(value: float | None) -> str:
    """A p value, or a dash where there was no test."""
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def result_table(report: Mapping[str, Any], digits: int = 1) -> Table:
    """Every row: accuracy with interval, cost, shares."""
    sides = report["resolutions"]
    body = [
        (
            row["label"],
            percent(row["top1"], digits),
            interval(row, digits),
            *cost_cells(report, row),
            *(percent(share) if share else "" for share in row["shares"]),
        )
        for row in report["rows"]
    ]
    return ("", "top-1", "95 % interval", *cost_headers(report), *(f"at {side} px" for side in sides)), body


def reference_table(report: Mapping[str, Any]) -> Table:
    """Published results of others."""
    return ("", "top-1", "protocol"), [
        (reference["label"], percent(reference["top1"]), reference["note"]) for reference in report["references"]
    ]


def comparison_table(report: Mapping[str, Any]) -> Table:
    """The routed network minus every other row."""
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
    return ("routed minus", "points", "95 % interval", ratio, "only it / only the other", "McNemar p"), body


def budget_table(report: Mapping[str, Any]) -> Table:
    """A few points of the budget curve."""
    sides = (f"at {side} px" for side in report["resolutions"])
    header = ("bias b", *cost_headers(report), "top-1", "95 % interval", "points against b = 0", *sides)
    return header, [
        (
            bias_text(point["budget_bias"]),
            *cost_cells(report, point),
            percent(point["top1"]),
            interval(point),
            _against_routed(point),
            *(percent(share) if share else "" for share in point["shares"]),
        )
        for point in every(report["budget_curve"], BUDGET_ROWS)
    ]


def by_chosen_table(report: Mapping[str, Any]) -> Table:
    """How hard the images of each choice are: static accuracy by chosen resolution."""
    sides, routing = report["resolutions"], report["routing"]
    return ("sent to", "images", *(f"static {side} px" for side in sides)), [
        (f"{side} px", f"{count:,}", *(percent(value) for value in values))
        for side, count, values in zip(
            sides, routing["counts_by_chosen"], routing["static_top1_by_chosen"], strict=True
        )
    ]


def confusion_table(report: Mapping[str, Any]) -> Table:
    """Chosen resolution against the oracle's."""
    sides, routing = report["resolutions"], report["routing"]
    return ("sent to", *(f"oracle {side} px" for side in sides), "right nowhere"), [
        (f"{side} px", *(f"{count:,}" for count in counts), f"{nowhere:,}")
        for side, counts, nowhere in zip(
            sides, routing["chosen_by_oracle"], routing["right_nowhere_by_chosen"], strict=True
        )
    ]


def attribute_table(name: str, found: Mapping[str, Any]) -> Table:
    """The attribute of the images sent to each resolution."""
    return ("sent to", "images", f"mean {name}", f"median {name}"), [
        (
            f"{part['resolution']} px",
            f"{part['n']:,}",
            *("-" if part[key] is None else f"{part[key]:.3g}" for key in ("mean", "median")),
        )
        for part in found["by_chosen"]
    ]


def every(points: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """About `count` of the points, evenly spaced, with both ends and bias 0."""
    last = len(points) - 1
    wanted = {round(last * k / (count - 1)) for k in range(count)} if last >= 0 else set()
    return [point for k, point in enumerate(points) if k in wanted or point["budget_bias"] == 0]


def cell(text: object) -> str:
    """Text that cannot end a table's cell or open a tag."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _against_routed(point: Mapping[str, Any]) -> str:
    if point["budget_bias"] == 0:
        return ""
    return f"{signed(point['difference_points'])} ({signed(point['low_points'])} to {signed(point['high_points'])})"


def bias_text(value: float) -> str:
    """A budget bias with its sign."""
    return "0" if value == 0 else f"{'+' if value > 0 else '-'}{gflops(abs(value))}"
