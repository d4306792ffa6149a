"""Train variants of a configuration with several seeds, and compare what policies reach on them.

`python -m benchmarks.variants glyphs --fields stages.predictor=null stages.joint=null \\
    --variant three "" --variant four "model.resolutions=[96,64,48,32]" [--seeds 3] [--folder runs/variants]`

Every run trains in one process, as `jobs.train` does with the same configuration, without Ray and MLflow. Its
predictions stay in the folder, and a run that is there is not trained again. Policies are fitted on random halves of
the validation images and applied to the others. The table has the mean over the seeds
with its 95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import ROOT, progress
from benchmarks.overhead import opened_run
from benchmarks.policies import images_of, reached
from pipeline.config.load import load_config
from pipeline.evaluation.predictions import collect_predictions
from pipeline.evaluation.statistics import mean_of
from pipeline.models.cost import Costs
from pipeline.policies.route import Images
from pipeline.training.loop import train

COSTS, PREDICTIONS = "costs.json", "predictions.npz"


def train_run(config: str, folder: Path, device: str, fields: list[str]) -> None:
    """Train one run, and save its validation predictions and costs in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with opened_run(load_config(config, fields), folder, torch.device(device)) as run:
        train(run)
        collect_predictions(run.model, run.validation.epoch(0)).save(folder / PREDICTIONS)
        (folder / COSTS).write_text(json.dumps(dataclasses.asdict(run.costs)))


def validation_images(folder: Path) -> Images:
    """Return the validation images of a variant's run, from its stored predictions and costs."""
    return images_of(folder / PREDICTIONS, Costs(**json.loads((folder / COSTS).read_text())))


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variants", description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument(
        "--variant", nargs=2, action="append", default=[], metavar=("NAME", "FIELDS"), help="fields of one variant"
    )
    parser.add_argument("--fields", nargs="*", default=[], metavar="key.path=value", help="fields of all variants")
    parser.add_argument("--costs", nargs="*", type=float, default=[], help="cost limits, in 1e-3 GFLOPs")
    parser.add_argument("--kind", default="cascade", help="kind of policy (default cascade)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs/variants"))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # for the processes that this program starts
    args = parser.parse_args()
    if args.one:
        return train_run(args.config, args.one, args.device, args.fields)
    folders = {name: [args.folder / f"{name}-{seed}" for seed in range(args.seeds)] for name, _ in args.variant}
    cases = [
        (folder, [*args.fields, *shlex.split(fields), f"name={name}", f"seed={seed}"])
        for seed in range(args.seeds)
        for name, fields in args.variant
        for folder in [folders[name][seed]]
        if not (folder / COSTS).exists()
    ]

    def run(case: tuple[Path, list[str]]) -> None:
        folder, fields = case
        program = [sys.executable, "-m", "benchmarks.variants", args.config, "--one", str(folder)]
        subprocess.run([*program, "--device", args.device, "--fields", *fields], cwd=ROOT, check=True)
        progress(f"{folder.name} is trained")

    with ThreadPoolExecutor(args.at_once) as pool:
        list(pool.map(run, cases))
    print("\n".join(table(folders, [cost / 1000 for cost in args.costs], args.kind)))
    return None


if __name__ == "__main__":
    main()
