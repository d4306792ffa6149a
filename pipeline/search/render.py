"""The report of a search for readers, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from pipeline.evaluation.tables import Table, cell, gflops, markdown_table, percent
from pipeline.search.front import choose
from pipeline.search.space import RECIPE_KEYS

FRONT_ROWS = 15


def render_search(report: Mapping[str, Any], figures: Collection[str]) -> str:
    """The report as Markdown; `figures` are the PNG files that lie beside it."""
    parts = [f"# Search: {cell(report['name'])}", f"**{verdict(report)}**", "\n".join(_details(report))]
    parts.append(_figure("front", "Accuracy against cost of every trial", figures))
    parts += ["## The paper's four and the finalists", compared_note(report), markdown_table(*compared_table(report))]
    if any(row["compared_with"] for row in report["against_paper"]):
        parts += ["Each of the four against the most accurate finalist that costs no more, on the same images:"]
        parts.append(markdown_table(*against_table(report)))
    if report["finetuned"]:
        parts += ["## Finetuned with their backbone", markdown_table(*finetuned_table(report))]
        parts.append(
            "Evaluated in full; totals are measured: predictor, and backbone at the resolutions that were chosen."
        )
    parts += ["## Static resolutions and oracle", markdown_table(*bounds_table(report))]
    parts += ["## The front of the first seed", markdown_table(*front_table(report))]
    if report["importance"]:
        parts += ["## What decides", _figure("importance", "Importance of the parameters", figures)]
        parts.append(markdown_table(*importance_table(report)))
    if bad := [row for row in report["trials"] if row["outcome"] != "finished"]:
        parts += ["## Trials that did not finish well", markdown_table(*_bad_table(bad))]
    parts += ["## How it was measured", "\n".join(f"- {note}" for note in _notes(report))]
    parts.append(markdown_table(("", ""), _provenance(report)))
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict(report: Mapping[str, Any]) -> str:
    """One sentence: what to deploy, or how the front compares with the paper's four."""
    chosen = report["chosen"]
    if chosen is not None:
        found = (
            f"{chosen['name']} ({chosen['network']}), finetuned: {percent(chosen['accuracy'], 2)} (95 % CI "
            f"{percent(chosen['low'], 2)} to {percent(chosen['high'], 2)}) at {gflops(chosen['gflops'])} GFLOPs."
        )
        static = _dominating_static(report, chosen)
        if static is None:
            return found
        return (
            f"Static wins: {static['label']} of the backbone that was searched for has {_estimate(static)} at "
            f"{gflops(static['gflops'])} GFLOPs. Of what was finetuned, {found}"
        )
    asked = _asked(report)
    if asked and report["finetuned"]:
        return f"Nothing that was finetuned is {asked}; the nearest is in the table below."
    beaten = [f"{row['paper']}" for row in report["against_paper"] if row["dominated_by"]]
    if not report["space"]:
        return "The paper's four predictors, compared."
    if not beaten:
        return "No finalist dominates one of the paper's four: more accurate, or as accurate, and no dearer."
    return f"Dominated by a finalist: number {', '.join(beaten)} of the paper's four."


def _dominating_static(report: Mapping[str, Any], chosen: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The most accurate static resolution that costs no more than what was chosen and is no less accurate."""
    statics = report["statics"]
    best = choose(statics, lambda row: (row["accuracy"], row["gflops"]), budget_gflops=chosen["gflops"])
    return best if best is not None and best["accuracy"] >= chosen["accuracy"] else None


def _asked(report: Mapping[str, Any]) -> str:
    parts = []
    if report["budget_gflops"] is not None:
        parts.append(f"within {report['budget_gflops']:g} GFLOPs")
    if report["max_accuracy_drop"] is not None:
        parts.append(f"within {report['max_accuracy_drop']:g} points of the best static resolution")
    return " and ".join(parts)


def _details(report: Mapping[str, Any]) -> list[str]:
    counts = Counter(row["outcome"] for row in report["trials"])
    seconds = sum(row["seconds"] for row in report["trials"])
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    lines = [f"- {len(report['trials'])} trials ({told}), {seconds:,.0f} s of them together."]
    best = max(report["statics"], key=lambda row: row["accuracy"])
    lines.append(f"- The best static resolution: {best['label']}, {_estimate(best)}, {gflops(best['gflops'])} GFLOPs.")
    if report["chosen"] is not None:
        lines.append(f"- The finetuned network beside its own static resolutions: {report['chosen']['verdict']}")
    return lines


def _estimate(row: Mapping[str, Any]) -> str:
    if row["accuracy"] is None:
        return "-"
    return f"{percent(row['accuracy'], 2)} ({100 * row['low']:.2f} to {100 * row['high']:.2f})"


def compared_note(report: Mapping[str, Any]) -> str:
    return (
        f"Each over {report['num_seeds']} seed{'s' if report['num_seeds'] > 1 else ''} on the frozen backbone; in the "
        "form of the supplement's Table 1, totals measured. Intervals cover images and seeds."
    )


def compared_table(report: Mapping[str, Any]) -> Table:
    """In the form of the supplement's Table 1."""
    header = (
        "",
        "predictor",
        "predictor GFLOPs",
        "total GFLOPs",
        "over seeds",
        "top-1",
        "random, same shares",
        "recipe",
    )
    body = [
        (
            row["label"],
            row["network"],
            gflops(row["predictor_gflops"]),
            gflops(row["gflops"]),
            f"{gflops(row['gflops_low'])} to {gflops(row['gflops_high'])}",
            _estimate(row) + _flag(row["outcomes"]),
            _estimate(row["random"]),
            row["recipe"],
        )
        for row in report["compared"]
    ]
    return header, body


def _flag(outcomes: list[str]) -> str:
    collapsed = outcomes.count("collapsed")
    return f", {collapsed} of {len(outcomes)} collapsed" if collapsed else ""


def against_table(report: Mapping[str, Any]) -> Table:
    body = []
    for row in report["against_paper"]:
        if row["compared_with"] is None:
            body.append((f"paper {row['paper']}", "-", "-", "-", "nothing is as cheap"))
            continue
        interval = f"{row['difference_points']:+.2f} ({row['low_points']:+.2f} to {row['high_points']:+.2f})"
        says = "dominated" if row["dominated_by"] else "not dominated"
        body.append((f"paper {row['paper']}", row["compared_with"], f"{row['gflops_ratio']:.2f}", interval, says))
    return ("", "against", "FLOPs ratio", "points", ""), body


def finetuned_table(report: Mapping[str, Any]) -> Table:
    body = [
        (
            row["name"],
            row["network"],
            "-" if row["predictor_gflops"] is None else gflops(row["predictor_gflops"]),
            "-" if row["gflops"] is None else gflops(row["gflops"]),
            _estimate(row) if row["accuracy"] is not None else f"failed: {row['reason']}",
            row["run"],
        )
        for row in report["finetuned"]
    ]
    return ("", "predictor", "predictor GFLOPs", "total GFLOPs", "top-1", "run"), body


def bounds_table(report: Mapping[str, Any]) -> Table:
    rows = [*report["statics"], report["oracle"]]
    return ("", "GFLOPs", "top-1"), [(row["label"], gflops(row["gflops"]), _estimate(row)) for row in rows]


def front_table(report: Mapping[str, Any]) -> Table:
    trials = {row["key"]: row for row in report["trials"]}
    body = []
    for key in report["front"][:FRONT_ROWS]:
        row = trials[key]
        recipe = (f"{row['candidate'][name]:.3g}" for name in RECIPE_KEYS)
        name = row["network"] if row["paper"] is None else f"paper {row['paper']}: {row['network']}"
        body.append((name, gflops(row["predictor_gflops"]), gflops(row["gflops"]), _estimate(row), *recipe, key[:8]))
    return ("predictor", "predictor GFLOPs", "total GFLOPs", "top-1", *RECIPE_KEYS, "trial"), body


def importance_table(report: Mapping[str, Any]) -> Table:
    def share(found: Mapping[str, float]) -> str:
        return f"{100 * found['mean']:.0f} % ({100 * found['low']:.0f} to {100 * found['high']:.0f})"

    body = [(row["parameter"], share(row["accuracy"]), share(row["gflops"])) for row in report["importance"]]
    return ("parameter", "of accuracy's variance", "of the cost's variance"), body


def _bad_table(rows: list[Mapping[str, Any]]) -> Table:
    # A collapse's first sentence says what it is; the others advise on a single run, and are in report.json.
    def reason(row: Mapping[str, Any]) -> str:
        said = row["reason"] or ""
        return said.split(". ")[0] if row["outcome"] == "collapsed" else said

    body = [(row["key"][:8], row["network"], row["outcome"], reason(row)) for row in rows]
    return ("trial", "predictor", "outcome", "reason"), body


def _notes(report: Mapping[str, Any]) -> list[str]:
    return [
        f"Top-1 on {report['n']:,} validation images. One seed: Wilson's 95 % interval; several: a normal interval "
        "over images and seeds.",
        f"A trial trains the predictor for {report['method']['epochs']} epochs on stored logits of the frozen "
        "backbone; its cost is counted in GFLOPs of 1e9 multiply-adds an image, predictor included, at the shares that "
        "were measured on these images.",
        "The paper's four have this configuration's input size, width and recipe, and the same seeds as the finalists. "
        "Finalists were chosen by the first seed on the same images, so their first seed flatters them.",
        "Random: the same shares, drawn without looking at the image. Oracle: the cheapest resolution that is right, "
        "without a predictor.",
        "Importance: functional ANOVA over the trials of the first seed, with bootstrap intervals over the trials.",
    ]


def _provenance(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    named = {
        "data set": report["dataset"],
        "created": report["created"],
        "git commit": report["git_commit"],
        "preset": report["preset"],
        "objective": report["objective"],
        **{f"space: {key}": value for key, value in report["space"].items()},
    }
    return [(str(k), cell(v)) for k, v in [*named.items(), *report["environment"].items()] if v is not None]


def _figure(name: str, caption: str, figures: Collection[str]) -> str:
    return f"![{caption}]({name}.png)" if f"{name}.png" in figures else ""
