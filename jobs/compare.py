"""Compare runs with different seeds in one table: `python -m jobs.compare runs/glyphs runs/glyphs-seed1 ...`.

With --against, each run is compared with a run of other resolutions on the same validation images, pair by pair:
`python -m jobs.compare runs/glyphs runs/glyphs-seed1 --against runs/static runs/static-seed1`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import run_job


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--against", nargs="+", type=Path, metavar="RUN", default=[], help="the same number of other runs"
    )
    args = parser.parse_args()
    from pipeline.config.run_folder import RunFolder
    from pipeline.evaluation.seeds import seeds_markdown, summarize_seeds

    missing = [folder for folder in (*args.runs, *args.against) if not RunFolder(folder).report_json.is_file()]
    if missing:
        raise ValueError(f"{', '.join(map(str, missing))}: no report. Give the folders of finished runs")
    if args.against:
        print(pairs(args.runs, args.against))
    else:
        reports = [json.loads(RunFolder(run).report_json.read_text()) for run in args.runs]
        print(seeds_markdown(summarize_seeds(reports)))


def pairs(runs: Sequence[Path], against: Sequence[Path]) -> str:
    """Compare the answers of each run with those of the other run at the same position.

    Raises:
        ValueError: the numbers of runs differ, a run has no answers, or a pair has no images in common.
    """
    from pipeline.config.run_folder import RunFolder
    from pipeline.evaluation.gate import ANSWERS_FILE, Answers
    from pipeline.evaluation.seeds import pairs_markdown

    if len(runs) != len(against):
        raise ValueError(
            f"{len(runs)} runs and {len(against)} after --against. Give the same number, in the order of their seeds"
        )
    files = [RunFolder(run).report / ANSWERS_FILE for run in (*runs, *against)]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ValueError(f"{', '.join(missing)} missing. Write the reports again with jobs.calibrate")
    found = [Answers.load(file) for file in files]
    named = zip(runs, found[: len(runs)], against, found[len(runs) :], strict=True)
    return pairs_markdown([(run.name, first, other.name, second) for run, first, other, second in named])


if __name__ == "__main__":
    run_job(main)
