"""Predict a large folder on the cluster: a Ray Data job whose actors each load the model once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError

from datasets.progress import progress_bar
from datasets.publish import exclusive
from pipeline.cluster.connection import ray_cluster
from pipeline.prediction_parts import FILES_PER_PART, OutputFolder, Part, Plan, rows_table, summarize
from pipeline.tracking.inference import FoundModel, classify_files, find_model, load_model
from pipeline.tracking.serving import OUTPUT_COLUMNS

CPUS_PER_ACTOR = 4


def predict_folder(
    model_uri: str,
    folder: Path,
    out: Path,
    *,
    budget_bias: float = 0.0,
    files_per_part: int = FILES_PER_PART,
    show_progress: bool = True,
) -> str:
    """Predict every JPEG and PNG file below `folder` into Parquet files in `out`; returns what they say, in a line.

    Parts that are there already are left as they are. Both folders must be the same on every node, and so must the
    registry's address. One driver at a time: a second one waits, and finds the work done.

    Raises:
        ValueError: there is no image, or `out` is of another model, other files or other settings.
        TrackingError: there is no such model.
        ChildProcessError: a part could not be computed.
        OSError: a folder cannot be read or written.
    """
    model, output = find_model(model_uri, budget_bias), OutputFolder(out.absolute())
    with exclusive(out, waiting=lambda: print(f"waiting for another process that is at work on {out}")):
        output.remove_partial()
        parts, digest = output.list_files(folder.absolute(), files_per_part)
        if not parts:
            raise ValueError(f"{folder} holds no JPEG or PNG file")
        num_files = sum(part.num_files for part in parts)
        output.agree(Plan(model.uri, model.uuid, budget_bias, files_per_part, num_files, digest))
        missing = output.missing(parts)
        if len(missing) < len(parts):
            print(f"{len(parts) - len(missing):,} of {len(parts):,} parts are there already")
        if missing:
            with progress_bar("predicting", sum(part.num_files for part in missing), show_progress) as advance:
                for num_done in _predict(missing, model, folder.absolute(), output, budget_bias):
                    advance(num_done)
        return summarize(output, len(parts))


def _predict(
    parts: list[Part], model: FoundModel, folder: Path, output: OutputFolder, budget_bias: float
) -> Iterator[int]:
    """Yield the number of files of every part as it is done, in any order. A part of a lost actor goes to another."""
    with ray_cluster():
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        actors = share_out([node["Resources"] for node in ray.nodes() if node["Alive"]])
        done = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts)).map(
            PartPredictor,
            fn_constructor_args=(model, folder, output.path, budget_bias),
            num_cpus=actors.cpus_each,
            num_gpus=actors.gpus_each,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(actors.count, len(parts))),
        )
        try:
            for row in done.iter_rows():
                yield row["num_files"]
        except RayError as error:
            raise ChildProcessError(
                f"a part could not be computed: {error}\nwhat is done is kept; the same command goes on"
            ) from None


@dataclass(frozen=True)
class Actors:
    """How many of them, and what each gets."""

    count: int
    cpus_each: int
    gpus_each: int


def share_out(nodes: Sequence[Mapping[str, float]]) -> Actors:
    """An actor for each GPU with its share of the CPUs; without GPUs, one for every few CPUs, as the model decodes on
    threads: of a size that fits the smallest node that can have any.

    Args:
        nodes: `CPU` and `GPU` of each.
    """
    with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1 and node.get("CPU", 0) >= 1]
    if with_gpus:
        cpus_each = min(int(node["CPU"] // node["GPU"]) for node in with_gpus)
        return Actors(sum(int(node["GPU"]) for node in with_gpus), max(1, cpus_each), 1)
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    cpus_each = min(CPUS_PER_ACTOR, *cpus)
    return Actors(sum(count // cpus_each for count in cpus), cpus_each, 0)


class PartPredictor:
    """An actor: loads the model once, and writes a part at each call."""

    def __init__(self, model: FoundModel, folder: Path, out: Path, budget_bias: float):
        self.model, self.folder, self.output = load_model(model), folder, OutputFolder(out)
        self.budget_bias = budget_bias

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part = Part(**row)
        names = self.output.files_of(part)
        rows = classify_files(self.model, [self.folder / name for name in names], budget_bias=self.budget_bias)
        named = [answer | {"file": name} for answer, name in zip(rows, names, strict=True)]
        self.output.write_part(part.number, rows_table(named, OUTPUT_COLUMNS))
        return {"num_files": part.num_files}
