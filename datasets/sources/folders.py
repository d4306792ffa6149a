"""Class folders: SOURCE/CLASS/IMAGE, or SOURCE/{train,val}/CLASS/IMAGE."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from datasets.sources.index import (
    ImageIndex,
    ImageRef,
    Source,
    SourceError,
    checked,
    choose,
    is_ignored,
    listed,
    split_off,
    state_of,
)

VALIDATION_NAMES = ("val", "validation")


class FolderFile(NamedTuple):
    """A file of a class folder: name is FOLDER/FILE."""

    name: str
    path: str
    status: os.stat_result


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted, without hidden ones and what archive tools leave (__MACOSX)."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith((".", "__")))


def class_folder_files(folder: Path, classes: Sequence[str]) -> Iterator[FolderFile]:
    """The images in folders of classes, unsorted.

    Raises:
        SourceError: a class folder holds folders.
    """
    nested = []
    for name in classes:
        with os.scandir(folder / name) as entries:
            for entry in entries:
                if entry.is_dir():
                    nested += [] if is_ignored(entry.name) else [f"{name}/{entry.name}"]
                elif not is_ignored(entry.name):
                    yield FolderFile(f"{name}/{entry.name}", entry.path, entry.stat())
    if nested:
        raise SourceError(
            f"class folders in {folder} hold folders: {listed(sorted(nested))}; put the images directly into "
            "the class folder, or name the folder that holds the class folders as data.source"
        )


def scan_image_folder(
    source: Path, validation_source: Path | None, validation_fraction: float, images_per_class: int | None, seed: int
) -> Source:
    """Class folders, sorted by name, directly in `source` or in SOURCE/train.

    Validation is `validation_source`, else SOURCE/val or SOURCE/validation beside SOURCE/train, else a seeded,
    stratified share of the training images.

    Raises:
        SourceError: no such folder, no class folders, folders in class folders, or validation classes that are not
            among the training classes. `read_index` raises it for classes without images.
    """
    train, validation = _layout(source, validation_source)
    classes = subfolders(train)
    if not classes:
        raise SourceError(f"{train} holds no class folders; each class needs a folder of its own with its images")
    if validation is not None and (unknown := sorted(set(subfolders(validation)) - set(classes))):
        raise SourceError(
            f"{validation} has classes that {train} does not have: {listed(unknown)}; both need the same class folders"
        )
    train_files = list(class_folder_files(train, classes))
    validation_files = list(class_folder_files(validation, subfolders(validation))) if validation else []
    if not train_files:
        raise SourceError(f"the class folders in {train} hold no images")

    def read_index() -> ImageIndex:
        refs = _refs(train_files, classes, "train/" if validation else "")
        if validation is None:
            kept, held_out = split_off(refs, validation_fraction, seed)
        else:
            kept, held_out = refs, _refs(validation_files, classes, "validation/")
        splits = {"train": choose(kept, images_per_class, seed), "validation": held_out}
        return checked(ImageIndex(classes, splits))

    # Empty class folders count as well: they are classes.
    entries = [(f"train/{file.name}", file.status) for file in train_files]
    entries += [(f"validation/{file.name}", file.status) for file in validation_files]
    return Source(f"{state_of(entries)} {len(classes)}", read_index)


def _layout(source: Path, validation_source: Path | None) -> tuple[Path, Path | None]:
    for folder, key in ((source, "data.source"), (validation_source, "data.validation_source")):
        if folder is not None and not folder.is_dir():
            raise SourceError(f"{key} {folder} is not a folder")
    train = source / "train"
    # A class may be called "train" too, and then its folder holds images instead of folders.
    if not (train.is_dir() and subfolders(train)):
        return source, validation_source
    if validation_source is not None:
        return train, validation_source
    found = [source / name for name in VALIDATION_NAMES if (source / name).is_dir()]
    if len(found) > 1:
        raise SourceError(f"{source} holds both val and validation; name one as data.validation_source")
    return train, found[0] if found else None


def _refs(files: Iterable[FolderFile], classes: Sequence[str], prefix: str) -> list[ImageRef]:
    labels = {name: label for label, name in enumerate(classes)}
    return sorted(
        ImageRef(prefix + file.name, labels[file.name.split("/", 1)[0]], file.path, 0, file.status.st_size)
        for file in files
    )


SUFFIXES = (".jpg", ".jpeg", ".png")


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
