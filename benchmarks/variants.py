"""Train variants of a configuration with several seeds, and compare what policies reach on them.

`python -m benchmarks.variants glyphs --fields stages.predictor=null stages.joint=null \\
    --variant three "" --variant four "model.resolutions=[96,64,48,32]" [--seeds 3] [--folder runs/variants]`

Every run trains in one process, as `jobs.train` does with the same configuration, without Ray and MLflow. Its
predictions stay in the folder, and a run that is there is not trained again. The first table has the mean accuracy
over the seeds with its 95 % interval (Student's t): policies are fitted on random halves of the validation images and
applied to the others. With --against-static, a second table compares the policy of each run and limit with the static
resolutions: policies for each fifth of the images are fitted on the other fifths, as in a report. Images of one
group (data.group_by) are in the same fifth.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import ROOT, progress
from benchmarks.policies import reached
from benchmarks.runs import images_of, opened_run
from datasets.beton import split_keys
from pipeline.config.load import load_config
from pipeline.evaluation.predictions import Predictions, collect_predictions
from pipeline.evaluation.report import Evaluation, build_report
from pipeline.evaluation.statistics import mean_of
from pipeline.models.cost import Costs
from pipeline.policies.calibrate import Budget, Split
from pipeline.policies.route import Images
from pipeline.training.assembly import validation_extents
from pipeline.training.loop import train

COSTS, PREDICTIONS, KEYS = "costs.json", "predictions.npz", "split_keys.npy"
FOLDS = Split(cross_fit_below=sys.maxsize)


def train_run(config: str, folder: Path, device: str, fields: list[str]) -> None:
    """Train one run, and save its validation predictions and costs in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with opened_run(load_config(config, fields), folder, torch.device(device)) as run:
        train(run)
        found = collect_predictions(run.model, run.validation.epoch(0))
        replace(found, extents_N=validation_extents(run.config)[found.indices_N]).save(folder / PREDICTIONS)
        np.save(folder / KEYS, split_keys(run.config.data.folder)[found.indices_N])
        (folder / COSTS).write_text(json.dumps(dataclasses.asdict(run.costs)))


def is_trained(folder: Path) -> bool:
    """Return whether a variant's run has left all its files."""
    return all((folder / name).exists() for name in (COSTS, PREDICTIONS, KEYS))


def stored_costs(folder: Path) -> Costs:
    """Return the costs that a variant's run has stored."""
    costs = Costs(**json.loads((folder / COSTS).read_text()))
    return replace(costs, resolutions=tuple(costs.resolutions), backbone_gflops=tuple(costs.backbone_gflops))


def validation_images(folder: Path) -> Images:
    """Return the validation images of a variant's run, from its stored predictions and costs."""
    return images_of(Predictions.load(folder / PREDICTIONS), stored_costs(folder))


def interval(values: list[float]) -> str:
    """Return the mean of percentages over the seeds with the half width of its 95 % interval."""
    found = mean_of(values)
    if found is None:
        return f"{100 * values[0]:.2f}"
    return f"{100 * found.value:.2f} ± {100 * (found.high - found.value):.2f}"


def table(folders: dict[str, list[Path]], costs: list[float], kind: str) -> list[str]:
    """Return a Markdown table: static accuracies, and the accuracy of one kind of policy within rising cost limits."""
    lines = [
        "| variant | static, largest first | " + " | ".join(f"{1000 * cost:g}" for cost in costs) + " |",
        "|---" * (len(costs) + 2) + "|",
    ]
    for name, runs in folders.items():
        seeds = [validation_images(folder) for folder in runs]
        static = np.mean([images.correct_NR.mean(axis=0) for images in seeds], axis=0)
        points = [reached(images, costs) for images in seeds]
        cells = [
            interval([point[kind, cost][0] for point in points]) if (kind, cost) in points[0] else "" for cost in costs
        ]
        lines.append(f"| {name} | {' / '.join(f'{100 * top1:.1f}' for top1 in static)} | {' | '.join(cells)} |")
    return lines


def against_static(folder: Path, budgets: Sequence[Budget]) -> Iterator[str]:
    """Yield a row for each budget: the chosen policy's accuracy and cost, and its differences from the envelope
    and from the best static resolution."""
    predictions, costs = Predictions.load(folder / PREDICTIONS), stored_costs(folder)
    keys_N = np.load(folder / KEYS)
    classes = [str(index) for index in range(predictions.logits_NRK.shape[2])]
    for budget in budgets:
        evaluation = Evaluation(predictions, costs, keys_N, budget=budget, has_predictor=False, split=FOLDS)
        report = build_report(evaluation, classes=classes, attributes={}, name=folder.name, context={"dataset": "x"})
        best, found = report["best_static"], report["headline"]
        above, against = report["comparisons"]["envelope"], report["comparisons"][best]
        limit = f"{1000 * budget.cost:g}" if budget.cost else f"{100 * (budget.max_drop or 0):g} points"
        yield (
            f"| {folder.name} | {limit} | {100 * found['top1']:.1f} % at {1000 * found['mean_cost']:.1f} | "
            f"{_points(above)} | {best} | {_points(against)} | {against['cost_ratio']:.2f} |"
        )


def _points(found: Mapping[str, float]) -> str:
    return f"{found['difference_points']:+.1f} ({found['low_points']:+.1f} to {found['high_points']:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variants", description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument(
        "--variant", nargs=2, action="append", default=[], metavar=("NAME", "FIELDS"), help="fields of one variant"
    )
    parser.add_argument("--fields", nargs="*", default=[], metavar="key.path=value", help="fields of all variants")
    parser.add_argument("--costs", nargs="*", type=float, default=[], help="cost limits, in 1e-3 GFLOPs")
    parser.add_argument(
        "--drops", nargs="*", type=float, default=[], help="accuracy drops to allow with --against-static, points"
    )
    parser.add_argument("--against-static", action="store_true", help="also compare each run with static resolutions")
    parser.add_argument("--kind", default="cascade", help="kind of policy (default cascade)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs/variants"))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # for the processes that this program starts
    args = parser.parse_args()
    if args.one:
        train_run(args.config, args.one, args.device, args.fields)
    else:
        compare_variants(args)


def compare_variants(args: argparse.Namespace) -> None:
    """Train the runs that are missing, each in its own process, and print the tables."""
    folders = {name: [args.folder / f"{name}-{seed}" for seed in range(args.seeds)] for name, _ in args.variant}
    cases = [
        (folder, [*args.fields, *shlex.split(fields), f"name={name}", f"seed={seed}"])
        for seed in range(args.seeds)
        for name, fields in args.variant
        for folder in [folders[name][seed]]
        if not is_trained(folder)
    ]

    def run(case: tuple[Path, list[str]]) -> None:
        folder, fields = case
        program = [sys.executable, "-m", "benchmarks.variants", args.config, "--one", str(folder)]
        subprocess.run([*program, "--device", args.device, "--fields", *fields], cwd=ROOT, check=True)
        progress(f"{folder.name} is trained")

    with ThreadPoolExecutor(args.at_once) as pool:
        list(pool.map(run, cases))
    print("\n".join(table(folders, [cost / 1000 for cost in args.costs], args.kind)))
    if args.against_static:
        budgets = [Budget(cost=cost / 1000) for cost in args.costs] + [
            Budget(max_drop=drop / 100) for drop in args.drops
        ]
        print(
            "\n| run | limit | policy | above the envelope, points | best static | against it, points | of its cost |"
        )
        print("|---" * 7 + "|")
        for folder in chain.from_iterable(folders.values()):
            print("\n".join(against_static(folder, budgets)))


if __name__ == "__main__":
    main()
