"""Images that come with a list of their labels, such as a CSV file, and the conversion of such a list to an index."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from datasets.files import TRAIN, VALIDATION, shown_name
from datasets.sources.index import (
    ImageIndex,
    ImageRef,
    Source,
    SourceError,
    checked,
    choose,
    listed,
    special_kind,
    split_off,
    state_of,
    why_unreadable,
    with_groups,
)

SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The split that a word in a shard's name or in a CSV file means. Test images are used for validation if there are no
validation images."""
WNID = re.compile(r"(?<![a-z0-9])n\d{8}(?!\d)")
NUM_ILSVRC_CLASSES = 1000
MAX_PROBLEMS = 20


class Listed(NamedTuple):
    """An image of a list (its `ref.label` is not set), the name of its class, and its split or ""."""

    ref: ImageRef
    label: str
    split: str = ""


@dataclass
class Listing:
    """What a reader finds.

    Attributes:
        class_names: names of all classes in order, if the source has them.
        unusable: (place, reason) of entries that are not labeled images.
        problems: mistakes in the source as a whole, one sentence each.
    """

    images: list[Listed] = field(default_factory=list)
    class_names: Sequence[str] = ()
    unusable: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Choice:
    """How the images of a list are chosen and split. `wnids` are the ImageNet classes to keep; None keeps all."""

    validation_fraction: float = 0.2
    images_per_class: int | None = None
    seed: int = 0
    group_by: str | None = None
    label_column: str | None = None
    wnids: Sequence[str] | None = None


def index_listing(listing: Listing, choice: Choice) -> ImageIndex:
    """Return the index of a list. Classes are sorted by name (numbers by value) unless the source gives their order.

    Raises:
        SourceError: lists every problem of the list, or the classes without images in a split.
    """
    images = listing.images
    if choice.wnids is not None:
        images = _of_imagenet(listing, choice.wnids)
    if listing.problems:
        lines = [*listing.problems, *(f"{shown_name(place)}: {reason}" for place, reason in listing.unusable)]
        more = [f"and {len(lines) - MAX_PROBLEMS:,} more problems"] if len(lines) > MAX_PROBLEMS else []
        raise SourceError("the source cannot be used:\n" + "\n".join(f"  {one}" for one in lines[:MAX_PROBLEMS] + more))
    classes = list(choice.wnids or listing.class_names) or _sorted_labels({one.label for one in images})
    numbers = {name: number for number, name in enumerate(classes)}
    present = {one.split for one in images}
    held_out = VALIDATION if VALIDATION in present else "test"
    refs: dict[str, list[ImageRef]] = {TRAIN: [], held_out: []}
    for one in images:
        if one.split in ("", *refs):
            refs[one.split or TRAIN].append(one.ref._replace(label=numbers[one.label]))
    train, validation = (_grouped_by(some, choice.group_by) for some in refs.values())
    if not validation:
        train, validation = split_off(train, choice.validation_fraction, choice.seed)
    splits = {TRAIN: choose(train, choice.images_per_class, choice.seed), VALIDATION: validation}
    return checked(ImageIndex([shown_name(name) for name in classes], splits, unusable=listing.unusable))


def _sorted_labels(labels: Iterable[str]) -> list[str]:
    labels = sorted(labels)
    return sorted(labels, key=int) if all(label.isdecimal() for label in labels) else labels


def _grouped_by(refs: Sequence[ImageRef], group_by: str | None) -> list[ImageRef]:
    """Give images their groups by name, unless a column of this name gave them."""
    if not any(ref.group for ref in refs):
        return with_groups(refs, group_by)
    if without := [ref.name for ref in refs if not ref.group]:
        raise SourceError(f"{len(without):,} images have no value for data.group_by {group_by!r}: {listed(without)}")
    return list(refs)


def _of_imagenet(listing: Listing, wnids: Sequence[str]) -> list[Listed]:
    """Keep the images of `wnids`, with the WordNet id as label. Images with an unknown id become problems.

    The id is the name of the class, or is in the name of the image, or follows from the number of the class in
    ILSVRC2012's order (the sorted ids), if the source has 1,000 class names or none.
    """
    wanted, kept, unknown = set(wnids), [], Counter[str]()
    ordered = len(listing.class_names) == NUM_ILSVRC_CLASSES
    numbers = {name: number for number, name in enumerate(listing.class_names)} if ordered else {}
    for one in listing.images:
        number = numbers.get(one.label)
        if number is None and not listing.class_names and one.label.isdecimal():
            number = int(one.label)
        by_number = ilsvrc_wnids()[number] if number is not None and number < NUM_ILSVRC_CLASSES else None
        found = WNID.findall(one.ref.name)
        by_name = one.label if WNID.fullmatch(one.label) else found[-1] if found else None
        if by_name and by_number and by_name != by_number:
            listing.unusable.append((one.ref.place, f"its name has {by_name}, but label {one.label} is {by_number}"))
        elif (wnid := by_name or by_number) is None:
            unknown[one.label] += 1
        elif wnid in wanted:
            kept.append(one._replace(label=wnid))
    if unknown:
        listing.problems.append(
            f"the WordNet ids of these classes are unknown: {listed(sorted(unknown))}; imagenet100 needs ids as class "
            "names or in the names of images, or ILSVRC2012's 1,000 classes in its order"
        )
    return kept


@cache
def ilsvrc_wnids() -> list[str]:
    """Return the WordNet ids of ILSVRC2012's 1,000 classes, sorted, from timm. A class's number is its position."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "data" / "_info" / "imagenet_synsets.txt").read_text().split()


def scan_listing(
    entries: Iterable[tuple[str, os.stat_result]],
    read: Callable[[], Listing],
    choice: Choice,
    folders: Sequence[Path] = (),
    skipped: Counter[str] | None = None,
) -> Source:
    """Return the source of a list that `read` reads and that depends on the files `entries`."""
    skipped = Counter() if skipped is None else skipped
    return Source(state_of(entries), lambda: index_listing(read(), choice), folders, skipped)


def scan_csv(file: Path, choice: Choice) -> Source:
    """Find the images that a CSV file lists. Its header names the columns `path`, from the file's folder, and `label`.

    A column `split` may say train, validation or test. `choice.label_column` names another column than `label`, and
    `choice.group_by` may name a column.

    Raises:
        SourceError: a column is missing, or the file is not valid CSV. `read_index` raises it, with all problems, for
            images that are listed twice and for unknown splits.
    """
    listing, entries = Listing(), [("labels", file.stat())]
    seen: dict[str, int] = {}
    label_column = choice.label_column or "label"
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        rows = csv.DictReader(lines, strict=True)
        try:
            columns = list(rows.fieldnames or [])
            if missing := [name for name in ("path", label_column) if name not in columns]:
                raise SourceError(
                    f"{file} has no column {' and no column '.join(missing)}; its first line has the columns "
                    f"{listed([shown_name(name) for name in columns]) or 'none'}; it must name path and {label_column}"
                )
            for row in rows:
                line, path, label = rows.line_num, row["path"], (row[label_column] or "").strip()
                place = f"{file} (line {line})"
                split = (row.get("split") or "").strip().lower()
                if not path or not label:
                    listing.unusable.append((place, f"it has no {'label' if path else 'path'}"))
                elif split and split not in SPLIT_OF_WORD:
                    listing.problems.append(
                        f"{place}: there is no split {shown_name(split)}; write train, validation or test"
                    )
                elif (before := seen.setdefault(os.path.normpath(path), line)) != line:
                    listing.problems.append(f"{place}: {shown_name(path)} is already listed in line {before}")
                elif status := _file_status(file.parent, path, place, listing):
                    group = (row.get(choice.group_by) or "") if choice.group_by in columns else ""
                    ref = ImageRef(
                        shown_name(path), 0, str(file.parent / path), 0, status.st_size, group=shown_name(group)
                    )
                    listing.images.append(Listed(ref, label, SPLIT_OF_WORD.get(split, "")))
                    entries.append((path, status))
        except csv.Error as error:
            raise SourceError(f"{file}, line {rows.line_num}: {error}; fix the line") from None
    splits = {one.split for one in listing.images}
    if "" in splits and len(splits) > 1:
        listing.problems.append(f"{file} has a split for some images, but not for all; give all of them one, or none")
    folders = sorted({Path(os.path.normpath(one.ref.path)).parent for one in listing.images})
    skipped = Counter("test row" for one in listing.images if one.split == "test" and VALIDATION in splits)
    return scan_listing(entries, lambda: listing, choice, folders, skipped)


def _file_status(folder: Path, path: str, place: str, listing: Listing) -> os.stat_result | None:
    """Return the status of an image's file, or None after noting why there is none."""
    status = None
    try:
        status = (folder / path).stat()
        reason = (kind := special_kind(status.st_mode)) and f"it is a {kind}, not a file"
    except OSError as error:
        reason = why_unreadable(str(folder / path), error)
    except ValueError as error:  # a null byte
        reason = str(error)
    if reason:
        listing.unusable.append((place, f"{shown_name(path)}: {reason}"))
    return None if reason else status
