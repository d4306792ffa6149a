"""The index of a data set's images: file, offset, size and label of each, found without reading them.

A plain file or a member of a tar file is read with one positioned read. Rows of a Parquet file are read together with
the other rows of their row group. Every choice (split, images_per_class, order) uses a seeded hash of an image's name.
So a choice does not depend on the order in which a file system lists files, and adding an image changes the choice for
few others.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from datasets.files import DataError, shown_name

if TYPE_CHECKING:
    from pyarrow import Schema

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html", ".log"}
IGNORED_SUFFIXES = TEXT_SUFFIXES | {".mat", ".npy", ".npz", ".pkl", ".db", ".ini", ".py", ".sh"}


class SourceError(DataError):
    """The source of a data set does not have what the data set needs."""


class ImageRef(NamedTuple):
    """One image: `size` bytes at `offset` of the file `path`. A size of 0 means that the entry cannot be an image.

    `name` is the image's path within the data set as valid text (files.shown_name), unique, with forward slashes.
    `path` opens the file. `attributes` are the values of the index's `attribute_names`. `group` names the images that
    must stay together in a split, such as the frames of a scene. With a `row_group`, the image is row `offset` of a
    Parquet file, and `size` is the mean size in its row group.
    """

    name: str
    label: int
    path: str
    offset: int
    size: int
    attributes: tuple[float, ...] = ()
    group: str = ""
    row_group: int | None = None

    @property
    def place(self) -> str:
        """The place of the image for messages: its file and, in a file of many images, its row or member."""
        if self.row_group is not None:
            return f"{self.path} (row {self.offset})"
        return f"{self.path} (member {self.name})" if self.offset else self.path


@dataclass(frozen=True)
class ImageIndex:
    """The images of a data set by split, with class names by label. `unusable` has (place, reason) of other entries."""

    classes: list[str]
    splits: dict[str, list[ImageRef]]
    attribute_names: tuple[str, ...] = ()
    unusable: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Source:
    """A scanned source.

    Attributes:
        state: digest that changes when any image changes.
        read_index: function that returns the images.
        folders: folders whose files are read.
        skipped: number of entries in these folders that are not read, by kind.
    """

    state: str
    read_index: Callable[[], ImageIndex]
    folders: Sequence[Path] = ()
    skipped: Counter[str] = field(default_factory=Counter)


class ReadImage(NamedTuple):
    """The bytes of an image, and the modification time of its file (ns)."""

    data: bytes
    modified: int


def read_bytes(ref: ImageRef) -> bytes:
    """Return the bytes of an image. Raise OSError if they cannot be read or the file has become shorter."""
    (read,) = read_images([ref])
    if isinstance(read, OSError):
        raise read
    return read.data


def read_images(refs: Sequence[ImageRef]) -> Iterator[ReadImage | OSError]:
    """Read images and yield each one, or the error if it cannot be read, in order. Each row group is read once."""
    rows = _rows_of([ref for ref in refs if ref.row_group is not None])
    for ref in refs:
        try:
            read = _read_part(ref) if ref.row_group is None else rows.pop((ref.path, ref.offset))
        except OSError as error:
            read = error
        yield read


def _rows_of(refs: Sequence[ImageRef]) -> dict[tuple[str, int], ReadImage | OSError]:
    """Read rows of Parquet files, by file and row."""
    found: dict[tuple[str, int], ReadImage | OSError] = {}
    for group in _grouped(refs, lambda ref: (ref.path, ref.row_group)):
        path, row_group = group[0].path, group[0].row_group
        assert row_group is not None
        try:
            images, modified = read_rows(path, row_group, [ref.offset for ref in group])
        except OSError as error:
            found |= {(path, ref.offset): error for ref in group}
            continue
        for ref, data in zip(group, images, strict=True):
            empty = OSError("the row has no image; it may have the path of a file instead of its bytes")
            found[path, ref.offset] = empty if data is None else ReadImage(data, modified)
    return found


ROWS_AT_A_TIME, BUFFER_BYTES = 8, 1 << 20


def read_rows(path: str, row_group: int, rows: Sequence[int]) -> tuple[list[bytes | None], int]:
    """Return the images in `rows` of a Parquet file, all of one row group, and the file's modification time (ns).

    An image is None if its row has none. The row group is decoded a few rows at a time, in memory that stays in the
    processor's cache, and only the wanted rows are kept.

    Raises:
        OSError: the file, or this row group, cannot be read.
    """
    import pyarrow as pa
    from pyarrow import parquet

    found: dict[int, bytes | None] = {}
    wanted = set(rows)
    try:
        with parquet.ParquetFile(path, buffer_size=BUFFER_BYTES) as file:
            modified = Path(path).stat().st_mtime_ns
            row = sum(file.metadata.row_group(before).num_rows for before in range(row_group))
            columns = [image_column(file.schema_arrow)]
            for batch in file.iter_batches(ROWS_AT_A_TIME, row_groups=[row_group], columns=columns, use_threads=False):
                column = batch.column(0)
                images = column.flatten()[0] if pa.types.is_struct(column.type) else column
                found |= {row + n: images[n].as_py() for n in range(len(images)) if row + n in wanted}
                row += len(images)
            return [found[row] for row in rows], modified
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(os.strerror(error.errno)) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(f"row group {row_group} of {Path(path).name} cannot be read: {reason}") from None


def image_column(schema: Schema) -> str:
    """Return the column that has the bytes of images, as Parquet addresses it: `image.bytes`, or `image`.

    The column has Hugging Face's structs of bytes and path, or plain bytes.

    Raises:
        ValueError: there is no such column, or there are several and none of them is called image.
    """
    from pyarrow import types

    found = []
    for column in schema:
        kind, name = column.type, column.name
        if types.is_struct(kind) and (index := kind.get_field_index("bytes")) >= 0:
            kind, name = kind.field(index).type, f"{column.name}.bytes"
        if types.is_binary(kind) or types.is_large_binary(kind):
            found.append(name)
    named = [name for name in found if name in ("image", "image.bytes")]
    if len(found) > 1 and not named:
        raise ValueError(f"it has several columns of images, {' and '.join(found)}; call one of them image")
    if not found:
        raise ValueError(
            f"it has no column of images; its columns are {', '.join(schema.names)}; a column has the bytes of image "
            "files, or structs of bytes and path"
        )
    return (named or found)[0]


MAX_IMAGE_BYTES = 1 << 30


def _read_part(ref: ImageRef) -> ReadImage:
    if ref.size > MAX_IMAGE_BYTES:  # MAX_PIXELS pixels with 4 channels of 16 bits need less
        raise OSError(f"it has {ref.size:,} bytes; an image may have at most {MAX_IMAGE_BYTES:,}")
    try:
        # Without O_NONBLOCK, which files ignore, opening a named pipe would wait for its writer.
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
    return ReadImage(data, status.st_mtime_ns)


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
    """Split images into (train, validation): `fraction` of every stratum is for validation, at least one image.

    Images with a `group` stay together, so strata get approximately this fraction.

    Raises:
        SourceError: a stratum has only one image, or only one group.
    """
    refs = list(refs)
    if any(ref.group for ref in refs):
        return _split_groups(refs, fraction, seed, stratum)
    train, validation = [], []
    for group in _grouped(refs, stratum):
        if len(group) < 2:
            raise SourceError(
                f"{group[0].name} is the only image of its class or stratum, which therefore cannot be split; add a "
                "second image, or give validation images"
            )
        ranked = _ranked(group, seed)
        count = min(max(round(len(group) * fraction), 1), len(group) - 1)
        validation += ranked[:count]
        train += ranked[count:]
    return train, validation


def _split_groups(
    refs: Sequence[ImageRef], fraction: float, seed: int, stratum: Callable[[ImageRef], object]
) -> tuple[list[ImageRef], list[ImageRef]]:
    """Hold out whole groups: first those that bring the strata closer to `fraction`, then one for each stratum left.

    A group stays in training if it contains all remaining training images of a stratum.
    """
    groups = _grouped(refs, lambda ref: ref.group)
    groups.sort(key=lambda group: seeded_hash(seed, group[0].group))
    counts = [Counter(map(stratum, group)) for group in groups]
    left = Counter(map(stratum, refs))
    wanted = {one: max(round(count * fraction), 1) for one, count in left.items()}
    held: set[int] = set()

    def hold(number: int) -> None:
        held.add(number)
        left.subtract(counts[number])
        for one, count in counts[number].items():
            wanted[one] -= count

    def may_hold(number: int) -> bool:
        return number not in held and all(left[one] > count for one, count in counts[number].items())

    for number, count in enumerate(counts):
        closer = sum(abs(wanted[one]) - abs(wanted[one] - size) for one, size in count.items())
        if closer > 0 and may_hold(number):
            hold(number)
    total = Counter(map(stratum, refs))
    for number, count in enumerate(counts):
        if may_hold(number) and any(left[one] == total[one] for one in count):
            hold(number)
    if whole := [one for one in total if left[one] == total[one]]:
        examples = [next(ref.name for ref in refs if stratum(ref) == one) for one in whole]
        raise SourceError(
            "data.group_by leaves no way to put images of every class on both sides of the split; these classes, each "
            f"given by an image, have too few groups: {listed(examples)}; give a data.group_by with smaller groups, or "
            "validation images of your own"
        )
    parts: tuple[list[ImageRef], list[ImageRef]] = ([], [])
    for number, group in enumerate(groups):
        parts[number in held].extend(group)
    return parts


def with_groups(refs: Sequence[ImageRef], group_by: str | None) -> list[ImageRef]:
    """Give each image its group: what the first group of the regular expression `group_by` matches in its name.

    If the expression has no group, the whole match is used. With None, nothing changes.

    Raises:
        SourceError: the expression matches nothing in some names.
    """
    if group_by is None:
        return list(refs)
    pattern = re.compile(group_by)
    found = [pattern.search(ref.name) for ref in refs]
    groups = [(match and match[1 if pattern.groups else 0]) or "" for match in found]
    if without := [ref.name for ref, group in zip(refs, groups, strict=True) if not group]:
        raise SourceError(
            f"data.group_by {group_by!r} finds no group in the names of {len(without):,} images: {listed(without)}; "
            "give an expression that matches in every name"
        )
    return [ref._replace(group=group) for ref, group in zip(refs, groups, strict=True)]


def group_number(group: str) -> int:
    """Return a number of 53 bits that identifies a group, the same in every data set."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest()) >> 11


IMAGES_PER_CHUNK = 64
ROWS_PER_CHUNK = 256
BYTES_PER_CHUNK = 64 << 20


def stored_chunks(refs: Sequence[ImageRef], seed: int) -> list[list[ImageRef]]:
    """Return images in storage order, cut into the chunks in which they are read.

    The order is random, so any part of a beton is a fair sample. Rows of Parquet files can be read at a reasonable
    speed only together with their row group, so a chunk consists of whole, randomly chosen row groups. A chunk has as
    many as give ROWS_PER_CHUNK images or BYTES_PER_CHUNK bytes, in random order.
    """
    if not any(ref.row_group is not None for ref in refs):
        ranked = _ranked(refs, seed)
        return [ranked[start : start + IMAGES_PER_CHUNK] for start in range(0, len(ranked), IMAGES_PER_CHUNK)]
    groups = [_ranked(group, seed) for group in _grouped(refs, lambda ref: (ref.path, ref.row_group))]
    chunks: list[list[ImageRef]] = []
    for group in sorted(groups, key=lambda group: seeded_hash(seed, group[0].name)):
        if not chunks or len(chunks[-1]) >= ROWS_PER_CHUNK or sum(ref.size for ref in chunks[-1]) >= BYTES_PER_CHUNK:
            chunks.append([])
        chunks[-1] += group
    return [_ranked(chunk, seed) for chunk in chunks]


def checked(index: ImageIndex) -> ImageIndex:
    """Return the index. Raise SourceError if it has only one class, or classes without images in a split.

    Two classes or images with the same name are an error too, because names that differ on disk can be equal as text.
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
    problems += _group_problems(index)
    if problems:
        raise SourceError("\n".join(problems))
    return index


MIN_GROUPS = 10


def _group_problems(index: ImageIndex) -> Iterator[str]:
    sides = [{ref.group for ref in refs if ref.group} for refs in index.splits.values()]
    if both := sorted(set.intersection(*sides)):
        yield f"data.group_by gives groups that are in training and in validation: {listed(both)}"
    if 0 < (count := len(sides[-1])) < MIN_GROUPS:
        yield (
            f"data.group_by gives only {count} group{'s' if count > 1 else ''} of validation images; policies are "
            f"fitted on some and reported on the others, so at least {MIN_GROUPS} are needed; give smaller groups"
        )


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
    """Join names for a message. After `limit` names, only the number of the others is given."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def counted(skipped: Counter[str]) -> str:
    """Return the number of skipped entries and their kinds in a line, the most frequent kind first."""
    kinds = [f"{kind} ({count:,})" for kind, count in skipped.most_common()]
    entries = "entry that is not an image" if skipped.total() == 1 else "entries that are not images"
    return f"{skipped.total():,} {entries}: {listed(kinds)}"


def is_ignored(name: str) -> bool:
    """Return whether a file is clearly not an image by its name: hidden, or of a type that accompanies images."""
    return name.startswith(".") or name.lower() == "thumbs.db" or os.path.splitext(name)[1].lower() in IGNORED_SUFFIXES  # noqa: PTH122  a tenth of Path's time


def _ranked(refs: Iterable[ImageRef], seed: int) -> list[ImageRef]:
    return sorted(refs, key=lambda ref: (seeded_hash(seed, ref.name), ref.name))


def _grouped(refs: Iterable[ImageRef], key: Callable[[ImageRef], object]) -> list[list[ImageRef]]:
    groups: dict[object, list[ImageRef]] = defaultdict(list)
    for ref in refs:
        groups[key(ref)].append(ref)
    return [groups[name] for name in sorted(groups, key=repr)]
