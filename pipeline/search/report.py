"""The report of a search: the front, the paper's four, what was finetuned, and what to deploy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from datasets.files import write_whole
from pipeline.config import Config
from pipeline.evaluation.report import to_json
from pipeline.evaluation.statistics import CONFIDENCE, Estimate, accuracy, mean_over_seeds, oracle_choice
from pipeline.evaluation.style import LIGHT
from pipeline.search.figures import draw_search_figures
from pipeline.search.front import Point, Summary, dominates, pareto, summarize
from pipeline.search.importance import parameter_importance
from pipeline.search.records import Record
from pipeline.search.render import render_search
from pipeline.search.space import Candidate, Space, paper_candidates

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
