"""The output folder of a large prediction: which files are in which part, and what the parts are of.

The files below a folder, in the order of their paths, are cut into parts of equal size, and each part becomes one
Parquet file that is whole or absent. So what is left to do is a matter of looking, whatever died before.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from datasets.files import sync_file, sync_folder, write_whole

FORMAT = 1
SUFFIXES = (".jpg", ".jpeg", ".png")
FILES_PER_PART = 2048
_SEPARATOR = b"\0"  # the one byte that no path holds


@dataclass(frozen=True)
class Plan:
    """What a prediction is of. A resume with another plan would mix two results, so it is refused."""

    model: str
    """its address with the number of the version, which the alias may leave meanwhile"""
    model_uuid: str
    """of its content"""
    budget_bias: float
    files_per_part: int
    num_files: int
    files_sha256: str
    """of the list of files, not of what is in them"""
    format: int = FORMAT

    @property
    def num_parts(self) -> int:
        return -(-self.num_files // self.files_per_part)


@dataclass(frozen=True)
class Part:
    """Files that are predicted together: a range of bytes of the list of files."""

    number: int
    start: int
    end: int
    num_files: int


class OutputFolder:
    """_plan.json, _files.list and part-NNNNNN.parquet for each part."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def plan_file(self) -> Path:
        return self.path / "_plan.json"

    @property
    def list_file(self) -> Path:
        """Paths below the folder of images, each ended by a zero byte."""
        return self.path / "_files.list"

    @property
    def _new_list(self) -> Path:
        return self.path / "._files.list.partial"

    def part_file(self, number: int) -> Path:
        return self.path / f"part-{number:06d}.parquet"

    def missing(self, parts: Iterable[Part]) -> list[Part]:
        """The parts that are still to be computed."""
        present = {path.name for path in self.path.iterdir()}
        return [part for part in parts if self.part_file(part.number).name not in present]

    def files_of(self, part: Part) -> list[str]:
        with self.list_file.open("rb") as file:
            file.seek(part.start)
            content = file.read(part.end - part.start)
        return [os.fsdecode(name) for name in content.split(_SEPARATOR)[:-1]]

    def list_files(self, folder: Path, files_per_part: int) -> tuple[list[Part], str]:
        """List the images below `folder` and cut the list into parts; returns them and the list's SHA-256.

        The list is kept where `agree` finds that it is the one of this folder. It goes from disk to disk: the names in
        one folder are in memory, never all.
        """
        digest, parts = hashlib.sha256(), []
        start, offset, count = 0, 0, 0
        with self._new_list.open("wb") as file:
            for name in walk_images(folder):
                line = os.fsencode(name) + _SEPARATOR
                file.write(line)
                digest.update(line)
                offset, count = offset + len(line), count + 1
                if count == files_per_part:
                    parts.append(Part(len(parts), start, offset, count))
                    start, count = offset, 0
        if count:
            parts.append(Part(len(parts), start, offset, count))
        return parts, digest.hexdigest()

    def agree(self, plan: Plan) -> None:
        """Keep the plan and the list in a new folder; in one that has them, raise ValueError naming what differs."""
        if not self.plan_file.exists():
            if next(self.path.glob("part-*.parquet"), None):
                raise ValueError(f"{self.path} holds part-*.parquet but no _plan.json; give --out another folder")
            self._new_list.replace(self.list_file)
            write_whole(self.plan_file, json.dumps(asdict(plan), indent=1))
            return
        try:
            before = Plan(**json.loads(self.plan_file.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.plan_file} is damaged ({error}); give --out another folder") from None
        changed = [
            f"  - {field.name}: {getattr(before, field.name)} -> {getattr(plan, field.name)}"
            for field in fields(Plan)
            if getattr(before, field.name) != getattr(plan, field.name)
        ]
        if changed:
            listing = "\n".join(changed)
            raise ValueError(
                f"{self.path} holds the results of another prediction:\n{listing}\n"
                "put that back, give --out another folder, or remove this one"
            )
        self._new_list.replace(self.list_file)

    def write_part(self, number: int, table: pa.Table) -> None:
        """Write a part: whole, or not at all. Two processes may write the same one."""
        path = self.part_file(number)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        pq.write_table(table, partial)
        sync_file(partial)
        partial.replace(path)
        sync_folder(self.path)

    def remove_partial(self) -> None:
        """Remove what processes left that died while they wrote."""
        for partial in self.path.glob(".*.partial"):
            partial.unlink(missing_ok=True)


def walk_images(folder: Path, below: str = "") -> Iterator[str]:
    """Paths of the JPEG and PNG files below a folder, relative to it, sorted; links to folders are not followed."""
    with os.scandir(folder / below) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from walk_images(folder, path)
        elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():
            yield path


def rows_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> pa.Table:
    """Rows as an Arrow table whose types are the same in every part, whatever is null.

    Args:
        columns: pandas' names of the types, as serving.OUTPUT_COLUMNS has them.
    """
    types = {"Int64": pa.int64(), "Float64": pa.float64(), "string": pa.string()}
    schema = pa.schema({"file": pa.string()} | {name: types[kind] for name, kind in columns.items()})
    # A name that is not UTF-8 can be on a disk, but not in Parquet.
    readable = [{**row, "file": os.fsencode(row["file"]).decode("utf-8", "backslashreplace")} for row in rows]
    return pa.Table.from_pylist(readable, schema)


def summarize(output: OutputFolder, num_parts: int) -> str:
    """What all parts together say, in a line."""
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
