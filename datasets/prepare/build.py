"""Convert the images of an index and write them as betons, in one resumable pass over all splits."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np

from datasets.beton import TRAIN, BetonWriter, Sample, Split, beton_path, file_sha256
from datasets.files import DataError, shown_name, sync_file, sync_folder
from datasets.parallel import OrderedMap
from datasets.prepare.convert import (
    IMAGES_IN_STATISTICS,
    Chunk,
    Conversion,
    ConvertedChunk,
    Outcome,
    PixelSums,
    content_digest,
    convert_chunk,
    counted_chunks,
)
from datasets.sources.index import (
    IMAGES_PER_CHUNK,
    ROWS_PER_CHUNK,
    ImageIndex,
    ImageRef,
    SourceError,
    group_number,
    listed,
    read_bytes,
    read_images,
    stored_chunks,
)

JOURNAL = "journal.jsonl"
SECONDS_BETWEEN_WRITES = 5.0


class FinishedChunk(NamedTuple):
    """The outcomes of a chunk's images, and the pixel sums of its counted images."""

    outcomes: list[Outcome]
    pixels: PixelSums


class Journal:
    """The finished chunks of a preparation, in order, on disk.

    A journal in `folder` that was made from the same inputs is resumed. Any other journal is started over.

    Args:
        made_from: everything that the betons depend on, as JSON values.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any]):
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
        """Record a chunk that was given to `writer`."""
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
    """Return the chunks of a journal that begins with `first_line`, and the length in bytes of its complete lines."""
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
        except (ValueError, TypeError):  # a crash of the machine cut the line short
            break
        length += len(line)
    return finished, length


def _parse(line: bytes) -> FinishedChunk:
    if not line.endswith(b"\n"):
        raise ValueError("the line is incomplete")
    outcomes, sums = json.loads(line)
    pixels = PixelSums(sums["count"], tuple(sums["values"]), tuple(sums["squares"]))
    return FinishedChunk([Outcome(*outcome) for outcome in outcomes], pixels)


class ImageRecord(NamedTuple):
    """One source image: its `position` in the beton of its split, or None if it was left out."""

    split: str
    position: int | None
    class_name: str
    name: str
    size: int
    content: str

    def to_json(self) -> str:
        """Return the record as one line of JSON."""
        return json.dumps(self)


class BadImagesError(DataError):
    """Some images cannot be used. The message lists them, one per line."""

    def __init__(self, bad: Sequence[tuple[str, str]]):
        self.bad = list(bad)
        lines = "\n".join(f"  {shown_name(path)}: {reason}" for path, reason in self.bad)
        super().__init__(
            f"{len(self.bad)} bad image{'s' if len(self.bad) > 1 else ''}; nothing was written:\n{lines}\n"
            "repair or remove them, or set data.on_bad_image=skip to leave them out"
        )


class LeftoversError(OSError):
    """The files of an interrupted preparation do not match its journal."""


@dataclass
class Built:
    """The result of `build_betons`.

    Attributes:
        records: all source images in the order of their betons.
        bad: (path, reason) of unusable images; `skipped` is the same list for the manifest.
        pixels: sums over the counted training images.
        num_adopted: images that an interrupted call had already converted.
    """

    splits: dict[str, Split] = field(default_factory=dict)
    records: list[ImageRecord] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    pixels: PixelSums = field(default_factory=PixelSums)
    num_adopted: int = 0

    def note_bad(self, place: str, name: str, reason: str) -> None:
        """Add an image that cannot be used."""
        self.bad.append((place, reason))
        self.skipped.append({"path": name, "reason": reason})

    @property
    def source_digest(self) -> str:
        """The SHA-256 over names, classes, splits and contents of all images, sorted."""
        lines = sorted(json.dumps([one.split, one.class_name, one.name, one.content]) for one in self.records)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def build_betons(
    index: ImageIndex,
    folder: Path,
    conversion: Conversion,
    *,
    seed: int,
    made_from: Mapping[str, Any],
    map_chunks: OrderedMap,
    skip_bad: bool,
    advance: Callable[[int], None],
) -> Built:
    """Write one beton for each split of `index` into `folder`, resuming what an unfinished call left there.

    Args:
        seed: seed of the order in which samples are stored.
        made_from: everything that the result depends on; files left over from other inputs are discarded.
        map_chunks: runs the conversion, in processes or on a cluster.
        advance: called with the number of images that were read since its last call.

    Raises:
        BadImagesError: images are bad and `skip_bad` is false.
        SourceError: leaving out bad images would empty a class, or a file changed while it was prepared.
        LeftoversError: the files in `folder` cannot be resumed; the caller removes them and starts over.
        OSError: an image can be read here, but not by the process that converts it.
    """
    work = {
        split: counted_chunks(stored_chunks(refs, seed), count_pixels=split == TRAIN)
        for split, refs in index.splits.items()
    }
    built, kept, hashes = Built(), dict[str, list[ImageRef]](), dict[str, Future[str]]()
    for place, reason in index.unusable:
        built.note_bad(place, place, reason)
    if built.bad and not skip_bad:
        raise BadImagesError(built.bad)
    folder.mkdir(exist_ok=True)
    parts = {"chunk": IMAGES_PER_CHUNK, "rows": ROWS_PER_CHUNK, "counted": IMAGES_IN_STATISTICS}
    with Journal(folder, {**made_from, **parts}) as journal, ThreadPoolExecutor(1) as background:
        built.num_adopted = sum(len(outcomes) for outcomes, _ in journal.finished)
        finished = iter(journal.finished)
        left = [chunk for chunks in work.values() for chunk in chunks][len(journal.finished) :]
        with closing(map_chunks(partial(convert_chunk, conversion), left)) as converted:
            for split, chunks in work.items():
                path = beton_path(folder, split)
                resume = bool(journal.finished) and path.exists()
                with BetonWriter(path, len(index.splits[split]), resume=resume) as writer:
                    done = _written(writer, chunks, finished, converted, journal)
                    kept[split] = _noted(built, split, index, chunks, done, advance)
                    writer.finish()
                # A finished beton is read again for its digest, while processes convert the next one.
                hashes[split] = background.submit(_durable_sha256, path)
        for split, refs in kept.items():
            path = beton_path(folder, split)
            built.splits[split] = _description(path, index, refs, hashes[split].result())
    if built.bad and not skip_bad:
        raise BadImagesError(built.bad)
    _require_all_classes(built, index)
    return built


def _written(
    writer: BetonWriter,
    chunks: Sequence[Chunk],
    finished: Iterator[FinishedChunk],
    converted: Iterator[ConvertedChunk],
    journal: Journal,
) -> Iterator[FinishedChunk]:
    """Write chunks one by one, adopting those that are already `finished`, and yield the result of each."""
    for chunk in chunks:
        if (before := next(finished, None)) is not None:
            _adopt(writer, chunk, before.outcomes)
            yield before
        else:
            one = next(converted)
            _append(writer, chunk, one)
            result = FinishedChunk(one.outcomes, one.pixels)
            journal.add(result, writer)
            yield result


def _adopt(writer: BetonWriter, chunk: Chunk, outcomes: Sequence[Outcome]) -> None:
    for ref, outcome in zip(chunk.refs, outcomes, strict=True):
        if outcome.reason:
            continue
        jpeg = writer.adopt(outcome.width, outcome.height, ref.label, outcome.size)
        if content_digest(jpeg) != outcome.stored:
            raise LeftoversError(f"{writer.path} does not match its journal at {ref.name}")


def _append(writer: BetonWriter, chunk: Chunk, converted: ConvertedChunk) -> None:
    kept = {
        position: ref
        for position, (ref, outcome) in enumerate(zip(chunk.refs, converted.outcomes, strict=True))
        if not outcome.reason and position not in converted.encoded
    }
    # Source files that were found valid are read again.
    unchanged = read_images(list(kept.values()))
    for position, (ref, outcome) in enumerate(zip(chunk.refs, converted.outcomes, strict=True)):
        if outcome.reason:
            _refuse_unreadable_there(ref, outcome, converted.node)
            continue
        jpeg = converted.encoded.get(position)
        if jpeg is None:
            read = next(unchanged)
            if isinstance(read, OSError) or read.modified != converted.modified[position]:
                raise SourceError(
                    f"{shown_name(ref.path)} changed while it was prepared; rerun when nothing writes to the source"
                )
            jpeg = read.data
        writer.append(Sample(jpeg, outcome.width, outcome.height, ref.label))


def _refuse_unreadable_there(ref: ImageRef, outcome: Outcome, node: str) -> None:
    """Raise OSError if only the converting machine cannot read the file.

    The image is not bad then; the cluster has a problem.
    """
    if outcome.content:
        return
    try:
        read_bytes(ref)
    except OSError:
        return
    raise OSError(
        f"{node} cannot read {shown_name(ref.path)} ({outcome.reason}), but {os.uname().nodename} can; put the source "
        "where every machine of the cluster can read it under the same path"
    )


def _noted(
    built: Built,
    split: str,
    index: ImageIndex,
    chunks: Sequence[Chunk],
    done: Iterator[FinishedChunk],
    advance: Callable[[int], None],
) -> list[ImageRef]:
    """Run `done` to its end, keep its records, and return the images of the beton in order."""
    kept: list[ImageRef] = []
    for chunk, (outcomes, pixels) in zip(chunks, done, strict=True):
        built.pixels += pixels
        for ref, outcome in zip(chunk.refs, outcomes, strict=True):
            position = None if outcome.reason else len(kept)
            name = index.classes[ref.label]
            built.records.append(ImageRecord(split, position, name, ref.name, ref.size, outcome.content))
            if position is None:
                built.note_bad(ref.place, ref.name, outcome.reason)
            else:
                kept.append(ref)
        advance(len(outcomes))
    return kept


def _description(path: Path, index: ImageIndex, refs: Sequence[ImageRef], sha256: str) -> Split:
    return Split(
        file=path.name,
        count=len(refs),
        class_counts=np.bincount([ref.label for ref in refs], minlength=len(index.classes)).tolist(),
        size_bytes=path.stat().st_size,
        sha256=sha256,
        attributes={
            name: [ref.attributes[number] for ref in refs] for number, name in enumerate(index.attribute_names)
        },
        groups=[group_number(ref.group) for ref in refs] if any(ref.group for ref in refs) else [],
    )


def _durable_sha256(path: Path) -> str:
    sync_file(path)
    return file_sha256(path)


def _require_all_classes(built: Built, index: ImageIndex) -> None:
    for split, description in built.splits.items():
        empty = [name for name, count in zip(index.classes, description.class_counts, strict=True) if count == 0]
        if empty:
            raise SourceError(
                f"without its bad images ({len(built.bad)}), {split} has no images of {listed(empty)}; "
                f"the first bad image is {built.bad[0][0]}: {built.bad[0][1]}"
            )
