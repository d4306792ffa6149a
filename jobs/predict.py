"""Classify image files with a registered model: class, probability, chosen resolution and cost of each.

The registry is MLFLOW_TRACKING_URI or, if that is not set, mlflow.db in the project folder. A file that cannot be read
gets a row with the reason; without --out, the exit code is then 1.

With --out, a folder with any number of files is predicted on Ray into Parquet files. After an interruption the same
command resumes. If everything is done, it prints the summary again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.files import shown_name
from datasets.sources.folders import SUFFIXES, walk_images
from datasets.sources.index import counted
from jobs.cli import run_job


def main() -> None:
    args = _parser().parse_intermixed_args()
    if not math.isfinite(args.budget_bias):
        raise ValueError(f"--budget-bias is {args.budget_bias}; give a finite number")
    if args.files_per_part is not None and args.files_per_part < 1:
        raise ValueError(f"--files-per-part is {args.files_per_part}; give 1 or more")
    if args.out is not None:
        print(predict_folder(args))
        return
    if args.files_per_part is not None:
        raise ValueError("--files-per-part needs --out")
    paths = find_images(args.images)
    # MLflow and torch take seconds to import; report a mistyped path before that.
    from pipeline.serving.package import classify_files
    from pipeline.tracking.registry import open_model

    model = open_model(args.model, args.budget_bias)
    answers = classify_files(model, paths, budget_bias=args.budget_bias)
    rows = [{**row, "file": shown_name(row["file"])} for row in answers]
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    if any(row["error"] for row in rows):
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("--json", action="store_true", help="print one JSON array instead of a table")
    parser.add_argument(
        "--budget-bias",
        type=float,
        default=0.0,
        help="a positive bias spends more, a negative one less (see the report's budget curve)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="predict on Ray and write Parquet files here; resumes"
    )
    parser.add_argument("--files-per-part", type=int, metavar="N", help="images in each Parquet file")
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="an image file (JPEG, PNG, WebP, BMP, TIFF, PPM, AVIF), or a folder of them",
    )
    return parser


def predict_folder(args: argparse.Namespace) -> str:
    """Predict one folder into `--out`, and return the summary."""
    if args.json or len(args.images) != 1 or not args.images[0].is_dir():
        raise ValueError("--out takes one folder of images and no --json: the results are Parquet files")
    from pipeline.cluster.predict_folder import predict_folder

    summary = predict_folder(
        args.model,
        args.images[0],
        args.out,
        budget_bias=args.budget_bias,
        files_per_part=args.files_per_part,
    )
    return f'{summary}\npandas.read_parquet("{args.out}") reads all results'


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Return files as given and the sorted images below folders. Raise a ValueError that lists all problems."""
    found: list[Path] = []
    problems = []
    for path in paths:
        if path.is_dir():
            walk = walk_images(path)
            inside = [path / name for name in walk.files]
            found += inside
            if walk.skipped:
                print(f"left out below {shown_name(path)}: {counted(walk.skipped)}", file=sys.stderr)
            if not inside:
                problems.append(f"{path} has no {', '.join(SUFFIXES)} file")
        elif path.is_file():
            found.append(path)
        else:
            problems.append(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    if problems:
        raise ValueError("\n".join(problems))
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as text in aligned columns."""
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
