"""A prepared folder: .beton files in FFCV's format, and a manifest with their contents and hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

from datasets import turbojpeg
from datasets.files import SPLITS, DataError

VERSION = 2
PAGE_SIZE = 8 << 20
MODE_JPEG = 0
# Field names with FFCV's type numbers: an RGB image and two integers. The checksum is the XXH64 of the JPEG.
FIELDS = (("image", 2), ("label", 1), ("checksum", 1))
_COUNTS = [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8")]
HEADER = np.dtype([*_COUNTS, ("alloc_table_ptr", "<u8")], align=True)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
METADATA = np.dtype([("image", IMAGE), ("label", "<i8"), ("checksum", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
METADATA_START = HEADER.itemsize + len(FIELDS) * FIELD.itemsize

TRAIN, VALIDATION = SPLITS
FORMAT = 2
MANIFEST = "manifest.json"
IMAGES_LIST = "images.jsonl"
SAMPLED_IMAGES = 32


class BetonError(DataError):
    """A beton or its manifest is missing, incomplete or damaged, or the two do not belong together."""


class Sample(NamedTuple):
    """One stored image: a JPEG with its size in pixels, and its label."""

    jpeg: bytes
    width: int
    height: int
    label: int


@dataclass(frozen=True)
class Layout:
    """The tables of a beton in sample order: `metadata` is METADATA (N,), and `allocations` is ALLOCATION (N,)."""

    metadata: NDArray
    allocations: NDArray


class BetonWriter:
    """Write a beton as a stream. The same samples and capacity give the same file.

    To resume what an interrupted writer left, `adopt` the samples that the file already contains, then append the
    others.

    Args:
        capacity: at least the number of samples; room for their metadata is reserved before the first page.
        resume: keep the content of the existing file, so that its samples can be adopted, starting with the first.
    """

    def __init__(self, path: Path, capacity: int, *, resume: bool = False):
        self.path, self.count = path, 0
        self._metadata: NDArray = np.zeros(capacity, METADATA)
        self._allocations: NDArray = np.zeros(capacity, ALLOCATION)
        self._end = _data_start(capacity)
        self._file = path.open("r+b" if resume else "w+b")
        self._file.seek(self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, sample: Sample) -> None:
        """Write the next sample.

        Raises:
            ValueError: the JPEG is larger than a page, or there are more samples than the capacity.
        """
        padding = self._next(sample.width, sample.height, sample.label, len(sample.jpeg))
        self._file.write(bytes(padding))
        self._file.write(sample.jpeg)
        self._note_checksum(sample.jpeg)

    def adopt(self, width: int, height: int, label: int, size: int) -> bytes:
        """Keep the next `size` bytes of the file as the next sample's JPEG. Return them, unchecked."""
        padding = self._next(width, height, label, size)
        self._file.seek(padding, os.SEEK_CUR)
        jpeg = self._file.read(size)
        self._note_checksum(jpeg)
        return jpeg

    def flush(self) -> None:
        """Write all buffered data to the operating system."""
        self._file.flush()

    def finish(self) -> None:
        """Write the tables and close the file, without syncing it to disk."""
        file, table = self._file, _page_ceiling(self._end)
        file.seek(self._end)
        file.write(bytes(table - self._end))
        file.write(self._allocations[: self.count].tobytes())
        file.truncate()
        file.seek(0)
        file.write(np.array((VERSION, len(FIELDS), PAGE_SIZE, self.count, table), HEADER).tobytes())
        file.write(_field_descriptors().tobytes())
        file.write(self._metadata.tobytes())
        file.close()

    def _note_checksum(self, jpeg: bytes) -> None:
        self._metadata["checksum"][self.count - 1] = checksum(jpeg)

    def _next(self, width: int, height: int, label: int, size: int) -> int:
        """Add the next sample to the tables and return the number of padding bytes before it."""
        if self.count == len(self._metadata):
            raise ValueError(f"the beton has room for {self.count} samples; give a larger capacity")
        ptr = _place(self._end, size)
        padding = ptr - self._end
        self._metadata[self.count] = ((MODE_JPEG, width, height, ptr), label, 0)
        self._allocations[self.count] = (self.count, ptr, size)
        self._end, self.count = ptr + size, self.count + 1
        return padding


def read_layout(path: Path) -> Layout:
    """Read and check the header and tables of a beton, but not its JPEGs.

    Raises:
        BetonError: the file is missing, cut short or of another layout, or its tables contradict each other.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(METADATA_START)
            header = _checked_header(path, start, size)
            metadata = np.frombuffer(file.read(METADATA.itemsize * int(header["num_samples"])), METADATA)
            file.seek(int(header["alloc_table_ptr"]))
            allocations = np.frombuffer(file.read(), ALLOCATION)
    except FileNotFoundError:
        raise BetonError(f"{path} does not exist") from None
    for problem in _contradictions(metadata, allocations, int(header["alloc_table_ptr"])):
        raise BetonError(f"{path} is damaged: {problem}")
    return Layout(metadata, allocations)


def read_jpeg(beton: Path, index: int) -> bytes:
    """Return the stored JPEG of the sample at `index`.

    Raises:
        BetonError: the file is not a valid beton.
        IndexError: there is no such sample.
    """
    with beton.open("rb") as file:
        start = file.read(METADATA_START)
        header = _checked_header(beton, start, beton.stat().st_size)
        if not 0 <= index < header["num_samples"]:
            raise IndexError(f"{beton} has no sample {index}; give 0 to {int(header['num_samples']) - 1}")
        file.seek(int(header["alloc_table_ptr"]) + index * ALLOCATION.itemsize)
        allocation = np.frombuffer(file.read(ALLOCATION.itemsize), ALLOCATION)[0]
        file.seek(int(allocation["ptr"]))
        return file.read(int(allocation["size"]))


def crop_extents(beton: Path, crop: float) -> NDArray[np.float64]:
    """Return the side of each image's center crop, in pixels of the stored image, (N,).

    Args:
        crop: side of the crop, as a fraction of the image's shorter side.

    Raises:
        BetonError: the file is missing or not a valid beton.
    """
    image = read_layout(beton).metadata["image"]
    return np.minimum(image["width"], image["height"]) * crop


def enlarged_shares(beton: Path, sides: Sequence[int], crop: float) -> list[float]:
    """Return, for each of `sides` (pixels), the share of the images whose center crop is smaller than the side.

    Such an image is enlarged: at this resolution the network sees no more detail than at a smaller one. Arguments and
    errors are those of `crop_extents`.
    """
    extents_N = crop_extents(beton, crop)
    return [float(np.mean(extents_N < side)) for side in sides]


def enlarged_text(shares: Sequence[float], sides: Sequence[int]) -> str:
    """Format `enlarged_shares`, such as `60.0 % at 64 px, 20.0 % at 32 px`."""
    return ", ".join(f"{100 * share:.1f} % at {side} px" for share, side in zip(shares, sides, strict=True))


def split_keys(folder: Path) -> NDArray[np.uint64]:
    """Return a key for each validation image, (N,), in beton order. Images with equal keys stay together in a split.

    The key is the image's group with data.group_by, otherwise the checksum of its bytes. Errors are those of
    `load_manifest` and `crop_extents`.
    """
    if groups := load_manifest(folder).splits[VALIDATION].groups:
        return np.asarray(groups, np.uint64)
    return read_layout(beton_path(folder, VALIDATION)).metadata["checksum"].view(np.uint64)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(jpeg: bytes) -> int:
    """Return the XXH64 of a JPEG as the signed integer that a beton stores."""
    return np.uint64(xxh64_intdigest(jpeg)).astype(np.int64).item()


def _page_ceiling(position: int) -> int:
    return -(-position // PAGE_SIZE) * PAGE_SIZE


def _data_start(capacity: int) -> int:
    return _page_ceiling(METADATA_START + capacity * METADATA.itemsize)


def _place(end: int, size: int) -> int:
    """Return where `size` bytes go after `end`: directly after it, or at the next page if they would span two pages."""
    if size > PAGE_SIZE:
        raise ValueError(f"a JPEG of {size:,} bytes is larger than a page; give at most {PAGE_SIZE:,} bytes")
    page_end = _page_ceiling(end + 1)
    return end if end + size <= page_end else page_end


def _field_descriptors() -> NDArray:
    fields = np.zeros(len(FIELDS), FIELD)
    for described, (name, type_id) in zip(fields, FIELDS, strict=True):
        described["type_id"] = type_id
        described["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    return fields


def _checked_header(path: Path, start: bytes, size: int) -> np.void:
    if len(start) < METADATA_START:
        raise BetonError(f"{path} is not a beton: it has {len(start)} bytes, but a header has {METADATA_START}")
    header = np.frombuffer(start[: HEADER.itemsize], HEADER)[0]
    names = ", ".join(name for name, _ in FIELDS)
    if (header["version"], header["num_fields"]) != (VERSION, len(FIELDS)):
        raise BetonError(
            f"{path} cannot be read: it has layout {header['version']} with {header['num_fields']} fields; "
            f"this version reads layout {VERSION} with {len(FIELDS)} fields ({names})"
        )
    if start[HEADER.itemsize :] != _field_descriptors().tobytes():
        raise BetonError(f"{path} cannot be read: its fields are not {names}")
    if header["page_size"] != PAGE_SIZE:
        raise BetonError(f"{path} is damaged: its page size is {header['page_size']} bytes, not {PAGE_SIZE}")
    expected = int(header["alloc_table_ptr"]) + int(header["num_samples"]) * ALLOCATION.itemsize
    if size != expected:
        raise BetonError(f"{path} is cut short or damaged: it has {size:,} bytes, but its header says {expected:,}")
    return header


def _contradictions(metadata: NDArray, allocations: NDArray, table: int) -> Iterator[str]:
    """Yield everything in the tables that `BetonWriter` never writes."""
    if len(metadata) != len(allocations):
        yield f"{len(metadata)} samples, but {len(allocations)} allocations"
        return
    image = metadata["image"]
    ptrs, sizes = allocations["ptr"].astype(np.int64), allocations["size"].astype(np.int64)
    ends = ptrs + sizes
    # Every image starts right after the one before it, or at the next page, so the sizes alone give the positions.
    page_ends = -(-(ends + 1) // PAGE_SIZE) * PAGE_SIZE
    follows = ptrs[1:] == np.where(ends[:-1] + sizes[1:] <= page_ends[:-1], ends[:-1], page_ends[:-1])
    misplaced = np.concatenate([ptrs[:1] % PAGE_SIZE != 0, ~follows])
    checks = {
        "the image mode is not JPEG": image["mode"] != MODE_JPEG,
        "an image has no width or height": (image["width"] == 0) | (image["height"] == 0),
        "the label is negative": metadata["label"] < 0,
        "the allocation table is out of order": allocations["sample_id"] != np.arange(len(allocations)),
        "metadata and allocation table disagree": image["data_ptr"] != allocations["ptr"],
        "an image is empty or larger than a page": (sizes < 1) | (sizes > PAGE_SIZE),
        "an image lies outside the data": (ptrs < METADATA_START) | (ends > table),
        "an image does not start where the one before it ends": misplaced,
    }
    for problem, wrong_N in checks.items():
        if wrong_N.any():
            yield f"{problem} (sample {int(np.argmax(wrong_N))})"


@dataclass(frozen=True)
class Split:
    """One beton of a prepared folder.

    `class_counts` are the numbers of samples by label. `attributes` have one value per sample in beton order, such as
    the glyph height. `groups` has the number of each sample's group; it is empty without data.group_by.
    """

    file: str
    count: int
    class_counts: list[int]
    size_bytes: int
    sha256: str
    attributes: dict[str, list[float]]
    groups: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Manifest:
    """The description of a prepared folder.

    Attributes:
        classes: class names by label.
        settings: everything that the betons depend on besides the images themselves.
        mean, std: mean and standard deviation of the training pixels by channel, on a scale of 0 to 1. With more than a
            few hundred images, only an evenly spread sample is measured (prepare/convert.py), because reading every
            pixel would double the preparation time. The mean is then accurate to about 0.01.
        source_digest: SHA-256 of the names and contents of all source images.
        skipped: {path, reason} of every bad image that was left out.
        source_state: digest of names, sizes and modification times, for a quick check that nothing changed.
    """

    format: int
    dataset: str
    classes: list[str]
    settings: dict[str, Any]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source_digest: str
    skipped: list[dict[str, str]]
    versions: dict[str, str]
    splits: dict[str, Split]
    licence: str = ""
    source_state: str = field(default="", compare=False)

    @property
    def digest(self) -> str:
        """The identity of the prepared data: 32 hexadecimal digits of a SHA-256 over classes and betons."""
        identity = [self.dataset, self.classes, *(self.splits[name].sha256 for name in sorted(self.splits))]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    def to_json(self) -> str:
        """Return JSON with one key per line and each list on one line, which is readable even with thousands of
        samples."""
        return _to_json(asdict(self)) + "\n"


def beton_path(folder: Path, split: str) -> Path:
    """Return the path of a split's beton in a prepared folder."""
    return Path(folder) / f"{split}.beton"


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a prepared folder.

    Raises:
        BetonError: the folder is not prepared, its preparation was interrupted, or the manifest is damaged.
    """
    path = Path(folder) / MANIFEST
    prepare = "run `python -m jobs.prepare --config CONFIG`"
    try:
        text = path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        if any(beton_path(folder, split).exists() for split in SPLITS):
            raise BetonError(
                f"{folder} has betons but no {MANIFEST}: its preparation was interrupted, or the file was removed; "
                f"{prepare} --force"
            ) from None
        raise BetonError(f"{folder} has no prepared data ({MANIFEST} is missing); {prepare}") from None
    return parse_manifest(text, str(path))


def parse_manifest(text: str, origin: str) -> Manifest:
    """Parse the manifest in `text`. Raise BetonError, naming its `origin`, if it is damaged or of another format."""
    prepare = "prepare the data again: `python -m jobs.prepare --config CONFIG --force`"
    try:
        tree = json.loads(text)
        found = tree["format"]
        if found != FORMAT:
            raise BetonError(f"{origin} has format {found}, but this version reads format {FORMAT}; {prepare}")
        splits = {name: Split(**split) for name, split in tree.pop("splits").items()}
        mean, std = tuple(tree.pop("mean")), tuple(tree.pop("std"))
        manifest = Manifest(**tree, mean=mean, std=std, splits=splits)
        missing = [name for name in SPLITS if name not in splits]
        unknown = [name for name in splits if name not in SPLITS]
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise BetonError(f"{origin} is damaged ({type(error).__name__}: {error}); {prepare}") from None
    if missing:
        raise BetonError(f"{origin} is damaged: it lacks the split {' and '.join(missing)}; {prepare}")
    if unknown:
        raise BetonError(f"{origin} is damaged: it has the unknown split {' and '.join(map(repr, unknown))}; {prepare}")
    return manifest


def verify_betons(folder: Path, full: bool = False, splits: Sequence[str] = SPLITS) -> Manifest:
    """Check that the betons of a prepared folder match its manifest.

    Args:
        full: compare the SHA-256 of every byte; otherwise sizes, headers, tables, counts, labels and a few whole
            images.
        splits: the betons to check; a downloaded folder may have only some of them.

    Raises:
        BetonError: names every beton that is missing, cut short, damaged or from another preparation.
    """
    manifest = load_manifest(folder)
    problems = []
    for split in (manifest.splits[name] for name in splits):
        try:
            _verify_split(Path(folder) / split.file, split, len(manifest.classes), full)
        except BetonError as error:
            problems.append(str(error))
    if problems:
        problems.append("prepare the data again: `python -m jobs.prepare --config CONFIG --force`")
        raise BetonError("\n".join(problems))
    return manifest


def _to_json(value: Any, indent: str = "") -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    inner = indent + "  "
    lines = (f"{inner}{json.dumps(key)}: {_to_json(item, inner)}" for key, item in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _verify_split(path: Path, split: Split, num_classes: int, full: bool) -> None:
    if path.exists() and path.stat().st_size != split.size_bytes:
        raise BetonError(f"{path} has {path.stat().st_size:,} bytes, but its manifest says {split.size_bytes:,}")
    layout = read_layout(path)
    _verify_labels(path, layout, split, num_classes)
    _verify_some_images(path, layout)
    if full and (found := file_sha256(path)) != split.sha256:
        raise BetonError(f"{path} is damaged: its SHA-256 is {found}, but its manifest says {split.sha256}")


def _verify_labels(path: Path, layout: Layout, split: Split, num_classes: int) -> None:
    labels_N = layout.metadata["label"]
    if len(labels_N) != split.count:
        raise BetonError(f"{path} has {len(labels_N)} samples, but its manifest says {split.count}")
    if labels_N.max() >= num_classes:
        raise BetonError(f"{path} is damaged: it has label {labels_N.max()}, but there are {num_classes} classes")
    if np.bincount(labels_N, minlength=num_classes).tolist() != split.class_counts:
        raise BetonError(f"{path} is from another preparation: its class counts differ from its manifest's")


def _verify_some_images(path: Path, layout: Layout) -> None:
    """Check the checksums and pixel sizes of a few evenly spread images."""
    count = len(layout.metadata)
    with path.open("rb") as file:
        for index in np.unique(np.linspace(0, count - 1, min(count, SAMPLED_IMAGES)).astype(int)):
            file.seek(int(layout.allocations["ptr"][index]))
            jpeg, image = file.read(int(layout.allocations["size"][index])), layout.metadata["image"][index]
            if checksum(jpeg) != layout.metadata["checksum"][index]:
                raise BetonError(f"{path} is damaged: sample {index} does not match its checksum")
            try:
                header = turbojpeg.read_header(jpeg)
            except turbojpeg.JpegError as error:
                raise BetonError(f"{path} is damaged: sample {index} is not a JPEG ({error})") from None
            if (header.width, header.height) != (image["width"], image["height"]):
                raise BetonError(
                    f"{path} is damaged: sample {index} has {header.width}x{header.height} pixels, "
                    f"but its record says {image['width']}x{image['height']}"
                )
