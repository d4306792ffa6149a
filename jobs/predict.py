"""Classify image files with a registered model: class, probability, chosen resolution and cost of each.

The registry is the one of MLFLOW_TRACKING_URI, else mlflow.db in the project folder. A file that cannot be read gets a
row with the reason, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.cli import run_job

SUFFIXES = (".jpg", ".jpeg", ".png")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("--json", action="store_true", help="print one JSON array instead of a table")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="a JPEG or PNG file, or a folder of them")
    args = parser.parse_intermixed_args()
    paths = find_images(args.images)
    # MLflow and torch take seconds to import: a mistyped path is answered before.
    from pipeline.tracking.inference import classify_files, open_model

    rows = list(classify_files(open_model(args.model), paths))
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    if any(row["error"] for row in rows):
        sys.exit(1)


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Files as given, folders as the sorted images below them; raises ValueError naming all that is not there."""
    found: list[Path] = []
    problems = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            found += inside
            if not inside:
                problems.append(f"{path} holds no {', '.join(SUFFIXES)} file")
        elif path.exists():
            found.append(path)
        else:
            problems.append(f"{path} does not exist")
    if problems:
        raise ValueError("\n".join(problems))
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people, in aligned columns."""
    width = max(len("file"), *(len(row["file"]) for row in rows))
    label_width = max(len("class"), *(len(row["label"] or "") for row in rows))
    lines = [f"{'file':<{width}}  {'class':<{label_width}}  probability  resolution  GFLOPs"]
    for row in rows:
        if row["error"]:
            lines.append(f"{row['file']:<{width}}  error: {row['error']}")
        else:
            answer = f"{row['label']:<{label_width}}  {row['probability']:11.3f}  {row['resolution']:10d}"
            lines.append(f"{row['file']:<{width}}  {answer}  {row['gflops']:6.3g}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(main)
