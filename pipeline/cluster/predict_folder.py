"""Predict a large folder on the cluster with Ray Data, resumably, into one Parquet file per part."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.exceptions import RayError

from datasets.files import exclusive, shown_name, sync_file, sync_folder, value_differences, write_whole
from datasets.parallel import progress_bar
from datasets.sources.folders import SUFFIXES, walk_images
from datasets.sources.index import counted
from pipeline.cluster.connection import ray_cluster
from pipeline.config.load import refuse_changes
from pipeline.serving.package import classify_files
from pipeline.serving.pyfunc import OUTPUT_COLUMNS
from pipeline.tracking.registry import FoundModel, find_model, load_registered

FORMAT = 1
FILES_PER_PART = 2048
_SEPARATOR = b"\0"  # the only byte that no path contains


@dataclass(frozen=True)
class Plan:
    """The inputs of a prediction. Resuming with another plan would mix two results, so it is refused."""

    model: str
    """The model's address with its version number, because the alias may move in the meantime."""
    model_uuid: str
    """The id of the model's content."""
    budget_bias: float
    files_per_part: int
    num_files: int
    files_sha256: str
    """The hash of the list of files, not of their contents."""
    format: int = FORMAT


@dataclass(frozen=True)
class Part:
    """Files that are predicted together, as a byte range of the list of files."""

    number: int
    start: int
    end: int
    num_files: int


class OutputFolder:
    """The folder of results: _plan.json, _files.list, and part-NNNNNN.parquet for each part."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def plan_file(self) -> Path:
        """The file with the plan."""
        return self.path / "_plan.json"

    @property
    def list_file(self) -> Path:
        """The list of paths below the folder of images, each terminated by a zero byte."""
        return self.path / "_files.list"

    @property
    def _new_list(self) -> Path:
        return self.path / "._files.list.partial"

    def part_file(self, number: int) -> Path:
        """Return the Parquet file of a part."""
        return self.path / f"part-{number:06d}.parquet"

    def missing(self, parts: Iterable[Part]) -> list[Part]:
        """Return the parts that still have to be computed."""
        present = {path.name for path in self.path.iterdir()}
        return [part for part in parts if self.part_file(part.number).name not in present]

    def files_of(self, part: Part) -> list[str]:
        """Return the paths of a part's files, relative to the folder of images."""
        with self.list_file.open("rb") as file:
            file.seek(part.start)
            content = file.read(part.end - part.start)
        return [os.fsdecode(name) for name in content.split(_SEPARATOR)[:-1]]

    def list_files(self, folder: Path, files_per_part: int) -> tuple[list[Part], str]:
        """List the images below `folder` and split the list into parts. Return the parts and the list's SHA-256.

        `start_or_resume` keeps the list if it belongs to this folder of results. The list is streamed to disk, so
        memory holds only the names of one folder at a time.
        """
        digest, parts = hashlib.sha256(), []
        start, offset, count = 0, 0, 0
        with self._new_list.open("wb") as file:
            walk = walk_images(folder)
            for name in walk.files:
                line = os.fsencode(name) + _SEPARATOR
                file.write(line)
                digest.update(line)
                offset, count = offset + len(line), count + 1
                if count == files_per_part:
                    parts.append(Part(len(parts), start, offset, count))
                    start, count = offset, 0
        if count:
            parts.append(Part(len(parts), start, offset, count))
        if walk.skipped:
            print(f"left out below {shown_name(folder)}: {counted(walk.skipped)}")
        return parts, digest.hexdigest()

    def start_or_resume(self, plan: Plan) -> None:
        """Store the plan and the list in a new folder. In an existing one, raise a ValueError if the plan differs."""
        if not self.plan_file.exists():
            if next(self.path.glob("part-*.parquet"), None):
                raise ValueError(f"{self.path} has part-*.parquet but no _plan.json. Choose another folder for --out.")
            self._new_list.replace(self.list_file)
            write_whole(self.plan_file, json.dumps(asdict(plan), indent=1))
            return
        try:
            before = Plan(**json.loads(self.plan_file.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.plan_file} is damaged ({error}). Choose another folder for --out.") from None
        refuse_changes(
            value_differences(asdict(before), asdict(plan)),
            f"{self.path} has the results of another prediction",
            "Restore these values, choose another folder for --out, or remove this one.",
        )
        self._new_list.replace(self.list_file)

    def write_part(self, number: int, table: pa.Table) -> None:
        """Write a part atomically. Two processes may write the same part."""
        path = self.part_file(number)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        pq.write_table(table, partial)
        sync_file(partial)
        partial.replace(path)
        sync_folder(self.path)

    def remove_partial(self) -> None:
        """Remove incomplete files of processes that died while writing."""
        for partial in self.path.glob(".*.partial"):
            partial.unlink(missing_ok=True)


def rows_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> pa.Table:
    """Return rows as an Arrow table with the same types in every part, even if all values of a column are null.

    Args:
        columns: maps each column to pandas' name of its type, as pyfunc.OUTPUT_COLUMNS does.
    """
    types = {"Int64": pa.int64(), "Float64": pa.float64(), "string": pa.string()}
    schema = pa.schema({"file": pa.string()} | {name: types[kind] for name, kind in columns.items()})
    # A file name on disk may not be UTF-8, but text in Parquet must be.
    readable = [{**row, "file": shown_name(row["file"])} for row in rows]
    return pa.Table.from_pylist(readable, schema)


def summarize(output: OutputFolder, num_parts: int) -> str:
    """Return a one-line summary of all parts."""
    resolutions: Counter[int] = Counter()
    num_rows, num_errors, gflops = 0, 0, 0.0
    for number in range(num_parts):
        columns = pq.read_table(output.part_file(number), columns=["resolution", "gflops", "error"]).to_pydict()
        num_rows += len(columns["error"])
        num_errors += sum(error is not None for error in columns["error"])
        resolutions.update(side for side in columns["resolution"] if side is not None)
        gflops += sum(cost for cost in columns["gflops"] if cost is not None)
    answered = max(1, num_rows - num_errors)
    shares = ", ".join(
        f"{count / answered:.1%} at {side} px" for side, count in sorted(resolutions.items(), reverse=True)
    )
    return (
        f"{num_rows:,} files, {num_errors:,} of them with an error; {gflops / answered:.3g} GFLOPs an image"
        f"{f' ({shares})' if shares else ''}"
    )


CPUS_PER_ACTOR = 4


def predict_folder(
    model_uri: str,
    folder: Path,
    out: Path,
    *,
    budget_bias: float = 0.0,
    files_per_part: int | None = None,
    show_progress: bool = True,
) -> str:
    """Predict every image below `folder` into Parquet files in `out`. Return a one-line summary.

    Existing parts are kept. Every node must see both folders and the registry under the same address. Only one driver
    works at a time: a second one waits and then finds the work done.

    Raises:
        ValueError: there is no image, or `out` belongs to another model, other files or other settings.
        TrackingError: there is no such model.
        ChildProcessError: a part could not be computed.
        OSError: a folder cannot be read or written.
    """
    files_per_part = files_per_part or FILES_PER_PART
    model, output = find_model(model_uri, budget_bias), OutputFolder(out.absolute())
    with exclusive(out, waiting=lambda: print(f"waiting for another process that writes to {out}")):
        output.remove_partial()
        parts, digest = output.list_files(folder.absolute(), files_per_part)
        if not parts:
            raise ValueError(f"{folder} has no {', '.join(SUFFIXES)} file. Give the folder of the images.")
        num_files = sum(part.num_files for part in parts)
        output.start_or_resume(Plan(model.uri, model.uuid, budget_bias, files_per_part, num_files, digest))
        missing = output.missing(parts)
        if len(missing) < len(parts):
            print(f"{len(parts) - len(missing):,} of {len(parts):,} parts exist already")
        if missing:
            with progress_bar("predicting", sum(part.num_files for part in missing), show_progress) as advance:
                for num_done in _predict(missing, model, folder.absolute(), output, budget_bias):
                    advance(num_done)
        return summarize(output, len(parts))


def _predict(
    parts: list[Part], model: FoundModel, folder: Path, output: OutputFolder, budget_bias: float
) -> Iterator[int]:
    """Yield the number of files of each finished part, in any order. Another actor takes over a lost actor's part."""
    with ray_cluster():
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        actors = divide_resources([node["Resources"] for node in ray.nodes() if node["Alive"]])
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
                f"a part could not be computed: {error}\n"
                "Finished parts are kept. Fix the cause and rerun the same command; it resumes."
            ) from None


@dataclass(frozen=True)
class Actors:
    """The number of actors, and the resources of each."""

    count: int
    cpus_each: int
    gpus_each: int


def divide_resources(nodes: Sequence[Mapping[str, float]]) -> Actors:
    """Return one actor per GPU with its share of the CPUs or, without GPUs, one per CPUS_PER_ACTOR CPUs.

    The model decodes on threads, so an actor uses several CPUs. The smallest usable node decides how many.

    Args:
        nodes: the `CPU` and `GPU` resources of each node.
    """
    with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1 and node.get("CPU", 0) >= 1]
    if with_gpus:
        cpus_each = min(int(node["CPU"] // node["GPU"]) for node in with_gpus)
        return Actors(sum(int(node["GPU"]) for node in with_gpus), max(1, cpus_each), 1)
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    cpus_each = min(CPUS_PER_ACTOR, *cpus)
    return Actors(sum(count // cpus_each for count in cpus), cpus_each, 0)


class PartPredictor:
    """An actor that loads the model once and writes a part per call."""

    def __init__(self, model: FoundModel, folder: Path, out: Path, budget_bias: float):
        self.model, self.folder, self.output = load_registered(model), folder, OutputFolder(out)
        self.budget_bias = budget_bias

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part = Part(**row)
        names = self.output.files_of(part)
        rows = classify_files(self.model, [self.folder / name for name in names], budget_bias=self.budget_bias)
        named = [answer | {"file": name} for answer, name in zip(rows, names, strict=True)]
        self.output.write_part(part.number, rows_table(named, OUTPUT_COLUMNS))
        return {"num_files": part.num_files}
