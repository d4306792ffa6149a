"""Compare runs with different seeds in one table: `python -m jobs.compare runs/glyphs runs/glyphs-seed1 ...`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jobs.cli import run_job


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    folders = parser.parse_args().runs
    from pipeline.config.run_folder import RunFolder
    from pipeline.evaluation.seeds import seeds_markdown, summarize_seeds

    missing = [folder for folder in folders if not RunFolder(folder).report_json.is_file()]
    if missing:
        raise ValueError(f"{', '.join(map(str, missing))}: no report. Give the folders of finished runs")
    print(seeds_markdown(summarize_seeds([json.loads(RunFolder(run).report_json.read_text()) for run in folders])))


if __name__ == "__main__":
    run_job(main)
