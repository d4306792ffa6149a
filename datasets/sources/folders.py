"""Images in folders: class folders for training, and any tree of folders for prediction.

Every entry of a folder is an image, an error, or counted by kind as skipped. An entry that should be an image but
cannot be read, such as a broken link, is listed as an image, and fails with its reason when it is read.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
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
    is_ignored,
    listed,
    require_one_form,
    special_kind,
    split_off,
    state_of,
    with_groups,
)

VALIDATION_NAMES = ("val", "validation")
BROKEN_LINK = "broken link"


class Entry(NamedTuple):
    """An entry of a folder. `status` is that of a link's target or, if that cannot be reached, of the link itself."""

    name: str
    path: str
    status: os.stat_result

    @property
    def kind(self) -> str:
        """What the entry is: "" for a file, or "folder", "broken link", "named pipe" and so on."""
        return BROKEN_LINK if stat.S_ISLNK(self.status.st_mode) else special_kind(self.status.st_mode)

    @property
    def size(self) -> int:
        """The size of a file in bytes, 0 for anything else."""
        return 0 if self.kind else self.status.st_size


def list_folder(folder: Path) -> list[Entry]:
    """Return the entries of a folder, sorted by name.

    Raises:
        SourceError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as found:
            entries = [Entry(entry.name, entry.path, status) for entry in found if (status := _status(entry))]
    except OSError as error:
        raise SourceError(f"the folder {folder} cannot be listed: {error.strerror}") from None
    return sorted(entries, key=lambda entry: entry.name)


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Return the status of an entry, or None if it has been removed since the folder was listed."""
    try:
        return entry.stat()
    except OSError:
        try:
            return entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return None


def class_folders(folder: Path, skipped: Counter[str] | None = None) -> list[str]:
    """Return the sorted names of the folders in `folder`, except hidden ones and those of archive tools (__MACOSX).

    Args:
        skipped: counts the other entries by kind.

    Raises:
        SourceError: there are broken links, which may be classes.
    """
    names, broken = [], []
    for entry in list_folder(folder):
        if entry.kind == "folder" and not entry.name.startswith((".", "__")):
            names.append(entry.name)
        elif entry.kind == BROKEN_LINK and not is_ignored(entry.name):
            broken.append(entry.name)
        elif skipped is not None:
            beside = "" if entry.kind or is_ignored(entry.name) else " beside the class folders"
            skipped[skipped_kind(entry) + beside] += 1
    refuse_broken_links(folder, broken)
    return names


def refuse_broken_links(folder: Path, names: Sequence[str]) -> None:
    """Raise SourceError if a folder has broken links that may be classes. `names` are the names of the links."""
    if names:
        raise SourceError(
            f"{folder} has links that cannot be followed: {listed([shown_name(name) for name in names])}; restore "
            "their targets, or remove the links"
        )


def skipped_kind(entry: Entry) -> str:
    """Return what a skipped entry is, for a count: "hidden file", ".txt file", "named pipe" and so on."""
    if entry.name.startswith((".", "__")):
        return f"hidden {entry.kind or 'file'}"
    suffix = shown_name(os.path.splitext(entry.name)[1].lower())  # noqa: PTH122  a tenth of Path's time
    return entry.kind or (f"{suffix} file" if suffix else "file without a suffix")


def class_folder_files(folder: Path, classes: Sequence[str], skipped: Counter[str]) -> list[Entry]:
    """Return the images in class folders. Their names are CLASS/FILE.

    Args:
        skipped: counts the files that are clearly not images, by kind.

    Raises:
        SourceError: a class folder contains folders.
    """
    files, nested = [], []
    for name in classes:
        for entry in list_folder(folder / name):
            if is_ignored(entry.name) or (entry.kind == "folder" and entry.name.startswith("__")):
                skipped[skipped_kind(entry)] += 1
            elif entry.kind == "folder":
                nested.append(f"{name}/{entry.name}")
            else:
                files.append(entry._replace(name=f"{name}/{entry.name}"))
    if nested:
        raise SourceError(
            f"class folders in {folder} have folders: {listed([shown_name(name) for name in nested])}; put the images "
            "directly into the class folder, or give the folder with the class folders as data.source"
        )
    return files


def scan_image_folder(
    source: Path,
    validation_source: Path | None,
    validation_fraction: float,
    images_per_class: int | None,
    seed: int,
    group_by: str | None = None,
) -> Source:
    """Find class folders, sorted by name, directly in `source` or in SOURCE/train.

    Validation images are those of `validation_source` or, without it, those of SOURCE/val or SOURCE/validation next to
    SOURCE/train, or otherwise a seeded, stratified part of the training images.

    Raises:
        SourceError: there is no such folder, there are no class folders, class folders contain folders, or the
            validation classes differ from the training classes. `read_index` raises it for classes without images.
    """
    train, validation = _layout(source, validation_source)
    skipped: Counter[str] = Counter()
    classes = class_folders(train, skipped)
    if not classes:
        raise SourceError(
            f"{train} has no class folders; put the images of each class into a separate folder, or give the folder "
            "of Parquet files or WebDataset tars, or a CSV file"
        )
    validation_classes = class_folders(validation, skipped) if validation else []
    require_one_form([(train, classes), *([(validation, validation_classes)] if validation else [])])
    if unknown := sorted(set(validation_classes) - set(classes)):
        raise SourceError(
            f"{validation} has classes that {train} does not have: {listed([shown_name(name) for name in unknown])}; "
            "both need the same class folders"
        )
    if train != source:
        beside = [entry for entry in list_folder(source) if source / entry.name not in (train, validation)]
        skipped.update(f"{skipped_kind(entry)} beside the train folder" for entry in beside)
    train_files = class_folder_files(train, classes, skipped)
    validation_files = class_folder_files(validation, validation_classes, skipped) if validation else []
    if not train_files:
        raise SourceError(f"the class folders in {train} have no images")

    def read_index() -> ImageIndex:
        refs = with_groups(file_refs(train_files, classes, "train/" if validation else ""), group_by)
        if validation is None:
            kept, held_out = split_off(refs, validation_fraction, seed)
        else:
            kept, held_out = refs, with_groups(file_refs(validation_files, classes, "validation/"), group_by)
        splits = {TRAIN: choose(kept, images_per_class, seed), VALIDATION: held_out}
        return checked(ImageIndex([shown_name(name) for name in classes], splits))

    # Empty class folders count too, because they are classes.
    entries = [(f"train/{file.name}", file.status) for file in train_files]
    entries += [(f"validation/{file.name}", file.status) for file in validation_files]
    folders = [train / name for name in classes]
    folders += [validation / name for name in validation_classes] if validation else []
    return Source(f"{state_of(entries)} {len(classes)}", read_index, folders, skipped)


def _layout(source: Path, validation_source: Path | None) -> tuple[Path, Path | None]:
    for folder, key in ((source, "data.source"), (validation_source, "data.validation_source")):
        if folder is not None and not folder.is_dir():
            raise SourceError(f"{key} {folder} is not a folder")
    train = source / "train"
    # A class may also be called "train"; its folder then has images instead of folders.
    if not (train.is_dir() and class_folders(train)):
        return source, validation_source
    if validation_source is not None:
        return train, validation_source
    present = class_folders(source)
    found = [source / name for name in VALIDATION_NAMES if name in present]
    if len(found) > 1:
        raise SourceError(f"{source} has both val and validation; give one of them as data.validation_source")
    return train, found[0] if found else None


def file_refs(files: Iterable[Entry], classes: Sequence[str], prefix: str) -> list[ImageRef]:
    """Return the images of class folders, sorted by name. An image's class is the folder in its name."""
    labels = {name: label for label, name in enumerate(classes)}
    return sorted(
        ImageRef(shown_name(prefix + file.name), labels[file.name.split("/", 1)[0]], file.path, 0, file.size)
        for file in files
    )


SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
"""Suffixes of image files, in lower case: JPEG, PNG, WebP, BMP, TIFF, PPM and AVIF."""


@dataclass(frozen=True)
class ImageWalk:
    """The images below a folder.

    Attributes:
        files: paths relative to the folder, found during iteration, including broken links.
        skipped: number of other entries by kind; complete at the end of the iteration.
    """

    files: Iterator[str]
    skipped: Counter[str] = field(default_factory=Counter)


def walk_images(folder: Path) -> ImageWalk:
    """Find the image files (SUFFIXES) below a folder, sorted within each folder.

    Linked folders are read after all others, and only if they have not been read under another name.

    Raises:
        SourceError: raised during iteration, if a folder cannot be listed.
    """
    skipped: Counter[str] = Counter()
    return ImageWalk(_walk(folder, skipped), skipped)


def _walk(folder: Path, skipped: Counter[str]) -> Iterator[str]:
    seen: set[tuple[int, int]] = set()
    linked = [Entry("", str(folder), folder.stat())]
    prefix = os.path.join(folder, "")  # noqa: PTH118  ends with one slash
    while linked:
        top = linked.pop(0)
        stack = [iter([top])]
        while stack:
            entry = next(stack[-1], None)
            if entry is None:
                stack.pop()
            elif entry.kind == "folder" and entry is not top and Path(entry.path).is_symlink():
                linked.append(entry)
            elif entry.kind == "folder" and (key := (entry.status.st_dev, entry.status.st_ino)) not in seen:
                seen.add(key)
                stack.append(iter(list_folder(Path(entry.path))))
            elif entry.kind == "folder":
                skipped["folder that is read under another name"] += 1
            elif _may_be_image(entry):
                yield entry.path.removeprefix(prefix)
            else:
                skipped[skipped_kind(entry)] += 1


def _may_be_image(entry: Entry) -> bool:
    if entry.kind == BROKEN_LINK:
        return not is_ignored(entry.name)
    return not entry.kind and entry.name.lower().endswith(SUFFIXES)
