"""The .beton file format (FFCV's version 2): write it as a stream in sample order, read it back, check its structure.

The record layouts are stated here, and held equal to `ffcv.types` by a test, because importing ffcv costs seconds.
A file is: header, field descriptors, one metadata record a sample, padding, pages of JPEGs, allocation table.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

from datasets.files import sync_file

VERSION = 2
PAGE_SIZE = 8 << 20
MODE_JPEG = 0
# Names, and FFCV's numbers of what they hold: an RGB image, and integers. The checksum is the XXH64 of the JPEG.
FIELDS = (("image", 2), ("label", 1), ("checksum", 1))
_COUNTS = [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8")]
HEADER = np.dtype([*_COUNTS, ("alloc_table_ptr", "<u8")], align=True)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
METADATA = np.dtype([("image", IMAGE), ("label", "<i8"), ("checksum", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
METADATA_START = HEADER.itemsize + len(FIELDS) * FIELD.itemsize


class BetonError(ValueError):
    """A beton or its manifest is missing, incomplete, damaged, or not of the same making."""


class Sample(NamedTuple):
    """What one record holds: a JPEG with its size in pixels, and its label."""

    jpeg: bytes
    width: int
    height: int
    label: int


@dataclass(frozen=True)
class Layout:
    """Where everything is: `metadata` METADATA (N,), `allocations` ALLOCATION (N,), both in sample order."""

    metadata: NDArray
    allocations: NDArray
    size_bytes: int


class BetonWriter:
    """Writes a beton as a stream; the file is the same for the same samples and capacity.

    What an interrupted writer has left can be gone on with: `adopt` the samples that lie in the file already, then
    append the others.
    """

    def __init__(self, path: Path, capacity: int, *, go_on: bool = False):
        """Args:
        capacity: at least the number of samples; room for their metadata is kept before the first page.
        go_on: keep what the file, which exists, holds; it may be adopted from its first sample on.
        """
        self.path, self.count = path, 0
        self._metadata: NDArray = np.zeros(capacity, METADATA)
        self._allocations: NDArray = np.zeros(capacity, ALLOCATION)
        self._end = _data_start(capacity)
        self._file = path.open("r+b" if go_on else "w+b")
        self._file.seek(self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, sample: Sample) -> None:
        """Write the next sample.

        Raises:
            ValueError: its JPEG is larger than a page, or there are more samples than the capacity.
        """
        padding = self._next(sample.width, sample.height, sample.label, len(sample.jpeg))
        self._file.write(bytes(padding))
        self._file.write(sample.jpeg)
        self._note_checksum(sample.jpeg)

    def adopt(self, width: int, height: int, label: int, size: int) -> bytes:
        """Take the JPEG of `size` bytes, or what lies in its place, for the next sample's, and return it."""
        padding = self._next(width, height, label, size)
        self._file.seek(padding, os.SEEK_CUR)
        jpeg = self._file.read(size)
        self._note_checksum(jpeg)
        return jpeg

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()

    def finish(self) -> None:
        """Write the tables and close the file; it is not forced to disk."""
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
        """Note the next sample; returns how many bytes are left free before it."""
        if self.count == len(self._metadata):
            raise ValueError(f"more than the {self.count} samples that room was kept for")
        ptr = _place(self._end, size)
        padding = ptr - self._end
        self._metadata[self.count] = ((MODE_JPEG, width, height, ptr), label, 0)
        self._allocations[self.count] = (self.count, ptr, size)
        self._end, self.count = ptr + size, self.count + 1
        return padding


def write_beton(path: Path, samples: Iterable[Sample], capacity: int) -> int:
    """Write samples in order with a BetonWriter and force them to disk; returns their number."""
    with BetonWriter(path, capacity) as writer:
        for sample in samples:
            writer.append(sample)
        writer.finish()
    sync_file(path)
    return writer.count


def read_layout(path: Path) -> Layout:
    """Read and check everything of a beton but its JPEGs.

    Raises:
        BetonError: the file is missing, cut short, of another layout, or its tables contradict each other.
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
    return Layout(metadata, allocations, size)


def read_jpeg(beton: Path, index: int) -> bytes:
    """The JPEG of the sample at `index`, as it is stored.

    Raises:
        BetonError: not a sound beton.
        IndexError: it has no such sample.
    """
    with beton.open("rb") as file:
        start = file.read(METADATA_START)
        header = _checked_header(beton, start, beton.stat().st_size)
        if not 0 <= index < header["num_samples"]:
            raise IndexError(f"{beton} has samples 0 to {int(header['num_samples']) - 1}, not {index}")
        file.seek(int(header["alloc_table_ptr"]) + index * ALLOCATION.itemsize)
        allocation = np.frombuffer(file.read(ALLOCATION.itemsize), ALLOCATION)[0]
        file.seek(int(allocation["ptr"]))
        return file.read(int(allocation["size"]))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(jpeg: bytes) -> int:
    """The XXH64 of a JPEG, as the signed integer that a beton holds."""
    return np.uint64(xxh64_intdigest(jpeg)).astype(np.int64).item()


def _page_ceiling(position: int) -> int:
    return -(-position // PAGE_SIZE) * PAGE_SIZE


def _data_start(capacity: int) -> int:
    return _page_ceiling(METADATA_START + capacity * METADATA.itemsize)


def _place(end: int, size: int) -> int:
    """Where `size` bytes go after `end`: there, or at the next page where they would straddle two."""
    if size > PAGE_SIZE:
        raise ValueError(f"a JPEG of {size:,} bytes is larger than a page of {PAGE_SIZE:,}")
    page_end = _page_ceiling(end + 1)
    return end if end + size <= page_end else page_end


def _field_descriptors() -> NDArray:
    fields = np.zeros(len(FIELDS), FIELD)
    for field, (name, type_id) in zip(fields, FIELDS, strict=True):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    return fields


def _checked_header(path: Path, start: bytes, size: int) -> np.void:
    if len(start) < METADATA_START:
        raise BetonError(f"{path} is no beton: it has {len(start)} bytes, a header alone has {METADATA_START}")
    header = np.frombuffer(start[: HEADER.itemsize], HEADER)[0]
    names = ", ".join(name for name, _ in FIELDS)
    if (header["version"], header["num_fields"]) != (VERSION, len(FIELDS)):
        raise BetonError(
            f"{path} is no beton of this version of the project: it says layout {header['version']} with "
            f"{header['num_fields']} fields, where layout {VERSION} with {len(FIELDS)} fields ({names}) is read"
        )
    if start[HEADER.itemsize :] != _field_descriptors().tobytes():
        raise BetonError(f"{path} is no beton of this version of the project: its fields are not {names}")
    if header["page_size"] != PAGE_SIZE:
        raise BetonError(f"{path} is damaged: page size {header['page_size']}, not {PAGE_SIZE}")
    expected = int(header["alloc_table_ptr"]) + int(header["num_samples"]) * ALLOCATION.itemsize
    if size != expected:
        raise BetonError(f"{path} is cut short or damaged: {size:,} bytes, its header says {expected:,}")
    return header


def _contradictions(metadata: NDArray, allocations: NDArray, table: int) -> Iterator[str]:
    """What cannot be true of a beton that `write_beton` has written."""
    if len(metadata) != len(allocations):
        yield f"{len(metadata)} samples, but {len(allocations)} allocations"
        return
    image = metadata["image"]
    ptrs, sizes = allocations["ptr"].astype(np.int64), allocations["size"].astype(np.int64)
    ends = ptrs + sizes
    # Every image lies right behind the one before it, or at the next page: its place follows from the sizes.
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
        "an image does not lie where the one before it ends": misplaced,
    }
    for problem, wrong_N in checks.items():
        if wrong_N.any():
            yield f"{problem} (sample {int(np.argmax(wrong_N))})"
