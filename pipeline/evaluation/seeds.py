"""Summarize the reports of several seeds of one recipe in one table, because a single run proves little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.evaluation.report import SCHEMA_VERSION
from pipeline.evaluation.tables import markdown_table, signed

SUMMARIZED = (
    "routed_top1",
    "routed_gflops",
    "best_static_top1",
    "gflops_ratio",
    "difference_points",
    "gain_over_line_points",
    "gain_over_random_points",
    "oracle_top1",
)


def summarize_seeds(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarize the reports of several seeds.

    Returns:
        `num_seeds`, `dataset`, `resolutions`, `rows` (one per report: `name`, `outcome`, `best_static` and the values
        of SUMMARIZED, with the 95 % intervals of the two differences) and `summary`: for each value of SUMMARIZED its
        `mean`, `std` (over the seeds, n - 1; null for one seed), `min` and `max`.

    Raises:
        ValueError: there is no report; the reports differ in data set, resolutions, number of images or unit of cost;
            or they have one resolution.
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
        (report["dataset"], tuple(report["resolutions"]), report["n"], report["costs"]["unit"]) for report in reports
    }
    if len(kinds) > 1:
        listing = "; ".join(
            f"{dataset}, {list(sides)} px, {n} images, by {unit}" for dataset, sides, n, unit in sorted(kinds, key=str)
        )
        raise ValueError(f"reports of different runs cannot be summarized together: {listing}")
    if reports[0]["comparisons"] is None:
        raise ValueError("reports with one resolution have no routed network to summarize")
    rows = [_row(report) for report in reports]
    return {
        "num_seeds": len(rows),
        "dataset": reports[0]["dataset"],
        "resolutions": list(reports[0]["resolutions"]),
        "rows": rows,
        "summary": {key: _spread([row[key] for row in rows]) for key in SUMMARIZED},
    }


def seeds_markdown(summary: Mapping[str, Any]) -> str:
    """Return a summary as a Markdown table: one row per seed, then mean and standard deviation."""
    header = ("run", "routed", "GFLOPs", "best static", "of its FLOPs", "against it", "above the envelope", "oracle")
    body = [
        (
            row["name"],
            f"{100 * row['routed_top1']:.1f} %",
            f"{row['routed_gflops']:.3g}",
            f"{row['best_static']} px, {100 * row['best_static_top1']:.1f} %",
            f"{row['gflops_ratio']:.2f}",
            _with_interval(row, "difference"),
            _with_interval(row, "gain_over_line"),
            f"{100 * row['oracle_top1']:.1f} %",
        )
        for row in summary["rows"]
    ]
    found = summary["summary"]
    last = (
        f"mean of {summary['num_seeds']} seeds",
        _mean(found["routed_top1"], 100, ".1f", " %"),
        _mean(found["routed_gflops"], 1, ".3g"),
        _mean(found["best_static_top1"], 100, ".1f", " %"),
        _mean(found["gflops_ratio"], 1, ".2f"),
        _mean(found["difference_points"], 1, "+.1f"),
        _mean(found["gain_over_line_points"], 1, "+.1f"),
        _mean(found["oracle_top1"], 100, ".1f", " %"),
    )
    return markdown_table(header, [*body, tuple(f"**{cell}**" for cell in last)])


def _row(report: Mapping[str, Any]) -> dict[str, Any]:
    rows = {row["id"]: row for row in report["rows"]}
    best, routed, compared = rows[report["best_static"]], rows["routed"], report["comparisons"]
    against_best, line = compared[best["id"]], compared["envelope"]
    return {
        "name": report["name"],
        "outcome": report["outcome"],
        "routed_top1": routed["top1"],
        "routed_gflops": routed["mean_gflops"],
        "best_static": best["resolution"],
        "best_static_top1": best["top1"],
        "gflops_ratio": against_best["gflops_ratio"],
        "difference_points": against_best["difference_points"],
        "difference_low": against_best["low_points"],
        "difference_high": against_best["high_points"],
        "gain_over_line_points": line["difference_points"],
        "gain_over_line_low": line["low_points"],
        "gain_over_line_high": line["high_points"],
        "gain_over_random_points": compared["random"]["difference_points"],
        "oracle_top1": rows["oracle"]["top1"],
    }


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "min": min(values), "max": max(values)}


def _with_interval(row: Mapping[str, Any], key: str) -> str:
    return f"{signed(row[f'{key}_points'])} ({signed(row[f'{key}_low'])} to {signed(row[f'{key}_high'])})"


def _mean(spread: Mapping[str, Any], scale: float, form: str, unit: str = "") -> str:
    """Format the mean and, with more than one seed, the standard deviation."""
    mean = f"{scale * spread['mean']:{form}}"
    deviation = "" if spread["std"] is None else f" \N{PLUS-MINUS SIGN} {scale * spread['std']:{form.lstrip('+')}}"
    return f"{mean}{deviation}{unit}"
