"""The report of a search: the front, the paper's four, what was finetuned, and what to deploy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from datasets.files import write_whole
from pipeline.config.schema import Config
from pipeline.evaluation.report import to_json
from pipeline.evaluation.statistics import CONFIDENCE, Estimate, accuracy, mean_over_seeds, oracle_choice
from pipeline.evaluation.style import LIGHT
from pipeline.evaluation.tables import Table, cell, gflops, markdown_table, percent
from pipeline.search.figures import draw_search_figures
from pipeline.search.front import Point, Summary, choose, dominates, parameter_importance, pareto, summarize
from pipeline.search.records import Record
from pipeline.search.space import RECIPE_KEYS, Candidate, Space, paper_candidates

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


SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Finetuned:
    """A candidate that was trained on with its backbone, as a run of its own.

    Attributes:
        report: of the run; None where it failed, for `reason`.
    """

    candidate: Candidate
    config: Config
    report: Mapping[str, Any] | None
    reason: str | None = None

    @property
    def point(self) -> Point:
        assert self.report is not None
        return self.report["headline"]["top1"], self.report["headline"]["mean_gflops"]


def write_search_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write report.md, the figures and, last, report.json into `folder`, of what `build_search_report` found."""
    text = to_json(report)
    files = {f"{name}.png": content for name, content in draw_search_figures(report, LIGHT).items()}
    files["report.md"] = render_search(report, files).encode()
    files["report.json"] = text.encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content)


def build_search_report(
    records: Sequence[Record],
    correct_NR: np.ndarray,
    *,
    config: Config,
    space: Space,
    backbone_gflops: Sequence[float],
    finetuned: Sequence[Finetuned],
    chosen: Finetuned | None,
    context: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that report.json holds, as plain Python values, of the trials `records` and the backbone's answers.

    Accuracies are fractions of 1, differences points, costs GFLOPs (1e9 multiply-adds an image, the predictor
    included). Keys: `statics`, `oracle` (rows with `label`, `accuracy`, `low`, `high`, `gflops`); `trials` (every
    record); `front` (keys of trials of the first seed that none dominates); `compared` (the paper's four and the
    finalists over all their seeds, see `_compared`); `against_paper` (for each of the four, what dominates it);
    `finetuned`; `chosen`; `importance`; `space`; `method`; `environment`.

    Args:
        correct_NR: whether each resolution is right, by image of the validation beton, bool.
        context: `dataset` and `git_commit` where they are known; all else is put under `environment`.
    """
    papers = {candidate: number for number, candidate in paper_candidates(config).items()}
    first = [record for record in records if record.seed == config.seed]
    summaries = summarize(records, correct_NR)
    full = [summary for summary in summaries.values() if summary.num_seeds == config.search.seeds]
    statics = _statics(correct_NR, config.model.resolutions, backbone_gflops)
    names = _names(full, papers)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": context.get("git_commit"),
        "dataset": context.get("dataset"),
        "n": len(correct_NR),
        "resolutions": list(config.model.resolutions),
        "backbone_gflops": list(backbone_gflops),
        "preset": config.search.preset,
        "objective": config.search.objective,
        "budget_gflops": config.search.budget_gflops,
        "max_accuracy_drop": config.search.max_accuracy_drop,
        "num_seeds": config.search.seeds,
        "space": {key: str(parameter) for key, parameter in space.parameters.items()},
        "statics": statics,
        "oracle": _oracle(correct_NR, backbone_gflops),
        "trials": [_trial(record, papers, correct_NR) for record in sorted(records, key=_cost)],
        "front": [record.key for record in _first_front(first)],
        "compared": [_compared(summary, names, papers, correct_NR) for summary in sorted(full, key=lambda s: s.gflops)],
        "against_paper": [_against(number, summaries, full, names, papers) for number in sorted(papers.values())],
        "finetuned": [_finetuned(item, names) for item in finetuned],
        "chosen": None if chosen is None else _finetuned(chosen, names),
        "importance": parameter_importance(first, space),
        "method": {"confidence": CONFIDENCE, "epochs": max((record.epochs for record in records), default=0)},
        "environment": {key: value for key, value in context.items() if key not in _NAMED},
    }


_NAMED = ("git_commit", "dataset")


def _cost(record: Record) -> float:
    return np.inf if record.gflops is None else record.gflops


def _first_front(records: Sequence[Record]) -> list[Record]:
    found = [record for record in records if record.outcome == "finished"]
    return pareto(found, lambda record: (record.accuracy or 0.0, record.gflops or 0.0))


def _row(label: str, estimate: Estimate, gflops: float) -> dict[str, Any]:
    return {
        "label": label,
        "accuracy": float(estimate.value),
        "low": float(estimate.low),
        "high": float(estimate.high),
        "gflops": float(gflops),
    }


def _statics(correct_NR: np.ndarray, sides: Sequence[int], costs: Sequence[float]) -> list[dict[str, Any]]:
    return [
        _row(f"static {side} px", accuracy(int(correct_NR[:, j].sum()), len(correct_NR)), cost)
        for j, (side, cost) in enumerate(zip(sides, costs, strict=True))
    ]


def _oracle(correct_NR: np.ndarray, costs: Sequence[float]) -> dict[str, Any]:
    choice_N = oracle_choice(correct_NR, costs)
    right = int(correct_NR[np.arange(len(choice_N)), choice_N].sum())
    return _row("oracle", accuracy(right, len(choice_N)), float(np.asarray(costs)[choice_N].mean()))


def _trial(record: Record, papers: Mapping[Candidate, int], correct_NR: np.ndarray) -> dict[str, Any]:
    """A record without its choices, with the interval of its accuracy over the images."""
    row = asdict(record) | {"key": record.key, "candidate": record.candidate.described()}
    row |= {"network": record.candidate.network, "paper": papers.get(record.candidate), "low": None, "high": None}
    row["shares"] = list(record.shares)
    del row["choices"], row["context"]
    if record.has_result:
        right = int(correct_NR[np.arange(len(correct_NR)), record.chosen_N].sum())
        estimate = accuracy(right, len(correct_NR))
        row |= {"low": estimate.low, "high": estimate.high}
    return row


def _names(full: Sequence[Summary], papers: Mapping[Candidate, int]) -> dict[Candidate, str]:
    """Short names: the paper's numbers, and letters for the others, cheapest first."""
    found = sorted((s for s in full if s.candidate not in papers), key=lambda summary: summary.gflops)
    letters = {summary.candidate: chr(ord("A") + place % 26) for place, summary in enumerate(found)}
    return letters | {candidate: f"paper {number}" for candidate, number in papers.items()}


def _compared(
    summary: Summary, names: Mapping[Candidate, str], papers: Mapping[Candidate, int], correct_NR: np.ndarray
) -> dict[str, Any]:
    """A candidate over its seeds, and random routing with the same shares at the same cost."""
    random = mean_over_seeds(np.stack([correct_NR @ np.asarray(record.shares) for record in summary.records]))
    low, high = summary.gflops_range
    return _row(names[summary.candidate], summary.accuracy, summary.gflops) | {
        "paper": papers.get(summary.candidate),
        "network": summary.candidate.network,
        "recipe": ", ".join(f"{key} {value:.3g}" for key, value in summary.candidate.recipe().items()),
        "candidate": summary.candidate.described(),
        "keys": [record.key for record in summary.records],
        "seeds": [record.seed for record in summary.records],
        "accuracies": [record.accuracy for record in summary.records],
        "gflops_low": low,
        "gflops_high": high,
        "predictor_gflops": summary.predictor_gflops,
        "shares": summary.shares,
        "outcomes": [record.outcome for record in summary.records],
        "random": _row("random, same shares", random, summary.gflops),
    }


def _against(
    number: int,
    summaries: Mapping[Candidate, Summary],
    full: Sequence[Summary],
    names: Mapping[Candidate, str],
    papers: Mapping[Candidate, int],
) -> dict[str, Any]:
    """The finalist that dominates one of the paper's four over the same seeds, the most accurate of them.

    `dominated_by` is its name and null where there is none; then the nearest is compared: of those that are no dearer
    the most accurate.
    """
    candidate = next(candidate for candidate, found in papers.items() if found == number)
    row: dict[str, Any] = {"paper": number, "dominated_by": None, "compared_with": None}
    paper = summaries.get(candidate)
    if paper is None:
        return row
    others = [summary for summary in full if summary.candidate not in papers and summary.gflops <= paper.gflops]
    if not others:
        return row
    best = max(others, key=lambda summary: summary.accuracy.value)
    difference = best.minus(paper)
    return row | {
        "dominated_by": names[best.candidate] if dominates(best.point, paper.point) else None,
        "compared_with": names[best.candidate],
        "difference_points": 100 * difference.value,
        "low_points": 100 * difference.low,
        "high_points": 100 * difference.high,
        "gflops_ratio": best.gflops / paper.gflops,
    }


def _finetuned(item: Finetuned, names: Mapping[Candidate, str]) -> dict[str, Any]:
    """What the run's own report says; its total is of the shares that were measured on the validation images."""
    row: dict[str, Any] = {
        "name": names.get(item.candidate, item.candidate.network),
        "network": item.candidate.network,
        "run": item.config.name,
        "reason": item.reason,
        "verdict": None,
        "predictor_gflops": None,
    }
    if item.report is None:
        return row | dict.fromkeys(("label", "accuracy", "low", "high", "gflops"))
    found = item.report["headline"]
    return row | {
        "label": f"{row['name']}, finetuned",
        "accuracy": found["top1"],
        "low": found["top1_low"],
        "high": found["top1_high"],
        "gflops": found["mean_gflops"],
        "predictor_gflops": item.report["costs"]["predictor_gflops"],
        "verdict": item.report["verdict"],
    }
