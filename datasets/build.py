"""Convert the images of an index and write them as betons, in one pass over all splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datasets.beton import TRAIN, Split, beton_path
from datasets.beton_file import Sample, file_sha256, write_beton
from datasets.conversion import Conversion, ConvertedChunk, Outcome, chunks, convert_chunk
from datasets.parallel import map_ordered
from datasets.sources import ImageIndex, ImageRef, SourceError, listed, shuffled


class ImageRecord(NamedTuple):
    """One source image: its `position` in the beton of its split, or None where it was left out."""

    split: str
    position: int | None
    class_name: str
    name: str
    size: int
    content: str

    def to_json(self) -> str:
        return json.dumps(self)


class BadImagesError(ValueError):
    """Images that cannot be used, one a line."""

    def __init__(self, bad: Sequence[tuple[str, str]]):
        self.bad = list(bad)
        lines = "\n".join(f"  {path}: {reason}" for path, reason in self.bad)
        super().__init__(
            f"{len(self.bad)} bad image{'s' if len(self.bad) > 1 else ''}, nothing was written:\n{lines}\n"
            "repair or remove them, or set data.on_bad_image=skip to leave them out"
        )


@dataclass
class Built:
    """What was written: `histogram` int64 (3, 256) of the training images, `bad` (path, reason) of unusable ones."""

    splits: dict[str, Split] = field(default_factory=dict)
    records: list[ImageRecord] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros((3, 256), np.int64))

    @property
    def source_digest(self) -> str:
        """SHA-256 over names, classes, splits and contents of all images, in an order that is theirs alone."""
        lines = sorted(json.dumps([one.split, one.class_name, one.name, one.content]) for one in self.records)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def build_betons(
    index: ImageIndex,
    folder: Path,
    conversion: Conversion,
    *,
    seed: int,
    num_processes: int,
    skip_bad: bool,
    advance: Callable[[int], None],
) -> Built:
    """Write one beton for each split of `index` into `folder`.

    Args:
        seed: of the order in which samples are stored.
        advance: told the number of images that were read since it was called last.

    Raises:
        BadImagesError: images are bad and `skip_bad` is false.
        SourceError: leaving out bad images would empty a class.
    """
    ordered = {split: shuffled(refs, seed) for split, refs in index.splits.items()}
    work = [chunk for refs in ordered.values() for chunk in chunks(refs)]
    built = Built()
    with closing(map_ordered(partial(convert_chunk, conversion), work, num_processes)) as converted:
        for split, refs in ordered.items():
            num_chunks = sum(1 for _ in chunks(refs))
            _build_split(built, index, split, refs, islice(converted, num_chunks), folder, advance)
    if built.bad and not skip_bad:
        raise BadImagesError(built.bad)
    _require_all_classes(built, index)
    return built


def _build_split(
    built: Built,
    index: ImageIndex,
    split: str,
    refs: Sequence[ImageRef],
    converted: Iterator[ConvertedChunk],
    folder: Path,
    advance: Callable[[int], None],
) -> None:
    kept: list[ImageRef] = []

    def samples() -> Iterator[Sample]:
        remaining = iter(refs)
        for chunk in converted:
            if split == TRAIN:
                built.histogram += chunk.histogram
            for outcome, ref in zip(chunk.outcomes, remaining, strict=False):
                usable = not outcome.reason
                position = len(kept) if usable else None
                name = index.classes[ref.label]
                built.records.append(ImageRecord(split, position, name, ref.name, ref.size, outcome.content))
                if usable:
                    kept.append(ref)
                    yield Sample(outcome.jpeg, outcome.width, outcome.height, ref.label)
                else:
                    _note_bad(built, ref, outcome)
            advance(len(chunk.outcomes))

    path = beton_path(folder, split)
    count = write_beton(path, samples(), capacity=len(refs))
    built.splits[split] = Split(
        file=path.name,
        count=count,
        class_counts=np.bincount([ref.label for ref in kept], minlength=len(index.classes)).tolist(),
        size_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        attributes={
            name: [ref.attributes[number] for ref in kept] for number, name in enumerate(index.attribute_names)
        },
    )


def _note_bad(built: Built, ref: ImageRef, outcome: Outcome) -> None:
    inside = not ref.path.endswith(Path(ref.name).name)
    built.bad.append((f"{ref.path} (member {ref.name})" if inside else ref.path, outcome.reason))
    built.skipped.append({"path": ref.name, "reason": outcome.reason})


def _require_all_classes(built: Built, index: ImageIndex) -> None:
    for split, description in built.splits.items():
        empty = [name for name, count in zip(index.classes, description.class_counts, strict=True) if count == 0]
        if empty:
            raise SourceError(
                f"without its bad images, {split} has no images of {listed(empty)}; "
                f"{len(built.bad)} images are bad, the first is {built.bad[0][0]}: {built.bad[0][1]}"
            )
