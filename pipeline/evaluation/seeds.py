"""Summarize the reports of several seeds of one recipe in one table, because a single run proves little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np

from pipeline.evaluation.gate import Answers, common_images, compare_answers
from pipeline.evaluation.report import SCHEMA_VERSION
from pipeline.evaluation.statistics import Estimate, mean_of, mean_over_seeds
from pipeline.evaluation.tables import gflops, markdown_table, p_value, signed

ENDS = ("low", "high")
SUMMARIZED = (
    "routed_accuracy",
    "routed_gflops",
    "best_static_accuracy",
    "gflops_ratio",
    "difference_points",
    "gain_over_line_points",
    "gain_over_random_points",
    "oracle_accuracy",
)


def summarize_seeds(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarize the reports of several seeds.

    Returns:
        `num_seeds`, `dataset`, `resolutions`, `compared_by` (top1 or balanced_top1, the accuracy of all values),
        `rows` (one per report: `name`, `outcome`, `best_static` and the values of SUMMARIZED, with the 95 % intervals
        of the two differences) and `summary`. The summary has, for each value of SUMMARIZED, its `mean`, `min` and
        `max`, and `low` and `high` (Student's t interval) and `std` (n - 1), which are null for one seed.

    Raises:
        ValueError: there is no report; the reports differ in data set, resolutions, number of images, unit of cost or
            the accuracy that they compare; or they have only one resolution.
    """
    if not reports:
        raise ValueError("there is no report to summarize; give at least one")
    for report in reports:
        if report["schema_version"] != SCHEMA_VERSION:
            raise ValueError(
                f"the report of {report['name']} has format {report['schema_version']}; this version reads "
                f"{SCHEMA_VERSION}. Write it again with jobs.calibrate"
            )
    kinds = {
        (report["dataset"], tuple(report["resolutions"]), report["n"], report["costs"]["unit"], report["compared_by"])
        for report in reports
    }
    if len(kinds) > 1:
        listing = "; ".join(
            f"{dataset}, {list(sides)} px, {n} images, by {unit} and {compared_by}"
            for dataset, sides, n, unit, compared_by in sorted(kinds, key=str)
        )
        raise ValueError(
            f"reports of different runs cannot be summarized together: {listing}. --against compares runs with other "
            "resolutions, pair by pair"
        )
    if reports[0]["comparisons"] is None:
        raise ValueError("reports with one resolution have no routed network to summarize")
    rows = [_row(report) for report in reports]
    return {
        "num_seeds": len(rows),
        "dataset": reports[0]["dataset"],
        "resolutions": list(reports[0]["resolutions"]),
        "compared_by": reports[0]["compared_by"],
        "rows": rows,
        "summary": {key: _spread([row[key] for row in rows]) for key in SUMMARIZED},
    }


def seeds_markdown(summary: Mapping[str, Any]) -> str:
    """Return a summary as a Markdown table: one row per seed, then the means with Student's t intervals.

    A sentence before the table says so if accuracy is the mean over the classes.
    """
    header = ("run", "routed", "GFLOPs", "best static", "of its FLOPs", "against it", "above the envelope", "oracle")
    body = [
        (
            row["name"],
            f"{100 * row['routed_accuracy']:.1f} %",
            f"{row['routed_gflops']:.3g}",
            f"{row['best_static']} px, {100 * row['best_static_accuracy']:.1f} %",
            f"{row['gflops_ratio']:.2f}",
            _with_interval(row, "difference"),
            _with_interval(row, "gain_over_line"),
            f"{100 * row['oracle_accuracy']:.1f} %",
        )
        for row in summary["rows"]
    ]
    found = summary["summary"]
    last = (
        f"mean of {summary['num_seeds']} seeds",
        _mean(found["routed_accuracy"], 100, ".1f", " %"),
        _mean(found["routed_gflops"], 1, ".3g"),
        _mean(found["best_static_accuracy"], 100, ".1f", " %"),
        _mean(found["gflops_ratio"], 1, ".2f"),
        _mean(found["difference_points"], 1, "+.1f"),
        _mean(found["gain_over_line_points"], 1, "+.1f"),
        _mean(found["oracle_accuracy"], 100, ".1f", " %"),
    )
    table = markdown_table(header, [*body, tuple(f"**{cell}**" for cell in last)])
    return table if summary["compared_by"] == "top1" else f"Accuracy is the mean over the classes here.\n\n{table}"


def pairs_markdown(pairs: Sequence[tuple[str, Answers, str, Answers]]) -> str:
    """Return the comparison of pairs of runs as a Markdown table: one row per pair, then the mean.

    The runs of a pair may have different resolutions. They are compared on the images that both report on. The interval
    of the mean covers images and seeds, by Student's t. GFLOPs are means over all images that a run reports on.

    Args:
        pairs: name and answers of a run, and of the run that it is compared with.

    Raises:
        ValueError: the runs of a pair have no images in common, or the pairs are about different data.
    """
    digests = sorted({first.data_digest for _, first, _, _ in pairs})
    if len(digests) > 1:
        raise ValueError(
            f"the pairs were evaluated on different data (digests {', '.join(digests)}), so they have no common mean. "
            "Compare the runs of one data set at a time"
        )
    body, differences, costs = [], [], []
    for first_name, first, second_name, second in pairs:
        try:
            first, second = common_images(first, second)
        except ValueError as error:
            raise ValueError(f"{first_name} and {second_name} cannot be compared: {error}") from None
        found = compare_answers(first, second)
        differences.append((first.indices_N, first.right_N.astype(np.float64) - second.right_N))
        costs.append(first.mean_gflops / second.mean_gflops)
        spent = [f"{100 * each.top1:.2f} % at {gflops(each.mean_gflops)}" for each in (first, second)]
        cells = _points(found.difference), p_value(found.mcnemar_p), f"{costs[-1]:.2f}"
        body.append((first_name, spent[0], second_name, spent[1], f"{found.num_images:,}", *cells))
    # Different seeds may be reported on different images.
    common = reduce(np.intersect1d, [indices_N for indices_N, _ in differences])
    values_SN = np.stack([values_N[np.isin(indices_N, common)] for indices_N, values_N in differences])
    mean = _points(mean_over_seeds(values_SN)) if len(common) else "no common images"
    last = (f"mean of {len(pairs)} pairs", "", "", "", f"{len(common):,}", mean, "-", f"{np.mean(costs):.2f}")
    header = ("run", "top-1 at GFLOPs", "against", "top-1 at GFLOPs", "images", "points", "McNemar p", "of its FLOPs")
    return markdown_table(header, [*body, tuple(f"**{cell}**" if cell else "" for cell in last)])


def _points(difference: Estimate) -> str:
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.value:+.2f} ({low:+.2f} to {high:+.2f})"


def _row(report: Mapping[str, Any]) -> dict[str, Any]:
    rows = {row["id"]: row for row in report["rows"]}
    best, routed, compared = rows[report["best_static"]], rows["routed"], report["comparisons"]
    key = report["compared_by"]
    against_best, line = compared[best["id"]], compared["envelope"]
    return {
        "name": report["name"],
        "outcome": report["outcome"],
        "routed_accuracy": routed[key],
        "routed_gflops": routed["mean_gflops"],
        "best_static": best["resolution"],
        "best_static_accuracy": best[key],
        "gflops_ratio": against_best["gflops_ratio"],
        "difference_points": against_best["difference_points"],
        "difference_low": against_best["low_points"],
        "difference_high": against_best["high_points"],
        "gain_over_line_points": line["difference_points"],
        "gain_over_line_low": line["low_points"],
        "gain_over_line_high": line["high_points"],
        "gain_over_random_points": compared["random"]["difference_points"],
        "oracle_accuracy": rows["oracle"][key],
    }


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    found, std = mean_of(values), float(np.std(values, ddof=1)) if len(values) > 1 else None
    ends = {"low": None, "high": None} if found is None else {"low": found.low, "high": found.high}
    return {"mean": float(np.mean(values)), **ends, "std": std, "min": min(values), "max": max(values)}


def _with_interval(row: Mapping[str, Any], key: str) -> str:
    return f"{signed(row[f'{key}_points'])} ({signed(row[f'{key}_low'])} to {signed(row[f'{key}_high'])})"


def _mean(spread: Mapping[str, Any], scale: float, form: str, unit: str = "") -> str:
    """Format the mean and, with more than one seed, its interval."""
    mean = f"{scale * spread['mean']:{form}}{unit}"
    return mean if spread["low"] is None else f"{mean} ({' to '.join(f'{scale * spread[end]:{form}}' for end in ENDS)})"
