"""Add a finished run's model to the MLflow registry and move the alias `champion`.

The first version gets the alias. Later, --promote moves the alias to a version that is not worse than the champion on
the same validation images and costs no more GFLOPs; --rollback moves it back. Exit code 1 means that the promotion was
refused.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from jobs.cli import job_config, job_parser, run_job
from pipeline.config.schema import Config

if TYPE_CHECKING:
    from pipeline.tracking.promotion import Decision


def main() -> None:
    args = _parser().parse_intermixed_args()
    args.overrides += [f"registry.alias={args.alias}"] if args.alias else []
    config = job_config(args)
    bounds = {
        name: value
        for name in ("max_accuracy_drop", "max_gflops_increase")
        if (value := getattr(args, name)) is not None
    }
    if bounds and not args.promote:
        raise ValueError("--max-accuracy-drop and --max-gflops-increase need --promote. Add it")
    if args.rollback:
        roll_back(config)
    else:
        register(config, bounds if args.promote else None)


def _parser() -> argparse.ArgumentParser:
    parser = job_parser("register", __doc__)
    parser.add_argument("--alias", help="alias to use instead of registry.alias")
    moves = parser.add_mutually_exclusive_group()
    moves.add_argument("--promote", action="store_true", help="move the alias to this run's version unless it is worse")
    moves.add_argument("--rollback", action="store_true", help="move the alias back to its previous version")
    parser.add_argument(
        "--max-accuracy-drop", type=float, metavar="POINTS", help="largest loss of top-1 with which to promote"
    )
    parser.add_argument(
        "--max-gflops-increase",
        type=float,
        metavar="PERCENT",
        help="largest increase of the cost with which to promote",
    )
    return parser


def register(config: Config, bounds: dict[str, float] | None) -> None:
    """Register the run's model and, with bounds, promote it if the gate allows it."""
    from pipeline.config.run_folder import RunFolder
    from pipeline.evaluation.gate import Bounds
    from pipeline.tracking.promotion import promote
    from pipeline.tracking.registry import register_model

    allowed = None if bounds is None else Bounds(**bounds)
    folder = RunFolder.of(config)
    model = register_model(config, folder.path, folder.model, folder.report_json)
    print(f"{model.name} version {model.version}{'' if model.is_new else ' (already registered)'}: {model.uri}")
    print(f"top-1 {100 * float(model.tags['accuracy']):.2f} %, {float(model.tags['gflops']):.4g} GFLOPs an image")
    champion = f"models:/{model.name}@{model.alias}"
    if model.champion == model.version:
        print(f"{champion} is this version")
    elif allowed is None:
        print(f"{champion} stays version {model.champion}; --promote compares the two")
    elif objections := show(promote(config, model.version, allowed), champion):
        print("\n".join(f"- {objection}" for objection in objections))
        sys.exit(1)


def show(decision: Decision, champion: str) -> list[str]:
    """Print the comparison and the decision, and return the objections."""
    from pipeline.evaluation.gate import comparison_table

    if decision.comparison is not None:
        names = (f"version {decision.challenger}", f"{decision.alias}, version {decision.champion}")
        print(f"\n{comparison_table(decision.comparison, *names)}\n")
    if decision.objections:
        print(f"not promoted: {champion} stays version {decision.champion}")
    else:
        print(f"promoted: {champion} is now version {decision.challenger}; --rollback undoes it")
    return decision.objections


def roll_back(config: Config) -> None:
    """Move the alias back to the previous champion."""
    from pipeline.tracking.promotion import roll_back as roll_back_alias

    back, gone = roll_back_alias(config)
    print(f"rolled back: models:/{config.registry.name}@{config.registry.alias} is version {back} again, not {gone}")


if __name__ == "__main__":
    run_job(main)
