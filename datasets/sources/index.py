"""The index of a data set's images: file, offset, size and label of each, found without reading them.

Plain files and members of tar files are both read with one positioned read. Every choice (split, images_per_class,
order) uses a seeded hash of an image's name. So it does not depend on the order in which a file system lists files,
and a new image only moves images at the boundary between chosen and not chosen.
"""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from datasets.files import DataError, shown_name

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html", ".log"}
IGNORED_SUFFIXES = TEXT_SUFFIXES | {".mat", ".npy", ".npz", ".pkl", ".db", ".ini", ".py", ".sh"}


class SourceError(DataError):
    """The source of a data set does not have what the data set needs."""


class ImageRef(NamedTuple):
    """One image: `size` bytes at `offset` of the file `path`; a size of 0 if the entry cannot be an image.

    `name` is its path within the data set as valid text (files.shown_name), unique, with forward slashes; `path` opens
    the file; `attributes` are the values of the index's `attribute_names`.
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
    """A scanned source.

    Attributes:
        state: changes when any image changes.
        read_index: returns the images.
        folders: the folders whose files are read.
        skipped: how many entries of these folders are not read, by kind.
    """

    state: str
    read_index: Callable[[], ImageIndex]
    folders: Sequence[Path] = ()
    skipped: Counter[str] = field(default_factory=Counter)


def read_bytes(ref: ImageRef) -> bytes:
    """Return the bytes of an image; raise OSError if they cannot be read or the file has become shorter."""
    return read_stamped(ref)[0]


def read_stamped(ref: ImageRef) -> tuple[bytes, int]:
    """Return the bytes of an image as `read_bytes` does, and the file's modification time (ns)."""
    try:
        # Opening a named pipe would wait for its writer without O_NONBLOCK, which files ignore.
        descriptor = os.open(ref.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise OSError(why_unreadable(ref.path, error)) from None
    try:
        status = os.fstat(descriptor)
        if kind := special_kind(status.st_mode):
            raise OSError(f"it is a {kind}, not a file")
        data = os.pread(descriptor, ref.size, ref.offset)
    finally:
        os.close(descriptor)
    if len(data) != ref.size:
        raise OSError(f"{len(data)} bytes where {ref.size} were expected: the file changed while it was read")
    return data, status.st_mtime_ns


SPECIAL_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def special_kind(mode: int) -> str:
    """Return what an entry of a file system is by its st_mode, or "" for a file."""
    return "" if stat.S_ISREG(mode) else SPECIAL_KINDS.get(stat.S_IFMT(mode), "special file")


def why_unreadable(path: str, error: OSError) -> str:
    """Return the reason why a path cannot be opened, without the path."""
    try:
        if Path(path).is_symlink():
            return f"it is a link to {shown_name(Path(path).readlink())}, which cannot be opened ({error.strerror})"
        if Path(path).is_socket():
            return "it is a socket, not a file"
    except OSError:
        pass
    return error.strerror or str(error)


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
    """Return the index; raise SourceError if it has only one class, or classes without images in a split.

    Two classes or images with the same name are an error too: names that differ on disk can be the same as text.
    """
    _require_different(index.classes, "classes")
    _require_different([ref.name for refs in index.splits.values() for ref in refs], "images")
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


def _require_different(names: Sequence[str], what: str) -> None:
    if len(set(names)) < len(names):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        raise SourceError(f"several {what} have the same name: {listed(twice)}; rename or remove all but one of each")


def require_one_form(folders: Sequence[tuple[Path, Sequence[str]]]) -> None:
    """Raise SourceError if class names differ only in their Unicode form: composed (Linux) or decomposed (macOS).

    Args:
        folders: each folder with the names of its class folders.
    """
    forms: dict[str, dict[str, Path]] = defaultdict(dict)
    for folder, names in folders:
        for name in names:
            forms[unicodedata.normalize("NFC", name)].setdefault(name, folder)
    problems = [
        " and ".join(f"{name!a} in {folder}" for name, folder in found.items())
        for found in forms.values()
        if len(found) > 1
    ]
    if problems:
        raise SourceError(
            "class folders have the same name in different Unicode forms (composed and decomposed, as Linux and macOS "
            f"write them): {listed(problems)}; rename them to one form"
        )


def state_of(entries: Iterable[tuple[str, os.stat_result]]) -> str:
    """Return the digest of names, sizes and modification times."""
    lines = sorted(f"{name}\0{status.st_size}\0{status.st_mtime_ns}" for name, status in entries)
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def listed(names: Sequence[str], limit: int = 10) -> str:
    """Join names for a message; after `limit` names only the number of the others is given."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def counted(skipped: Counter[str]) -> str:
    """Return the number of skipped entries and their kinds in a line, the most frequent kind first."""
    kinds = [f"{kind} ({count:,})" for kind, count in skipped.most_common()]
    entries = "entry that is not an image" if skipped.total() == 1 else "entries that are not images"
    return f"{skipped.total():,} {entries}: {listed(kinds)}"


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
