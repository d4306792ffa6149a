"""ILSVRC2012 in its usual layouts: the official tar files, read without unpacking, or unpacked folders.

An image has the same name in every layout (`train/WNID/FILE`, `val/WNID/FILE`), so the choice of images_per_class, the
order and the bytes of the betons are the same too.
"""

from __future__ import annotations

import csv
import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from datasets.files import TRAIN, VALIDATION, shown_name
from datasets.sources.folders import (
    BROKEN_LINK,
    class_folder_files,
    file_refs,
    list_folder,
    refuse_broken_links,
    skipped_kind,
)
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
LAYOUTS = f"""these layouts are read:
  train:      train/WNID/*.JPEG, train/WNID.tar, or {TRAIN_TAR} with WNID.tar or WNID/*.JPEG inside
  validation: val/WNID/*.JPEG, or {VALIDATION_TAR} or val/*.JPEG
              together with {DEVKIT_TAR}, {DEVKIT}/ or {KAGGLE_LABELS}
(train and val also under {KAGGLE_IMAGES})"""


class _Part(NamedTuple):
    """One split: names and states of the files that it depends on, how to list its images, and the folders it reads."""

    entries: list[tuple[str, os.stat_result]]
    read: Callable[[], list[ImageRef]]
    folders: Sequence[Path] = ()
    skipped: Counter[str] = Counter()  # noqa: RUF012


def scan_imagenet(source: Path, classes: Sequence[str], images_per_class: int | None, seed: int) -> Source:
    """Find the images of `classes` (WordNet ids) in any of the LAYOUTS.

    Raises:
        SourceError: training or validation images are missing; the message lists the layouts. `read_index` raises it
            for classes without images, listing all of their ids, and for truncated tar files.
    """
    if not source.is_dir():
        raise SourceError(f"data.source {source} is not a folder; give the folder with ILSVRC2012; {LAYOUTS}")
    train, validation = _train_part(source, classes), _validation_part(source, classes)
    missing = [name for name, part in (("training", train), ("validation", validation)) if part is None]
    if train is None or validation is None:
        raise SourceError(f"{source} has no ILSVRC2012 {' and no '.join(missing)} images; {LAYOUTS}")

    def read_index() -> ImageIndex:
        splits = {TRAIN: choose(train.read(), images_per_class, seed), VALIDATION: validation.read()}
        return checked(ImageIndex(list(classes), splits))

    state = state_of([*train.entries, *validation.entries])
    return Source(state, read_index, [*train.folders, *validation.folders], train.skipped + validation.skipped)


def _train_part(source: Path, classes: Sequence[str]) -> _Part | None:
    labels = {wnid: label for label, wnid in enumerate(classes)}
    for folder in (source / "train", source / KAGGLE_IMAGES / "train"):
        if folder.is_dir() and (present := _present(folder, classes)):
            return _folder_part("train", folder, present, classes)
        tars = [folder / f"{wnid}.tar" for wnid in classes if (folder / f"{wnid}.tar").is_file()]
        if tars:
            entries = [(f"train/{tar.name}", tar.stat()) for tar in tars]
            return _Part(entries, lambda tars=tars: [ref for tar in tars for ref in _class_tar(tar, labels[tar.stem])])
    tar = source / TRAIN_TAR
    return _Part([(TRAIN_TAR, tar.stat())], lambda: _train_tar(tar, labels)) if tar.is_file() else None


def _present(folder: Path, classes: Sequence[str]) -> list[str]:
    """Return the classes that have a folder in `folder`."""
    kinds = {entry.name: entry.kind for entry in list_folder(folder)}
    refuse_broken_links(folder, [wnid for wnid in classes if kinds.get(wnid) == BROKEN_LINK])
    return [wnid for wnid in classes if kinds.get(wnid) == "folder"]


def _validation_part(source: Path, classes: Sequence[str]) -> _Part | None:
    labels = {wnid: label for label, wnid in enumerate(classes)}
    for folder in (source / "val", source / KAGGLE_IMAGES / "val"):
        if not folder.is_dir():
            continue
        if present := _present(folder, classes):
            return _folder_part("val", folder, present, classes)
        if part := _flat_part(source, folder, labels):
            return part
    tar = source / VALIDATION_TAR
    if not tar.is_file():
        return None
    entries = [(VALIDATION_TAR, tar.stat()), _truth_entry(source)]
    return _Part(entries, lambda: _labeled_validation(_tar_members(tar), source, labels))


def _flat_part(source: Path, folder: Path, labels: dict[str, int]) -> _Part | None:
    """Find validation images directly in a folder. Return None if there are none."""
    skipped: Counter[str] = Counter()
    files = []
    for entry in list_folder(folder):
        if is_ignored(entry.name) or entry.kind == "folder":
            skipped[skipped_kind(entry)] += 1
        else:
            files.append(entry)
    if not files:
        return None
    refs = [ImageRef(shown_name(file.name), 0, file.path, 0, file.size) for file in files]
    entries = [(f"val/{file.name}", file.status) for file in files]
    return _Part([*entries, _truth_entry(source)], lambda: _labeled_validation(refs, source, labels), [folder], skipped)


def _folder_part(split: str, folder: Path, present: Sequence[str], classes: Sequence[str]) -> _Part:
    skipped: Counter[str] = Counter()
    files = class_folder_files(folder, present, skipped)
    refs = file_refs(files, classes, f"{split}/")
    entries = [(f"{split}/{file.name}", file.status) for file in files]
    return _Part(entries, lambda: refs, [folder / name for name in present], skipped)


def _class_tar(tar: Path, label: int) -> list[ImageRef]:
    return [ref._replace(name=f"train/{tar.stem}/{Path(ref.name).name}", label=label) for ref in _tar_members(tar)]


def _train_tar(tar: Path, labels: dict[str, int]) -> list[ImageRef]:
    """List the images in the training tar, which has either a tar file or a folder for each class."""
    refs, others = [], []
    for member in _tar_members(tar):
        path = Path(member.name)
        if path.suffix == ".tar" and path.stem in labels:
            wnid, images = path.stem, _tar_members(tar, member.offset, member.size)
        else:
            wnid, images = path.parent.name, [member]
        if wnid in labels:
            names = [f"train/{wnid}/{Path(image.name).name}" for image in images]
            refs += [image._replace(name=name, label=labels[wnid]) for name, image in zip(names, images, strict=True)]
        else:
            others.append(member.name)
    if not refs:
        found = f"it has {listed(others, limit=3)}" if others else "it is empty"
        raise SourceError(f"{tar} has no images of the {len(labels)} classes ({found}); {LAYOUTS}")
    return refs


def _tar_members(tar: Path, offset: int = 0, size: int | None = None) -> list[ImageRef]:
    """List the files of the tar at `offset` of a file, with their paths in the tar as names."""
    size = tar.stat().st_size - offset if size is None else size
    refs, links = [], []
    try:
        with tar.open("rb") as file, tarfile.open(fileobj=_Window(file, offset, size), mode="r:") as archive:
            for member in all_members(archive):
                if is_ignored(Path(member.name).name) or member.isdir():
                    continue
                if not member.isreg():
                    links.append(member.name)
                    continue
                name = shown_name(member.name)
                refs.append(ImageRef(name, 0, str(tar), offset + member.offset_data, member.size))
    except tarfile.TarError as error:
        raise SourceError(f"{tar} is not a complete, uncompressed tar file ({error}); download it again") from None
    if links:
        raise SourceError(f"{tar} has entries that are not files, such as links: {listed(links)}; unpack it")
    return refs


def all_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar.

    Raises:
        tarfile.ReadError: a header in the middle is damaged, or the tar has no end. `tarfile` itself would stop there
            without an error.
    """
    yield from archive
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"there is neither a valid header nor the end of the tar at byte {archive.offset:,}")


def _labeled_validation(refs: list[ImageRef], source: Path, labels: dict[str, int]) -> list[ImageRef]:
    """Give validation images, whose class is not in their name, the classes of the ground truth."""
    truth = _validation_truth(source)
    refs = [ref._replace(name=Path(ref.name).name) for ref in refs]
    unknown = [ref.name for ref in refs if Path(ref.name).stem not in truth]
    if unknown:
        raise SourceError(f"{_truth_file(source)} has no class for these validation images: {listed(unknown)}")
    named = [(truth[Path(ref.name).stem], ref) for ref in refs]
    return [ref._replace(name=f"val/{wnid}/{ref.name}", label=labels[wnid]) for wnid, ref in named if wnid in labels]


def _truth_file(source: Path) -> Path:
    for name in (KAGGLE_LABELS, DEVKIT_TAR, f"{DEVKIT}/{GROUND_TRUTH}"):
        if (source / name).is_file():
            return source / name
    raise SourceError(
        f"{source} has validation images without their classes; add {DEVKIT_TAR} or {KAGGLE_LABELS}, or sort them "
        "into val/WNID/"
    )


def _truth_entry(source: Path) -> tuple[str, os.stat_result]:
    file = _truth_file(source)
    return file.name, file.stat()


def _validation_truth(source: Path) -> dict[str, str]:
    """Read the WordNet id of every validation image, by its file name without suffix."""
    file = _truth_file(source)
    if file.name == KAGGLE_LABELS:
        return _kaggle_truth(file)
    import scipy.io  # takes half a second, and only this needs it

    truth, meta = _devkit_member(source, GROUND_TRUTH), _devkit_member(source, META)
    try:
        synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wnids = dict(zip(np.atleast_1d(synsets["ILSVRC2012_ID"]), np.atleast_1d(synsets["WNID"]), strict=True))
    except Exception as error:  # a parser of arbitrary bytes can fail in any way
        raise SourceError(f"{file}: cannot read {META} ({error}); download it again") from None
    by_image = {}
    for number, line in enumerate(truth.decode("utf-8-sig", "replace").split(), start=1):
        wnid = wnids.get(int(line)) if line.isdecimal() else None
        if wnid is None:
            raise SourceError(f"{file}: line {number} of {GROUND_TRUTH} is {line!r}, which is not a class number")
        by_image[f"ILSVRC2012_val_{number:08d}"] = str(wnid)
    return by_image


def _kaggle_truth(file: Path) -> dict[str, str]:
    """Read Kaggle's solution file: a row for each image, with its id and its boxes, each of which starts with the
    class."""
    by_image = {}
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
        rows = csv.DictReader(lines)
        try:
            for row in rows:
                image, boxes = row.get("ImageId"), row.get("PredictionString")
                if image is None or boxes is None:
                    columns = ", ".join(rows.fieldnames or [])
                    raise SourceError(
                        f"{file}, line {rows.line_num}: there is no ImageId or no PredictionString; the columns are "
                        f"{columns}; download the file again"
                    )
                if not boxes.split():
                    raise SourceError(
                        f"{file}, line {rows.line_num}: the PredictionString of {image} is empty, so its class is not "
                        "known; download the file again, or remove the line and the image"
                    )
                by_image[image] = boxes.split()[0]
        except csv.Error as error:
            raise SourceError(f"{file}, line {rows.line_num}: {error}; download the file again") from None
    return by_image


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
        raise SourceError(f"{source / DEVKIT_TAR}: cannot read {name} ({error}); download it again") from None


class _Window(io.RawIOBase):
    """A part of a file, `size` bytes at `offset`, as a separate file."""

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
