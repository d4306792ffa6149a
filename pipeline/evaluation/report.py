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
from pipeline.evaluation.attributes import by_attribute
from pipeline.evaluation.budget import budget_curve
from pipeline.evaluation.comparison import compare, table_rows
from pipeline.evaluation.gallery import draw_gallery, pick_tiles
from pipeline.evaluation.plots import draw_figures
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.render import render_html, render_markdown
from pipeline.evaluation.statistics import CONFIDENCE, RESAMPLES, oracle_choice, resample
from pipeline.evaluation.style import DARK, LIGHT
from pipeline.evaluation.verdict import judge
from pipeline.models.cost import Costs
from pipeline.models.latency import Latency

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
