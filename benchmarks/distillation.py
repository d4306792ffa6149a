"""Measures accuracy with and without ensemble distillation in the backbone stage, over several seeds.

`python -m benchmarks.distillation glyphs elpv [--seeds 3] [--device cuda] [--at-once 1] [key.path=value ...]`

Every run trains and evaluates in one process, as `jobs.train` does with the same configuration, without Ray and MLflow.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.harness import ROOT
from benchmarks.overhead import opened_run
from pipeline.config.load import load_config
from pipeline.evaluation.predictions import collect_predictions
from pipeline.evaluation.report import Evaluation, build_report
from pipeline.evaluation.seeds import seeds_markdown, summarize_seeds
from pipeline.training.loop import train

KINDS = ("none", "mean", "learned")


def train_and_report(config: str, folder: Path, device: str, changed: list[str]) -> dict[str, Any]:
    """Train one run; return its report."""
    with opened_run(load_config(config, changed), folder, torch.device(device)) as run:
        train(run)
        predictions = collect_predictions(run.model, run.validation.epoch(0))
        about = {"dataset": run.manifest.dataset}
        evaluation = Evaluation(predictions, run.costs, predictions.indices_N.astype(np.uint64))
        name, classes = run.config.name, run.manifest.classes
        return build_report(evaluation, classes=classes, attributes={}, name=name, context=about)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation", description=__doc__)
    parser.add_argument("configs", nargs="+", help="configurations, and fields to change in all of them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time")
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)  # for the processes that this program starts
    args = parser.parse_intermixed_args()
    configs = [word for word in args.configs if "=" not in word]
    changed = [word for word in args.configs if "=" in word]
    with TemporaryDirectory(prefix="distillation-") as scratch:
        if args.report:
            report = train_and_report(configs[0], Path(scratch), args.device, changed)
            args.report.write_text(json.dumps(report))
            return
        cases = [(config, kind, seed) for config in configs for kind in KINDS for seed in range(args.seeds)]

        def run(case: tuple[str, str, int]) -> dict[str, Any]:
            config, kind, seed = case
            name, file = f"{config}-{kind}-{seed}", Path(scratch) / f"{config}-{kind}-{seed}.json"
            fields = [f"name={name}", f"seed={seed}", f"stages.backbone.distillation={kind}", *changed]
            program = [sys.executable, "-m", "benchmarks.distillation", config, *fields]
            subprocess.run([*program, "--device", args.device, "--report", str(file)], cwd=ROOT, check=True)
            report = json.loads(file.read_text())
            print(f"{name}: {report['verdict']}", file=sys.stderr, flush=True)
            return report

        with ThreadPoolExecutor(args.at_once) as pool:
            reports = list(pool.map(run, cases))
    for start in range(0, len(reports), args.seeds):
        print(seeds_markdown(summarize_seeds(reports[start : start + args.seeds])), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
