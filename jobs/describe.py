"""Print what a configuration costs: FLOPs, parameters, images, steps, and memory of a step, without training.

FLOPs are multiply-adds, counted by torch; 1 GFLOP is 1e9 of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from datasets.beton import enlarged_text
from jobs.cli import job_parser, parsed_config, run_job
from pipeline.config.load import ConfigError

if TYPE_CHECKING:
    from pipeline.training.describe import Description, StageSummary

_MEGABYTE = 1e6


def main() -> None:
    parser = job_parser("describe", __doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_intermixed_args()
    config = parsed_config(args)
    from pipeline.training.describe import describe

    description = describe(config)
    print(as_json(description) if args.json else as_text(description))
    if description.problems:
        raise ConfigError(description.problems, f"the run {config.name}")


def as_json(description: Description) -> str:
    """Return the description as one JSON object, in which unknown values are null."""
    return json.dumps(asdict(description), indent=2)


def as_text(description: Description) -> str:
    """Return the description as tables."""
    data = description.data
    images = [["", "classes", "training", "validation", "MB"]]
    megabytes = None if data.size_bytes is None else round(data.size_bytes / _MEGABYTE)
    images.append(["images", *map(_number, (data.num_classes, data.num_train, data.num_validation, megabytes))])
    networks = [["network", "input", "GFLOPs", "parameters"]]
    networks += [
        [network.name, f"{network.side} px", _gflops(network.gflops), _number(network.parameters)]
        for network in description.networks
    ]
    shares = {network.side: network.enlarged for network in description.networks if network.enlarged is not None}
    enlarged = enlarged_text([*shares.values()], [*shares])
    low, high = description.lowest_gflops, description.highest_gflops
    stages = [
        ["stage", "epochs", "steps/epoch", "steps", "training GFLOPs", "alpha", "reachable GFLOPs", "step memory, MB"]
    ]
    stages += [_stage_row(stage) for stage in description.stages]
    kept = [
        f"the {stage.name} stage keeps {stage.table_bytes / _MEGABYTE:,.1f} MB of logits on disk"
        for stage in description.stages
        if stage.table_bytes is not None
    ]
    smaller = "validation images whose center crop is smaller than the resolution"
    parts = [
        f"run {description.run}",
        f"data {data.dataset} in {data.folder}: {data.note}\n{_table(images)}",
        f"{_table(networks)}\nparameters with all private batch norms: {_number(description.parameters)}",
        *([f"{smaller}, so that they are enlarged: {enlarged}"] if enlarged else []),
        f"cost per image, including the predictor: {_gflops(low)} GFLOPs (all images at the smallest resolution) to "
        f"{_gflops(high)} GFLOPs (all at the largest)",
        f"input: {description.input}\nprecision: {description.precision}",
        f"{_table(stages)}\nmemory is per worker, with {description.images_per_worker} images in a step",
        *kept,
    ]
    return "\n\n".join(parts)


def _stage_row(stage: StageSummary) -> list[str]:
    memory = stage.memory
    parts = [memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.images]
    names = ["weights", "gradients", "optimizer", "activations", "images"]
    listed = " + ".join(f"{name} {part / _MEGABYTE:,.0f}" for name, part in zip(names, parts, strict=True))
    target = ["", ""]
    if stage.alpha_gflops is not None and stage.reachable_gflops is not None:
        target = [f"{stage.alpha_gflops:g}", " to ".join(map(_gflops, stage.reachable_gflops))]
    elif stage.alpha_milliseconds is not None:
        target = [f"{stage.alpha_milliseconds:g} ms", "measured at start"]
    counts = [_number(stage.epochs), _number(stage.steps_per_epoch), _number(stage.total_steps)]
    training = "unknown" if stage.training_gflops is None else f"{stage.training_gflops:,.0f}"
    return [stage.name, *counts, training, *target, f"{memory.total / _MEGABYTE:,.0f} = {listed}"]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Align all columns to the right, except the first and a last one of more than 40 characters."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        if widths[-1] > 40:
            cells[-1] = row[-1]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _gflops(value: float) -> str:
    return f"{value:.4g}"


if __name__ == "__main__":
    run_job(main)
