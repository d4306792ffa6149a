"""The index of a data set's images: file, offset, size and label of each, found without reading them.

Plain files and members of tar files are both read with one positioned read. Every choice (split, images_per_class,
order) uses a seeded hash of an image's name. So it does not depend on the order in which a file system lists files,
and a new image only moves images at the boundary between chosen and not chosen.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html", ".log"}
IGNORED_SUFFIXES = TEXT_SUFFIXES | {".mat", ".npy", ".npz", ".pkl", ".db", ".ini", ".py", ".sh"}


class SourceError(ValueError):
    """The source of a data set does not have what the data set needs."""


class ImageRef(NamedTuple):
    """One image: `size` bytes at `offset` of the file `path`.

    `name` is its path within the data set, unique, with forward slashes; `attributes` are the values of the index's
    `attribute_names`.
    """

    name: str
    label: int
    path: str
    offset: int
    size: int
    attributes: tuple[float, ...] = ()


@dataclass(frozen=True)
class ImageIndex:
    """The images of a data set by split, with class names by label."""

    classes: list[str]
    splits: dict[str, list[ImageRef]]
    attribute_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A scanned source: `state` changes when any image changes; `read_index` returns the images."""

    state: str
    read_index: Callable[[], ImageIndex]


def read_bytes(ref: ImageRef) -> bytes:
    """Return the bytes of an image; raise OSError if they cannot be read or the file has become shorter."""
    return read_stamped(ref)[0]


def read_stamped(ref: ImageRef) -> tuple[bytes, int]:
    """Return the bytes of an image as `read_bytes` does, and the file's modification time (ns)."""
    descriptor = os.open(ref.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(descriptor, ref.size, ref.offset)
        modified = os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)
    if len(data) != ref.size:
        raise OSError(f"{len(data)} bytes where {ref.size} were expected: the file changed while it was read")
    return data, modified


def seeded_hash(seed: int, name: str) -> bytes:
    """Return the hash by which names are ranked: uniform, with a different order for every seed."""
    return hashlib.blake2b(f"{seed}:{name}".encode(errors="surrogateescape"), digest_size=16).digest()


def choose(refs: Iterable[ImageRef], per_class: int | None, seed: int) -> list[ImageRef]:
    """Choose at most `per_class` images of each class by the seeded hash of their names; None keeps all."""
    if per_class is None:
        return list(refs)
    return [ref for group in _grouped(refs, lambda ref: ref.label) for ref in _ranked(group, seed)[:per_class]]


def split_off(
    refs: Iterable[ImageRef],
    fraction: float,
    seed: int,
    stratum: Callable[[ImageRef], object] = lambda ref: ref.label,
) -> tuple[list[ImageRef], list[ImageRef]]:
    """Split images into (train, validation): `fraction` of every stratum for validation, at least one for each.

    Raises:
        SourceError: a stratum has only one image.
    """
    train, validation = [], []
    for group in _grouped(refs, stratum):
        if len(group) < 2:
            raise SourceError(f"{group[0].name} is alone in its class: at least 2 images are needed to split it")
        ranked = _ranked(group, seed)
        count = min(max(round(len(group) * fraction), 1), len(group) - 1)
        validation += ranked[:count]
        train += ranked[count:]
    return train, validation


def shuffled(refs: Iterable[ImageRef], seed: int) -> list[ImageRef]:
    """Return images in storage order: classes are mixed, so any part of a beton is a fair sample."""
    return _ranked(refs, seed)


def checked(index: ImageIndex) -> ImageIndex:
    """Return the index; raise SourceError if it has only one class, or classes without images in a split."""
    if len(index.classes) < 2:
        raise SourceError(f"there is only one class ({', '.join(index.classes)}); at least 2 are needed")
    problems = []
    for split, refs in index.splits.items():
        present = {ref.label for ref in refs}
        missing = [name for label, name in enumerate(index.classes) if label not in present]
        if missing:
            count = f"{len(missing)} of {len(index.classes)} classes"
            problems.append(f"{count} have no {split} images: {listed(missing, limit=100)}")
    if problems:
        raise SourceError("\n".join(problems))
    return index


def state_of(entries: Iterable[tuple[str, os.stat_result]]) -> str:
    """Return the digest of names, sizes and modification times."""
    lines = sorted(f"{name}\0{status.st_size}\0{status.st_mtime_ns}" for name, status in entries)
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def listed(names: Sequence[str], limit: int = 10) -> str:
    """Join names for a message; after `limit` names only the number of the others is given."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def is_ignored(name: str) -> bool:
    """Whether a file is clearly not an image by its name: hidden, or of a type that accompanies images."""
    return name.startswith(".") or name.lower() == "thumbs.db" or os.path.splitext(name)[1].lower() in IGNORED_SUFFIXES  # noqa: PTH122  a tenth of Path's time


def _ranked(refs: Iterable[ImageRef], seed: int) -> list[ImageRef]:
    return sorted(refs, key=lambda ref: (seeded_hash(seed, ref.name), ref.name))


def _grouped(refs: Iterable[ImageRef], key: Callable[[ImageRef], object]) -> list[list[ImageRef]]:
    groups: dict[object, list[ImageRef]] = defaultdict(list)
    for ref in refs:
        groups[key(ref)].append(ref)
    return [groups[name] for name in sorted(groups, key=repr)]


Channels = tuple[float, float, float]
