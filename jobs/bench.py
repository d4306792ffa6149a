"""Compare this project's speed with other software on this machine, in alternating runs.

A ratio above 1 means that this project is better. The spread is the lowest and the highest ratio of a pair of runs.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from benchmarks.harness import MIN_RUNS, show
from jobs.cli import run_job

BENCHES = {
    "gpu": "on a GPU, in bfloat16: training steps against plain PyTorch, and routed against static inference",
    "inference": "routed inference, against static networks, against masking, and over HTTP against itself",
    "loader": "batches of training crops, against FFCV as shipped, torchvision and decoding alone",
    "network": "training over a slow network, against the formula of docs/scaling.md, next to DistributedDataParallel",
    "nodes": "two nodes with one worker each, against one node with two workers, on this machine",
    "order": "windows of pages, against random order, for a beton larger than memory",
    "prepare": "preparing betons from images, against FFCV's DatasetWriter",
    "step": "a training step of each stage, against an equal step in plain PyTorch",
    "overhead": "epochs under Ray Train, against the same loop under torchrun",
    "recovery": "time to resume after a killed worker, against Ray's own restart",
    "serve": "a registered model on Ray Serve, against mlflow models serve, and under disturbances",
    "search": "a trial on logit tables, against the same predictor trained live; two at once, against one",
}


def main() -> None:
    listing = "\n".join(f"  {name:<10}{what}" for name, what in BENCHES.items())
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench",
        description=f"{__doc__}\nbenches:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="measure on these JPEGs instead of generated ones"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of each side (default 2)")
    parser.add_argument(
        "--runs", type=int, default=MIN_RUNS, help=f"number of pairs of runs (default and minimum {MIN_RUNS})"
    )
    parser.add_argument("--json", action="store_true", help="print only one JSON object")
    args = parser.parse_args()
    if args.runs < MIN_RUNS or args.threads < 1:
        raise ValueError(f"--runs {args.runs} --threads {args.threads}: give at least {MIN_RUNS} runs and 1 thread")
    rows, notes = import_module(f"benchmarks.{args.bench}").run(args.images, args.runs, args.threads)
    show(args.bench, rows, notes, as_json=args.json)


if __name__ == "__main__":
    run_job(main)
