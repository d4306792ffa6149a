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
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

VERSION = 2
PAGE_SIZE = 8 << 20
MODE_JPEG = 0
IMAGE_FIELD, LABEL_FIELD = ("image", 2), ("label", 1)
_COUNTS = [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8")]
HEADER = np.dtype([*_COUNTS, ("alloc_table_ptr", "<u8")], align=True)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
METADATA = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
METADATA_START = HEADER.itemsize + 2 * FIELD.itemsize


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


def write_beton(path: Path, samples: Iterable[Sample], capacity: int) -> int:
    """Write samples in order and flush them to disk; the file is the same for the same samples and capacity.

    Args:
        capacity: at least the number of samples; room for their metadata is kept before the first page.

    Returns:
        The number of samples.

    Raises:
        ValueError: a JPEG is larger than a page, or there are more samples than `capacity`.
    """
    metadata, allocations = np.zeros(capacity, METADATA), np.zeros(capacity, ALLOCATION)
    data_start = _data_start(capacity)
    end, count = data_start, 0
    with path.open("wb") as file:
        file.seek(data_start)
        for sample in samples:
            if count == capacity:
                raise ValueError(f"more than the {capacity} samples that room was kept for")
            ptr = _place(end, len(sample.jpeg))
            file.write(bytes(ptr - end))
            file.write(sample.jpeg)
            metadata[count] = ((MODE_JPEG, sample.width, sample.height, ptr), sample.label)
            allocations[count] = (count, ptr, len(sample.jpeg))
            end, count = ptr + len(sample.jpeg), count + 1
        table = _page_ceiling(end)
        file.write(bytes(table - end))
        file.write(allocations[:count].tobytes())
        file.seek(0)
        file.write(np.array((VERSION, 2, PAGE_SIZE, count, table), HEADER).tobytes())
        file.write(_field_descriptors().tobytes())
        file.write(metadata[:count].tobytes())
        file.flush()
        os.fsync(file.fileno())
    return count


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
    fields = np.zeros(2, FIELD)
    for field, (name, type_id) in zip(fields, (IMAGE_FIELD, LABEL_FIELD), strict=True):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    return fields


def _checked_header(path: Path, start: bytes, size: int) -> np.void:
    if len(start) < METADATA_START:
        raise BetonError(f"{path} is no beton: it has {len(start)} bytes, a header alone has {METADATA_START}")
    header = np.frombuffer(start[: HEADER.itemsize], HEADER)[0]
    if (header["version"], header["num_fields"]) != (VERSION, 2):
        raise BetonError(
            f"{path} is no beton of this project: it says version {header['version']} with {header['num_fields']} "
            f"fields, where version {VERSION} with the 2 fields image and label is read"
        )
    if start[HEADER.itemsize :] != _field_descriptors().tobytes():
        raise BetonError(f"{path} is no beton of this project: its fields are not image (JPEG) and label (integer)")
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
