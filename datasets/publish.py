"""Put finished files in place so that a reader sees all of a preparation or none of it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets.beton import IMAGES_LIST, MANIFEST, Manifest
from datasets.build import ImageRecord


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make `folder` and keep a second preparation of it out; OSError where one is under way."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise OSError(f"{folder} is being prepared by another process; wait for it, or end it") from None
    finally:
        os.close(descriptor)


def publish(folder: Path, finished: Path, manifest: Manifest, records: Iterable[ImageRecord]) -> None:
    """Move the betons in `finished` into `folder`, the manifest last: it never describes others."""
    write_synced(finished / IMAGES_LIST, "".join(f"{record.to_json()}\n" for record in records))
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in (*(split.file for split in manifest.splits.values()), IMAGES_LIST):
        (finished / name).replace(folder / name)
    sync_folder(folder)
    write_synced(folder / MANIFEST, manifest.to_json())


def write_synced(path: Path, text: str) -> None:
    """Write a file so that after a crash it is there as a whole or as it was before."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
