"""What a preparation has done so far, so that it goes on where it was interrupted.

A journal lies beside the unfinished betons: its first line says from what and how they are made, every other line is
a finished chunk. A line is written after its images are on disk, so that what the journal says is true even after a
power failure; what the betons hold beyond it is done again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

from datasets.beton_file import BetonWriter
from datasets.conversion import Outcome
from datasets.files import sync_file, sync_folder
from datasets.statistics import PixelSums

JOURNAL = "journal.jsonl"
SECONDS_BETWEEN_WRITES = 5.0


class FinishedChunk(NamedTuple):
    """What became of a chunk's images, and the pixels of those that are counted."""

    outcomes: list[Outcome]
    pixels: PixelSums


class Journal:
    """The finished chunks of a preparation in their order."""

    def __init__(self, folder: Path, made_from: Mapping[str, Any]):
        """Take up what `folder` holds where it was made from the same, otherwise begin anew.

        Args:
            made_from: everything that the betons depend on, for JSON.
        """
        self._path, self._first_line = folder / JOURNAL, json.dumps(made_from, sort_keys=True)
        self.finished, length = _read(self._path, self._first_line)
        self._file: BinaryIO = self._path.open("r+b" if length else "wb")
        if length:
            self._file.truncate(length)
            self._file.seek(length)
        else:
            self._write([self._first_line])
            sync_folder(folder)
        self._waiting: list[FinishedChunk] = []
        self._betons: set[Path] = set()
        self._written_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, chunk: FinishedChunk, writer: BetonWriter) -> None:
        """Note a chunk that was given to `writer`."""
        self._waiting.append(chunk)
        self._betons.add(writer.path)
        if time.monotonic() >= self._written_at + SECONDS_BETWEEN_WRITES:
            writer.flush()
            for path in self._betons:
                sync_file(path)
            self._write([json.dumps([chunk.outcomes, asdict(chunk.pixels)]) for chunk in self._waiting])
            self._waiting, self._betons, self._written_at = [], set(), time.monotonic()

    def _write(self, lines: list[str]) -> None:
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def _read(path: Path, first_line: str) -> tuple[list[FinishedChunk], int]:
    """The chunks of a journal that begins with `first_line`, and its length in bytes up to where it is whole."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return [], 0
    if not lines or lines[0] != f"{first_line}\n".encode():
        return [], 0
    finished, length = [], len(lines[0])
    for line in lines[1:]:
        try:
            finished.append(_parse(line))
        except (ValueError, TypeError):  # cut short when the computer went down
            break
        length += len(line)
    return finished, length


def _parse(line: bytes) -> FinishedChunk:
    if not line.endswith(b"\n"):
        raise ValueError("the line has no end")
    outcomes, sums = json.loads(line)
    pixels = PixelSums(sums["count"], tuple(sums["values"]), tuple(sums["squares"]))
    return FinishedChunk([Outcome(*outcome) for outcome in outcomes], pixels)
