"""The report of a search: the front, the paper's four, the finetuned candidates, and which model to deploy.

Rows and differences have the same keys as in `pipeline.evaluation.comparison`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from datasets.files import write_whole
from pipeline.config.schema import Config
from pipeline.evaluation.comparison import (
    best_without,
    difference_row,
    gain_point,
    gains,
    mean_costs,
    oracle_row,
    result_row,
    static_rows,
)
from pipeline.evaluation.report import predictor_sentence, to_json
from pipeline.evaluation.statistics import CONFIDENCE, accuracy, mean_over_seeds, oracle_choice
from pipeline.evaluation.style import LIGHT
from pipeline.evaluation.tables import (
    Table,
    cell,
    gflops,
    interval,
    markdown_figure,
    markdown_table,
    percent,
    provenance_pairs,
    result_table,
)
from pipeline.models.cost import Costs
from pipeline.policies.calibrate import Calibration
from pipeline.policies.fit import pareto
from pipeline.policies.route import Routed
from pipeline.search.figures import FIGURES, draw_search_figures
from pipeline.search.front import (
    NUM_RESAMPLES,
    Point,
    Summary,
    choose_item,
    dominates,
    parameter_importance,
    summarize,
)
from pipeline.search.records import Record
from pipeline.search.space import RECIPE_KEYS, Candidate, Space, paper_candidates

SCHEMA_VERSION = 2
FRONT_ROWS = 15
DIGITS = 2
"""The digits after the point of a percentage, because candidates differ less than the rows of an evaluation report."""
_NAMED = ("git_commit", "dataset")
_OUTCOME_KEYS = ("predictor_gflops", "seed", "outcome", "reason", "seconds", "images_per_second", "epochs")


@dataclass(frozen=True)
class Finetuned:
    """A candidate that was finetuned with its backbone, in its own run.

    Attributes:
        report: the run's report; None if the run failed, for the reason in `reason`.
    """

    candidate: Candidate
    config: Config
    report: Mapping[str, Any] | None
    reason: str | None = None

    @property
    def point(self) -> Point:
        """Accuracy and GFLOPs in the run's report."""
        assert self.report is not None
        return self.report["headline"]["top1"], self.report["headline"]["mean_gflops"]


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
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Return the content of report.json as plain Python values, from the trials' records and the backbone's answers.

    Accuracies are fractions of 1, differences are percentage points, costs are GFLOPs (1e9 multiply-adds per image,
    including the predictor). Keys: `rows` (static resolutions and oracle, see `evaluation.comparison.table_rows`);
    `held_out_rows` (static resolutions on the images that the finetuned runs report on);
    `trials` (a row for every record); `front` (keys of the first seed's trials that no other trial dominates);
    `compared` (the paper's four and the finalists over all their seeds, see `_compared`); `against_paper` (for each of
    the four, what dominates it); `predictor` and `policies` (whether a predictor pays off, and the front of whole
    policies, see `_predictor`); `finetuned`; `chosen`; `importance`; `space`; `costs`; `method`; `environment`.

    Args:
        correct_NR: whether each resolution is correct, for the images of the validation beton, bool.
        calibration: policies without a predictor, fitted on the backbone's stored logits; None leaves them out.
        context: `dataset` and `git_commit` if known; all other keys are stored under `environment`.
    """
    papers = {candidate: number for number, candidate in paper_candidates(config).items()}
    first = [record for record in records if record.seed == config.seed]
    summaries = summarize(records, correct_NR)
    full = [summary for summary in summaries.values() if summary.num_seeds == config.search.seeds]
    names = _names(full, papers)
    costs = Costs(config.model.resolutions, tuple(backbone_gflops), predictor_gflops=0.0)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": context.get("git_commit"),
        "dataset": context.get("dataset"),
        "n": len(correct_NR),
        "resolutions": list(costs.resolutions),
        "costs": {"unit": costs.unit, "backbone_gflops": list(backbone_gflops)},
        "preset": config.search.preset,
        "objective": config.search.objective,
        "budget_gflops": config.search.budget_gflops,
        "max_accuracy_drop": config.search.max_accuracy_drop,
        "num_seeds": config.search.seeds,
        "space": {key: str(parameter) for key, parameter in space.parameters.items()},
        "rows": [
            *static_rows(correct_NR, costs),
            oracle_row(correct_NR, oracle_choice(correct_NR, backbone_gflops), costs),
        ],
        "held_out_rows": static_rows(correct_NR if calibration is None else correct_NR[calibration.held_out], costs),
        "trials": [_trial(record, papers, correct_NR, costs) for record in sorted(records, key=_cost)],
        "front": [record.key for record in _first_front(first)],
        "compared": [
            _compared(summary, names, papers, correct_NR, costs) for summary in sorted(full, key=lambda s: s.gflops)
        ],
        "against_paper": [_against(number, summaries, full, names, papers) for number in sorted(papers.values())],
        **_predictor(full, names, correct_NR, costs, calibration),
        "finetuned": [_finetuned(item, names) for item in finetuned],
        "chosen": None if chosen is None else _finetuned(chosen, names),
        "importance": parameter_importance(first, space),
        "method": {"confidence": CONFIDENCE, "epochs": max((record.epochs for record in records), default=0)},
        "environment": {key: value for key, value in context.items() if key not in _NAMED},
    }


def _cost(record: Record) -> float:
    return np.inf if record.gflops is None else record.gflops


def _first_front(records: Sequence[Record]) -> list[Record]:
    found = [record for record in records if record.outcome == "finished"]
    return pareto(found, lambda record: (record.accuracy or 0.0, record.gflops or 0.0))


def _trial(record: Record, papers: Mapping[Candidate, int], correct_NR: np.ndarray, costs: Costs) -> dict[str, Any]:
    """Return the row of a trial, with its outcome. The interval is over the images, and null without a result."""
    candidate, N = record.candidate, len(correct_NR)
    values = asdict(record)
    row = {key: values[key] for key in _OUTCOME_KEYS}
    row |= {"id": record.key, "label": candidate.network, "candidate": candidate.described()}
    row |= {"paper": papers.get(candidate), "top1": record.accuracy, "top1_low": None, "top1_high": None}
    if not record.has_result:
        return row | {"mean_gflops": record.gflops, "mean_cost": record.gflops}
    num_correct = int(correct_NR[np.arange(N), record.chosen_N].sum())
    result = result_row(record.key, "routed", candidate.network, N, accuracy(num_correct, N), "wilson")
    return row | result | _routed_cost(record.shares, record.predictor_gflops, costs)


def _routed_cost(shares_R: Sequence[float], predictor_gflops: float | None, costs: Costs) -> dict[str, Any]:
    return mean_costs(shares_R, replace(costs, predictor_gflops=predictor_gflops or 0.0), with_predictor=True)


def _names(full: Sequence[Summary], papers: Mapping[Candidate, int]) -> dict[Candidate, str]:
    """Return short names: the paper's numbers, and letters for the other candidates, cheapest first."""
    found = sorted((s for s in full if s.candidate not in papers), key=lambda summary: summary.gflops)
    letters = {summary.candidate: _letters(place) for place, summary in enumerate(found)}
    return letters | {candidate: f"paper {number}" for candidate, number in papers.items()}


def _letters(place: int) -> str:
    """Return A to Z, then AA, AB and so on."""
    before, last = divmod(place, 26)
    return (_letters(before - 1) if before else "") + chr(ord("A") + last)


def _compared(
    summary: Summary,
    names: Mapping[Candidate, str],
    papers: Mapping[Candidate, int],
    correct_NR: np.ndarray,
    costs: Costs,
) -> dict[str, Any]:
    """Return the row of a candidate over its seeds. Its `random` is random routing with the same shares and cost."""
    name, N, records = names[summary.candidate], len(correct_NR), summary.records
    method = "wilson" if summary.num_seeds == 1 else "student-t"
    random = mean_over_seeds(np.stack([correct_NR @ np.asarray(record.shares) for record in records]))
    low, high = summary.gflops_range
    cost = _routed_cost(summary.shares, summary.predictor_gflops, costs)
    return {
        **result_row(name, "routed", name, N, summary.accuracy, method),
        **cost,
        "paper": papers.get(summary.candidate),
        "network": summary.candidate.network,
        "recipe": ", ".join(f"{key} {value:.3g}" for key, value in summary.candidate.recipe().items()),
        "candidate": summary.candidate.described(),
        "keys": [record.key for record in records],
        "seeds": [record.seed for record in records],
        "top1_by_seed": [record.accuracy for record in records],
        "gflops_low": low,
        "gflops_high": high,
        "predictor_gflops": summary.predictor_gflops,
        "outcomes": [record.outcome for record in records],
        "random": result_row(f"{name}, random", "random", "random, same shares", N, random, "student-t") | cost,
    }


def _against(
    number: int,
    summaries: Mapping[Candidate, Summary],
    full: Sequence[Summary],
    names: Mapping[Candidate, str],
    papers: Mapping[Candidate, int],
) -> dict[str, Any]:
    """Compare one of the paper's four with the most accurate finalist that costs no more, over the same seeds.

    `compared_with` names the finalist, and `dominated_by` names it if it dominates. Both are null if there is none.
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
    costs = [{"mean_cost": summary.gflops, "mean_gflops": summary.gflops} for summary in (best, paper)]
    return row | {
        "dominated_by": names[best.candidate] if dominates(best.point, paper.point) else None,
        "compared_with": names[best.candidate],
        **difference_row(best.minus(paper), "student-t", *costs),
    }


def _predictor(
    full: Sequence[Summary],
    names: Mapping[Candidate, str],
    correct_NR: np.ndarray,
    costs: Costs,
    calibration: Calibration | None,
) -> dict[str, Any]:
    """Compare every candidate, over its seeds, with everything without a predictor that costs no more.

    Returns:
        `predictor`, as in `evaluation.comparison.predictor_gains`, and `policies`: the Pareto front of candidates and
        policies without a predictor, cheapest first, each with `label`, `top1` and `mean_gflops`. Both are for the
        images that no cascade was fitted on. Without a calibration they are null and empty.
    """
    if calibration is None:
        return {"predictor": None, "policies": []}
    held_out_NR, cascades = correct_NR[calibration.held_out], calibration.curves["cascade"]
    backbone_R = np.asarray(costs.backbone_gflops)
    answered = [routed.correct_N(held_out_NR) for routed in cascades]
    spent = [float(routed.gflops_N(costs).mean()) for routed in cascades]
    whole: list[dict[str, Any]] = [
        {"label": label, "top1": float(correct_N.mean()), "mean_gflops": cost}
        for label, correct_N, cost in zip((_label(routed, costs) for routed in cascades), answered, spent, strict=True)
    ]
    points: list[dict[str, Any]] = []
    for summary in full:
        correct_SN, name = summary.correct_SN[:, calibration.held_out], names[summary.candidate]
        whole.append({"label": name, "top1": float(correct_SN.mean()), "mean_gflops": summary.gflops})
        place = int(np.searchsorted(calibration.costs_C, summary.gflops, side="right")) - 1
        if place < 0:
            continue
        other_N = best_without(held_out_NR, backbone_R, answered[place], summary.gflops, np.ones(len(held_out_NR)))
        gain = mean_over_seeds(correct_SN - other_N, tests=len(full))
        points.append(gain_point(name, summary.gflops, summary.gflops, gain))
    found = gains(points)
    return {"predictor": found, "policies": pareto(whole, lambda row: (row["top1"], row["mean_gflops"]))}


def _label(routed: Routed, costs: Costs) -> str:
    """Return the resolutions that run, cheapest first, such as static 48 px, or cascade 32, 48 px."""
    ran = np.flatnonzero(routed.ran_NR.any(axis=0))
    sides = ", ".join(str(costs.resolutions[j]) for j in sorted(ran, key=lambda j: costs.backbone[j]))
    return f"{'static' if len(ran) == 1 else 'cascade'} {sides} px"


def _finetuned(item: Finetuned, names: Mapping[Candidate, str]) -> dict[str, Any]:
    """Return the headline of the run's own report with the candidate, or only the candidate if the run failed."""
    name = names.get(item.candidate, item.candidate.network)
    row: dict[str, Any] = {
        "name": name,
        "network": item.candidate.network,
        "run": item.config.name,
        "reason": item.reason,
        "verdict": None,
        "predictor_gflops": None,
        "top1": None,
    }
    if item.report is None:
        return row
    return {
        **row,
        **item.report["headline"],
        "label": f"{name}, finetuned",
        "predictor_gflops": item.report["costs"]["predictor_gflops"],
        "verdict": item.report["verdict"],
    }


def write_search_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write report.md, the figures and, last, report.json into `folder`."""
    text = to_json(report)
    files = {f"{name}.png": content for name, content in draw_search_figures(report, LIGHT).items()}
    files["report.md"] = render_search(report, files).encode()
    files["report.json"] = text.encode()
    folder.mkdir(parents=True, exist_ok=True)
    for figure in FIGURES:
        if f"{figure}.png" not in files:
            (folder / f"{figure}.png").unlink(missing_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content)


def render_search(report: Mapping[str, Any], figures: Collection[str]) -> str:
    """Return the report as Markdown. `figures` lists the PNG files in the same folder."""
    parts = [f"# Search: {cell(report['name'])}", f"**{verdict(report)}**", "\n".join(_details(report))]
    parts.append(markdown_figure("front", "Accuracy against cost of every trial", figures))
    if report["policies"]:
        parts += ["## The front of whole policies", _POLICIES_NOTE, markdown_table(*_policies_table(report))]
    parts += ["## The paper's four and the finalists", _compared_note(report), markdown_table(*_compared_table(report))]
    if any(row["compared_with"] for row in report["against_paper"]):
        parts += ["Each of the four against the most accurate finalist that costs no more, on the same images:"]
        parts.append(markdown_table(*_against_table(report)))
    if report["finetuned"]:
        parts += ["## Finetuned with their backbone", markdown_table(*_finetuned_table(report))]
        parts.append(
            "Evaluated in full. Totals are measured: the predictor, and the backbone at the chosen resolutions."
        )
    parts += ["## Static resolutions and oracle", markdown_table(*result_table(report, DIGITS))]
    parts += ["## The front of the first seed", markdown_table(*_front_table(report))]
    if report["importance"]:
        parts += ["## Which parameters matter"]
        parts.append(markdown_figure("importance", "Importance of the parameters", figures))
        parts.append(markdown_table(*_importance_table(report)))
    if bad := [row for row in report["trials"] if row["outcome"] != "finished"]:
        parts += ["## Trials without a valid result", markdown_table(*_bad_table(bad))]
    parts += ["## How it was measured", "\n".join(f"- {note}" for note in _notes(report))]
    parts.append(markdown_table(("", ""), _provenance(report)))
    return "\n\n".join(part for part in parts if part) + "\n"


_POLICIES_NOTE = (
    "Candidates, and policies without a predictor on the same backbone: cascades and static resolutions. All results "
    "are for validation images that no cascade was fitted on."
)


def _policies_table(report: Mapping[str, Any]) -> Table:
    body = [(row["label"], percent(row["top1"], DIGITS), gflops(row["mean_gflops"])) for row in report["policies"]]
    return ("policy", "top-1", "GFLOPs"), body


def verdict(report: Mapping[str, Any]) -> str:
    """Say whether a predictor pays off, and which model to deploy or how the front compares to the four."""
    return " ".join(filter(None, (predictor_sentence(report), _outcome(report))))


def _outcome(report: Mapping[str, Any]) -> str:
    """Return one sentence: the model to deploy, or how the front compares with the paper's four."""
    chosen = report["chosen"]
    if chosen is not None:
        model = f"{chosen['name']} ({chosen['network']})"
        reaches = (
            f"reaches {percent(chosen['top1'], DIGITS)} (95 % CI {interval(chosen, DIGITS)}) at "
            f"{gflops(chosen['mean_gflops'])} GFLOPs."
        )
        static = _dominating_static(report, chosen)
        if static is None:
            return f"Deploy {model}, finetuned: it {reaches}"
        return (
            f"Static wins: {static['label']} of the searched backbone has {_estimate(static)} at "
            f"{gflops(static['mean_gflops'])} GFLOPs. The best finetuned model, {model}, {reaches}"
        )
    asked = _asked(report)
    if asked and report["finetuned"]:
        return f"No finetuned model is {asked}; the table below has the nearest."
    if not report["space"]:
        return "The paper's four predictors, compared."
    beaten = [str(row["paper"]) for row in report["against_paper"] if row["dominated_by"]]
    if not beaten:
        return "No finalist dominates any of the paper's four."
    if len(beaten) == 1:
        return f"A finalist dominates number {beaten[0]} of the paper's four."
    return f"Finalists dominate numbers {', '.join(beaten[:-1])} and {beaten[-1]} of the paper's four."


def _dominating_static(report: Mapping[str, Any], chosen: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the most accurate static resolution that costs no more than the chosen model and is no less accurate."""
    rows, budget = report["held_out_rows"], chosen["mean_gflops"]
    best = choose_item(rows, lambda row: (row["top1"], row["mean_gflops"]), budget_gflops=budget)
    return best if best is not None and best["top1"] >= chosen["top1"] else None


def _statics(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in report["rows"] if row["kind"] == "static"]


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
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    best = max(_statics(report), key=lambda row: row["top1"])
    lines = [
        f"- {len(report['trials'])} trials ({outcomes}), {seconds:,.0f} s of training in all of them together.",
        f"- Best static resolution: {best['label']}, {_estimate(best)}, {gflops(best['mean_gflops'])} GFLOPs.",
    ]
    if report["chosen"] is not None:
        lines.append(f"- The finetuned model against its own static resolutions: {report['chosen']['verdict']}")
    return lines


def _estimate(row: Mapping[str, Any]) -> str:
    return "-" if row["top1"] is None else f"{percent(row['top1'], DIGITS)} ({interval(row, DIGITS)})"


def _compared_note(report: Mapping[str, Any]) -> str:
    several = report["num_seeds"] > 1
    return (
        f"Each predictor was trained with {report['num_seeds']} seed{'s' if several else ''} on the frozen backbone. "
        "The columns are those of the supplement's Table 1; totals are measured. Intervals cover "
        f"{'images and seeds' if several else 'images'}."
    )


def _compared_table(report: Mapping[str, Any]) -> Table:
    """Return the candidates in the format of the supplement's Table 1."""
    costs = ("predictor GFLOPs", "total GFLOPs", "over seeds")
    body = [
        (
            row["label"],
            row["network"],
            gflops(row["predictor_gflops"]),
            gflops(row["mean_gflops"]),
            f"{gflops(row['gflops_low'])} to {gflops(row['gflops_high'])}",
            _estimate(row) + _collapsed(row["outcomes"]),
            _estimate(row["random"]),
            row["recipe"],
        )
        for row in report["compared"]
    ]
    return ("", "predictor", *costs, "top-1", "random, same shares", "recipe"), body


def _collapsed(outcomes: list[str]) -> str:
    collapsed = outcomes.count("collapsed")
    return f", {collapsed} of {len(outcomes)} collapsed" if collapsed else ""


def _against_table(report: Mapping[str, Any]) -> Table:
    body = []
    for row in report["against_paper"]:
        if row["compared_with"] is None:
            body.append((f"paper {row['paper']}", "-", "-", "-", "no finalist is as cheap"))
            continue
        points = f"{row['difference_points']:+.2f} ({row['low_points']:+.2f} to {row['high_points']:+.2f})"
        outcome = "dominated" if row["dominated_by"] else "not dominated"
        body.append((f"paper {row['paper']}", row["compared_with"], f"{row['gflops_ratio']:.2f}", points, outcome))
    return ("", "against", "FLOPs ratio", "points", ""), body


def _finetuned_table(report: Mapping[str, Any]) -> Table:
    body = []
    for row in report["finetuned"]:
        if row["top1"] is None:
            cells = ("-", "-", f"failed: {row['reason']}")
        else:
            cells = (gflops(row["predictor_gflops"]), gflops(row["mean_gflops"]), _estimate(row))
        body.append((row["name"], row["network"], *cells, row["run"]))
    return ("", "predictor", "predictor GFLOPs", "total GFLOPs", "top-1", "run"), body


def _front_table(report: Mapping[str, Any]) -> Table:
    trials = {row["id"]: row for row in report["trials"]}
    body = []
    for key in report["front"][:FRONT_ROWS]:
        row = trials[key]
        recipe = (f"{row['candidate'][name]:.3g}" for name in RECIPE_KEYS)
        name = row["label"] if row["paper"] is None else f"paper {row['paper']}: {row['label']}"
        costs = gflops(row["predictor_gflops"]), gflops(row["mean_gflops"])
        body.append((name, *costs, _estimate(row), *recipe, key[:8]))
    return ("predictor", "predictor GFLOPs", "total GFLOPs", "top-1", *RECIPE_KEYS, "trial"), body


def _importance_table(report: Mapping[str, Any]) -> Table:
    def share(found: Mapping[str, float]) -> str:
        return f"{100 * found['mean']:.0f} % ({100 * found['low']:.0f} to {100 * found['high']:.0f})"

    body = [(row["parameter"], share(row["accuracy"]), share(row["gflops"])) for row in report["importance"]]
    return ("parameter", "of accuracy's variance", "of the cost's variance"), body


def _bad_table(rows: list[Mapping[str, Any]]) -> Table:
    # A collapse's first sentence says what happened; the others advise on a single run, and are in report.json.
    def reason(row: Mapping[str, Any]) -> str:
        text = row["reason"] or ""
        return text.split(". ")[0] if row["outcome"] == "collapsed" else text

    body = [(row["id"][:8], row["label"], row["outcome"], reason(row)) for row in rows]
    return ("trial", "predictor", "outcome", "reason"), body


def _notes(report: Mapping[str, Any]) -> list[str]:
    return [
        f"Top-1 on {report['n']:,} validation images. With one seed: Wilson's 95 % interval. With several: an interval "
        "over images and seeds by Student's t.",
        f"A trial trains the predictor for {report['method']['epochs']} epochs on stored logits of the frozen "
        "backbone. Its cost is in GFLOPs of 1e9 multiply-adds an image, predictor included, at the shares measured on "
        "these images.",
        "The paper's four have this configuration's input size, width and recipe, and the same seeds as the finalists. "
        "The first seed selected the finalists on the same images, so their results for it are too good.",
        "Random: images assigned to resolutions at random, with the same shares. Oracle: the cheapest correct "
        "resolution, without a predictor.",
        "Importance: functional ANOVA over the trials of the first seed, with the range over "
        f"{NUM_RESAMPLES} bootstrap resamples of the trials.",
    ]


def _provenance(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    space = {f"space: {key}": value for key, value in report["space"].items()}
    return provenance_pairs(report, {"preset": report["preset"], "objective": report["objective"], **space})
