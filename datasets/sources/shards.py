"""Shards, which are files of many labeled images: Parquet as Hugging Face writes it, and WebDataset's tars.

Images are read directly from the shards, without unpacking them.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets.files import TRAIN, VALIDATION, shown_name
from datasets.sources.folders import SUFFIXES, Entry, list_folder
from datasets.sources.index import ImageRef, Source, SourceError, image_column, is_ignored, listed
from datasets.sources.listing import SPLIT_OF_WORD, Choice, Listed, Listing, scan_listing
from datasets.sources.tars import all_members

if TYPE_CHECKING:
    from pyarrow import Schema, Table
    from pyarrow.parquet import ParquetFile

PARQUET, TAR = ".parquet", ".tar"
MAX_ROW_GROUP_BYTES = 1 << 30
LABEL = "label"
FOLDER_LEVELS = 2
OFFICIAL_TAR = re.compile(r"(ILSVRC2012_img_.*|n\d{8})\.tar")
"""Names of ILSVRC2012's own tars, which have no labels."""


class Shard(NamedTuple):
    """A file of many images. `name` is its path in the source as text; `split` is the split in the name, or ""."""

    name: str
    entry: Entry
    split: str

    @property
    def place(self) -> str:
        """The path of the shard, for messages."""
        return self.entry.path


def find_shards(source: Path) -> list[Shard]:
    """Return the shards at `source` or up to two folders below it, sorted by name. All have the same format.

    Other files beside shards, such as indexes, are left out. The result is empty if a folder below `source` has images,
    or has files but no shard. Then the folders are class folders, and the archives beside them are not shards.

    Raises:
        SourceError: there are shards of both formats, or a folder cannot be listed.
    """
    if source.is_file():
        files = [Entry(source.name, str(source), source.stat())] if source.suffix in (PARQUET, TAR) else []
    else:
        files = _shard_files(source)
    if len(kinds := sorted({Path(file.name).suffix for file in files})) > 1:
        raise SourceError(f"{source} has {' and '.join(kinds)} files; give the folder of one kind as data.source")
    return [Shard(shown_name(file.name), file, split_in_name(file.name)) for file in files]


def _shard_files(source: Path) -> list[Entry]:
    files: list[Entry] = []

    def walk(folder: Path, prefix: str, level: int) -> bool:
        """Add the shards in a folder. Return False if it is a class folder: it has images, or files but no shard."""
        shards, others = [], []
        for entry in list_folder(folder):
            if is_ignored(entry.name):
                continue
            if entry.kind == "folder":
                if level < FOLDER_LEVELS and not walk(folder / entry.name, f"{prefix}{entry.name}/", level + 1):
                    return False
            elif Path(entry.name).suffix in (PARQUET, TAR) and not OFFICIAL_TAR.fullmatch(entry.name):
                shards.append(entry._replace(name=prefix + entry.name))
            else:
                others.append(entry.name.lower())
        files.extend(shards)
        has_images = any(name.endswith(SUFFIXES) for name in others)
        return level == 0 or not others or (bool(shards) and not has_images)

    return sorted(files) if source.is_dir() and walk(source, "", 0) else []


def split_in_name(name: str) -> str:
    """Return the split that is a word in a shard's name, such as `train-00000-of-00002.parquet`, or ""."""
    for part in reversed(Path(name.lower()).parts):
        if found := [SPLIT_OF_WORD[word] for word in re.split(r"[^a-z]+", part) if word in SPLIT_OF_WORD]:
            return found[0]
    return ""


def scan_shards(shards: list[Shard], held_out: list[Shard], choice: Choice) -> Source:
    """Return the source of labeled images in shards.

    Args:
        held_out: shards of data.validation_source, whose images are all for validation.

    Raises:
        SourceError: some shards have a split in their names and others do not, or no shard is for training.
    """
    named = [shard for shard in shards if shard.split]
    if named and (unnamed := [shard.name for shard in shards if not shard.split]):
        raise SourceError(
            f"the names of some shards have a split, such as {named[0].name}, but these have none: {listed(unnamed)}; "
            "write train, validation or test into each name, or into none"
        )
    if named and not any(shard.split == TRAIN for shard in shards):
        raise SourceError(f"no shard has train in its name: {listed([shard.name for shard in named])}")
    validation = any(shard.split == VALIDATION for shard in shards)
    unused = (VALIDATION, "test") if held_out else ("test",) if validation else ()
    skipped = Counter(f"{shard.split} shard" for shard in shards if shard.split in unused)
    shards = [shard for shard in shards if shard.split not in unused]
    shards += [shard._replace(name=f"validation/{shard.name}", split=VALIDATION) for shard in held_out]
    entries = [(shard.name, shard.entry.status) for shard in shards]
    folders = sorted({Path(shard.place).parent for shard in shards})
    return scan_listing(entries, lambda: _read(shards, choice), choice, folders, skipped)


def _read(shards: list[Shard], choice: Choice) -> Listing:
    listing = Listing()
    readers: dict[str, Callable[[Shard, Choice, Listing], None]] = {PARQUET: _read_parquet, TAR: _read_tar}
    for shard in shards:
        readers[Path(shard.place).suffix](shard, choice, listing)
    return listing


def _read_parquet(shard: Shard, choice: Choice, listing: Listing) -> None:
    """Add the rows of a Parquet file to a listing. Only their labels, names and groups are read."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(shard.place) as file:
            columns = _columns(shard, file, choice, listing)
            if columns is None:
                return
            first = 0
            for number in range(file.num_row_groups):
                count = file.metadata.row_group(number).num_rows
                try:
                    _read_row_group(shard, file, number, first, columns, listing)
                except (pa.ArrowException, OSError) as error:
                    rows = f"rows {first} to {first + count - 1}"
                    listing.unusable.append((f"{shard.place} ({rows})", f"the labels cannot be read: {_first(error)}"))
                first += count
    except (pa.ArrowException, OSError) as error:
        listing.unusable.append((shard.place, f"the Parquet file cannot be read: {_first(error)}"))


class _Columns(NamedTuple):
    """The columns of a Parquet file: image and label, the image's path, what groups, and the class names."""

    image: str
    label: str
    path: str | None
    group: str | None
    names: tuple[str, ...]


def _columns(shard: Shard, file: ParquetFile, choice: Choice, listing: Listing) -> _Columns | None:
    """Return the columns, or None after noting every problem with them."""
    from pyarrow import types

    schema, problems = file.schema_arrow, []
    features = hub_features(schema)
    image, label = None, None
    try:
        image = image_column(schema)
    except ValueError as error:
        problems.append(str(error))
    try:
        label = _label_column(schema, features, choice.label_column)
        kind = schema.field(label).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
            problems.append(f"the label column {label} has the type {kind}; a label is an integer or text")
    except ValueError as error:
        problems.append(str(error))
    names = features.get(label, {}).get("names") if label else None
    names = tuple(str(name) for name in names) if isinstance(names, list) else ()
    if file.metadata.num_rows and listing.images and names != tuple(listing.class_names):
        problems.append("its class names differ from those of the shards before it")
    largest = max((_image_bytes(file, number, image or "") for number in range(file.num_row_groups)), default=0)
    if largest > MAX_ROW_GROUP_BYTES:
        problems.append(
            f"a row group has {largest / 2**30:.1f} GiB of images, and each process reads whole ones; at most 1 GiB is "
            "allowed; write it with smaller ones, such as pyarrow.parquet.write_table(..., row_group_size=100)"
        )
    listing.problems += [f"{shard.place}: {problem}" for problem in problems]
    if problems or image is None or label is None:
        return None
    listing.class_names = names if file.metadata.num_rows else listing.class_names or names
    struct = image.removesuffix(".bytes") if image.endswith(".bytes") else None
    has_path = struct is not None and schema.field(struct).type.get_field_index("path") >= 0
    group = choice.group_by if choice.group_by in schema.names else None
    return _Columns(image, label, f"{struct}.path" if has_path else None, group, names)


def hub_features(schema: Schema) -> dict[str, Any]:
    """Return the features that Hugging Face's `datasets` stores in a Parquet file, by column, or {} if it has none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: one if isinstance(one, dict) else {} for name, one in features.items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _label_column(schema: Schema, features: Mapping[str, Any], given: str | None) -> str:
    if given is not None and given not in schema.names:
        raise ValueError(f"it has no column {given} (data.label_column); its columns are {listed(schema.names)}")
    classes = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    found = [given] if given else [LABEL] if LABEL in schema.names else classes
    if len(found) != 1:
        several = f"several label columns, {' and '.join(found)}" if found else f"no column {LABEL}"
        raise ValueError(f"it has {several}; set data.label_column to one of {listed(schema.names)}")
    return found[0]


def _image_bytes(file: ParquetFile, row_group: int, image: str) -> int:
    """Return the decoded size of a row group's images."""
    group = file.metadata.row_group(row_group)
    columns = [group.column(number) for number in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == image)


def _read_row_group(
    shard: Shard, file: ParquetFile, number: int, first: int, columns: _Columns, listing: Listing
) -> None:
    names = [name for name in (columns.label, columns.path, columns.group) if name]
    table: Table = file.read_row_group(number, columns=names)
    count = table.num_rows
    labels = table.column(columns.label).to_pylist()
    paths, groups = [None] * count, [""] * count
    if columns.path:
        structs = table.column(columns.path.removesuffix(".path")).to_pylist()
        paths = [struct and struct["path"] for struct in structs]
    if columns.group:
        groups = ["" if value is None else shown_name(str(value)) for value in table.column(columns.group).to_pylist()]
    size = _image_bytes(file, number, columns.image) // max(count, 1)
    for row, (label, path, group) in enumerate(zip(labels, paths, groups, strict=True), start=first):
        name = f"{shard.name}/{row}" + (f"/{shown_name(path)}" if path else "")
        ref = ImageRef(name, 0, shard.place, row, size, group=group, row_group=number)
        known = isinstance(label, int) and 0 <= label < len(columns.names)
        if label is None or label == -1 or label == "":
            listing.unusable.append((ref.place, "it has no label"))
        elif columns.names and not known and label not in columns.names:
            allowed = f"0 to {len(columns.names) - 1}"
            listing.unusable.append((ref.place, f"its label is {label}, but the class names allow {allowed}"))
        elif isinstance(label, int) and label < 0:
            listing.unusable.append((ref.place, f"its label is {label}"))
        else:
            listing.images.append(Listed(ref, columns.names[label] if known else str(label), shard.split))


def _first(error: Exception) -> str:
    """Return the first line of a library's message."""
    return shown_name(str(error).partition("\n")[0]) or type(error).__name__


def _read_tar(shard: Shard, choice: Choice, listing: Listing) -> None:
    """Add the samples of a WebDataset tar: files with the same path up to the first dot of their names."""
    samples: dict[str, _Sample] = {}
    try:
        for key, kind, member, read in _members(shard):
            sample = samples.setdefault(key, _Sample({}, {}, []))
            if kind in sample.images or kind in sample.texts:
                sample.problems.append(f"it has two .{kind} files")
            if f".{kind.rpartition('.')[2]}" in SUFFIXES:
                sample.images[kind] = (member.offset_data, member.size)
            elif kind in ("cls", "json"):
                sample.texts[kind] = read()
    except (tarfile.TarError, OSError) as error:
        listing.unusable.append((shard.place, f"it is not a complete, uncompressed tar file: {_first(error)}"))
        if samples:
            samples.popitem()  # the last one, which may be cut
    found = [(_labeled(shard, key, sample, choice), key) for key, sample in samples.items()]
    if found and not any(sample.texts for sample in samples.values()):
        listing.unusable.append((shard.place, f"none of its {len(found):,} samples has a .cls or .json with a label"))
        return
    for one, key in found:
        if isinstance(one, str):
            listing.unusable.append((f"{shard.place} (sample {shown_name(key)})", one))
        else:
            listing.images.append(one)


class _Sample(NamedTuple):
    """The files of a sample by their kind: offset and size of images, the content of the others."""

    images: dict[str, tuple[int, int]]
    texts: dict[str, bytes]
    problems: list[str]


def _members(shard: Shard) -> Iterator[tuple[str, str, tarfile.TarInfo, Callable[[], bytes]]]:
    """Yield key, kind (lower case), header and reader of each file."""
    with Path(shard.place).open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in all_members(archive):
            folder, name = os.path.split(member.name)
            stem, dot, kind = name.partition(".")
            if not member.isfile() or not stem or not dot:
                continue

            def read(member: tarfile.TarInfo = member) -> bytes:
                content = archive.extractfile(member)
                assert content is not None
                return content.read()

            yield f"{folder}/{stem}" if folder else stem, kind.lower(), member, read


def _labeled(shard: Shard, key: str, sample: _Sample, choice: Choice) -> Listed | str:
    """Return a sample as a labeled image, or the reason why it is not one."""
    if sample.problems:
        return "; ".join(sample.problems)
    if len(sample.images) != 1:
        return f"it has {len(sample.images)} images; one is allowed" if sample.images else "it has no image"
    fields: dict[str, Any] = {}
    if "json" in sample.texts:
        try:
            fields = json.loads(sample.texts["json"])
        except ValueError as error:
            return f"its .json cannot be read: {error}"
        if not isinstance(fields, dict):
            return "its .json is not an object"
    label = fields.get(choice.label_column or LABEL)
    if choice.label_column is None and "cls" in sample.texts:
        label = sample.texts["cls"].decode("utf-8", "surrogateescape").strip()
    if label in (None, "", -1, "-1"):
        return f"it has no label in .cls and no {choice.label_column or LABEL} in .json"
    if isinstance(label, bool) or not isinstance(label, int | str) or (isinstance(label, int) and label < 0):
        return f"its label is {label!r}; a label is text, or an integer of 0 or more"
    ((kind, (offset, size)),) = sample.images.items()
    group = fields.get(choice.group_by) if choice.group_by else None
    name = f"{shard.name}/{shown_name(key)}.{kind}"
    ref = ImageRef(name, 0, shard.place, offset, size, group="" if group is None else shown_name(str(group)))
    return Listed(ref, str(label), shard.split)
