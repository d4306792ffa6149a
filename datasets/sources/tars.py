"""ILSVRC2012 as it is found on disks: the official tar files, read in place, or an unpacked tree.

Whatever the layout, an image's name is the same (`train/WNID/FILE`, `val/WNID/FILE`), and so is all that follows from
it: the choice of images_per_class, the order, and the bytes of the betons.
"""

from __future__ import annotations

import csv
import io
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from datasets.sources.folders import class_folder_files, subfolders
from datasets.sources.index import (
    ImageIndex,
    ImageRef,
    Source,
    SourceError,
    checked,
    choose,
    is_ignored,
    listed,
    state_of,
)

TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT, DEVKIT_TAR = "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTH, META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
KAGGLE_IMAGES, KAGGLE_LABELS = "ILSVRC/Data/CLS-LOC", "LOC_val_solution.csv"
LAYOUTS = f"""it is read from any of
  train:      {TRAIN_TAR}, train/WNID/*.JPEG or train/WNID.tar
  validation: val/WNID/*.JPEG, or {VALIDATION_TAR} or val/*.JPEG
              together with {DEVKIT_TAR}, {DEVKIT}/ or {KAGGLE_LABELS}
(train and val also under {KAGGLE_IMAGES})"""


class _Part(NamedTuple):
    """One split: the files whose state stands for it, and how to find its images once they are needed."""

    entries: list[tuple[str, os.stat_result]]
    read: Callable[[], list[ImageRef]]


def scan_imagenet(source: Path, classes: Sequence[str], images_per_class: int | None, seed: int) -> Source:
    """The images of `classes` (WordNet ids) in any of the LAYOUTS.

    Raises:
        SourceError: what is missing and which layouts are read. `read_index` raises it, with all of their ids, for
            classes without images, and for tar files that are cut short.
    """
    if not source.is_dir():
        raise SourceError(f"data.source {source} is not a folder; give the one that holds ILSVRC2012: {LAYOUTS}")
    train, validation = _train_part(source, classes), _validation_part(source, classes)
    missing = [name for name, part in (("training", train), ("validation", validation)) if part is None]
    if train is None or validation is None:
        raise SourceError(f"{source} holds no ILSVRC2012 {' and no '.join(missing)} images; {LAYOUTS}")

    def read_index() -> ImageIndex:
        splits = {"train": choose(train.read(), images_per_class, seed), "validation": validation.read()}
        return checked(ImageIndex(list(classes), splits))

    return Source(state_of([*train.entries, *validation.entries]), read_index)


def _train_part(source: Path, classes: Sequence[str]) -> _Part | None:
    labels = {wnid: label for label, wnid in enumerate(classes)}
    for folder in (source / "train", source / KAGGLE_IMAGES / "train"):
        if folder.is_dir() and (found := set(subfolders(folder)) & set(classes)):
            return _folder_part("train", folder, [wnid for wnid in classes if wnid in found], labels)
        tars = [folder / f"{wnid}.tar" for wnid in classes if (folder / f"{wnid}.tar").is_file()]
        if tars:
            entries = [(f"train/{tar.name}", tar.stat()) for tar in tars]
            return _Part(entries, lambda tars=tars: [ref for tar in tars for ref in _class_tar(tar, labels[tar.stem])])
    tar = source / TRAIN_TAR
    return _Part([(TRAIN_TAR, tar.stat())], lambda: _nested_tars(tar, labels)) if tar.is_file() else None


def _validation_part(source: Path, classes: Sequence[str]) -> _Part | None:
    labels = {wnid: label for label, wnid in enumerate(classes)}
    for folder in (source / "val", source / KAGGLE_IMAGES / "val"):
        if not folder.is_dir():
            continue
        if found := set(subfolders(folder)) & set(classes):
            return _folder_part("val", folder, [wnid for wnid in classes if wnid in found], labels)
        if part := _flat_part(source, folder, labels):
            return part
    tar = source / VALIDATION_TAR
    if not tar.is_file():
        return None
    entries = [(VALIDATION_TAR, tar.stat()), _truth_entry(source)]
    return _Part(entries, lambda: _labelled(_tar_members(tar), source, labels))


def _flat_part(source: Path, folder: Path, labels: dict[str, int]) -> _Part | None:
    """Validation images directly in a folder; None where there are none."""
    with os.scandir(folder) as found:
        images = [entry for entry in found if entry.is_file() and not is_ignored(entry.name)]
    if not images:
        return None
    files = sorted((image.name, image.path, image.stat()) for image in images)
    refs = [ImageRef(name, 0, path, 0, status.st_size) for name, path, status in files]
    entries = [(f"val/{name}", status) for name, _, status in files]
    return _Part([*entries, _truth_entry(source)], lambda: _labelled(refs, source, labels))


def _folder_part(split: str, folder: Path, classes: Sequence[str], labels: dict[str, int]) -> _Part:
    files = list(class_folder_files(folder, classes))
    refs = sorted(
        ImageRef(f"{split}/{file.name}", labels[file.name.split("/")[0]], file.path, 0, file.status.st_size)
        for file in files
    )
    return _Part([(f"{split}/{file.name}", file.status) for file in files], lambda: refs)


def _class_tar(tar: Path, label: int) -> list[ImageRef]:
    return [ref._replace(name=f"train/{tar.stem}/{ref.name}", label=label) for ref in _tar_members(tar)]


def _nested_tars(tar: Path, labels: dict[str, int]) -> list[ImageRef]:
    """The images in the tar files, one a class, that the training tar holds."""
    refs = []
    for outer in _tar_members(tar):
        wnid = Path(outer.name).stem
        if wnid in labels:
            inner = _tar_members(tar, outer.offset, outer.size)
            refs += [ref._replace(name=f"train/{wnid}/{ref.name}", label=labels[wnid]) for ref in inner]
    return refs


def _tar_members(tar: Path, offset: int = 0, size: int | None = None) -> list[ImageRef]:
    """The files in the tar that lies at `offset` of a file; their folders are dropped from their names."""
    size = tar.stat().st_size - offset if size is None else size
    try:
        with tar.open("rb") as file, tarfile.open(fileobj=_Window(file, offset, size), mode="r:") as archive:
            return [
                ImageRef(Path(member.name).name, 0, str(tar), offset + member.offset_data, member.size)
                for member in archive
                if member.isreg() and not is_ignored(Path(member.name).name)
            ]
    except tarfile.TarError as error:
        raise SourceError(f"{tar} is no complete, uncompressed tar file ({error}); fetch it again") from None


def _labelled(refs: list[ImageRef], source: Path, labels: dict[str, int]) -> list[ImageRef]:
    """Validation images, whose class is not in their name, with the classes that the ground truth gives them."""
    truth = _validation_truth(source)
    unknown = [ref.name for ref in refs if Path(ref.name).stem not in truth]
    if unknown:
        raise SourceError(f"the ground truth in {source} does not know these validation images: {listed(unknown)}")
    named = [(truth[Path(ref.name).stem], ref) for ref in refs]
    return [ref._replace(name=f"val/{wnid}/{ref.name}", label=labels[wnid]) for wnid, ref in named if wnid in labels]


def _truth_file(source: Path) -> Path:
    for name in (KAGGLE_LABELS, DEVKIT_TAR, f"{DEVKIT}/{GROUND_TRUTH}"):
        if (source / name).is_file():
            return source / name
    raise SourceError(
        f"{source} holds validation images without their classes; add {DEVKIT_TAR} or {KAGGLE_LABELS}, or sort them "
        "into val/WNID/"
    )


def _truth_entry(source: Path) -> tuple[str, os.stat_result]:
    file = _truth_file(source)
    return file.name, file.stat()


def _validation_truth(source: Path) -> dict[str, str]:
    """WordNet id by file name without ending, for all validation images."""
    file = _truth_file(source)
    if file.name == KAGGLE_LABELS:
        with file.open(newline="") as lines:
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(lines)}
    import scipy.io  # costs half a second, and only this needs it

    truth, meta = _devkit_member(source, GROUND_TRUTH), _devkit_member(source, META)
    synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    wnids = dict(zip(np.atleast_1d(synsets["ILSVRC2012_ID"]), np.atleast_1d(synsets["WNID"]), strict=True))
    return {f"ILSVRC2012_val_{number:08d}": str(wnids[int(line)]) for number, line in enumerate(truth.split(), start=1)}


def _devkit_member(source: Path, name: str) -> bytes:
    unpacked = source / DEVKIT / name
    if unpacked.is_file():
        return unpacked.read_bytes()
    try:
        with tarfile.open(source / DEVKIT_TAR, "r:gz") as archive:
            member = archive.extractfile(f"{DEVKIT}/{name}")
            assert member is not None
            return member.read()
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
        raise SourceError(f"{source / DEVKIT_TAR}: cannot read {name} ({error}); fetch it again") from None


class _Window(io.RawIOBase):
    """`size` bytes at `offset` of a file, as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        super().__init__()
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        self._position = position + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._size - self._position, 0)
        self._file.seek(self._offset + self._position)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        return data
