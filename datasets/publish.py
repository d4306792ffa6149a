"""Put finished files in place so that a reader sees all of a preparation or none of it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets.beton import IMAGES_LIST, MANIFEST, Manifest
from datasets.build import ImageRecord
from datasets.files import sync_folder, write_whole

LOCK = ".lock"
"""file in a folder: whoever holds its lock writes there"""


@contextmanager
def exclusive(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Make `folder` and keep other processes that would write its data out.

    Args:
        waiting: called before waiting for another process that is at work; without it, that is an OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    while True:
        # A file that is open for writing: its lock holds on all nodes of an NFS, a folder's lock on its own node alone.
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _wait_for(descriptor, folder, waiting)
            if not _is(descriptor, lock):  # whoever had it has removed it; another one may have the new one
                waiting = waiting and _told_already
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _wait_for(descriptor: int, folder: Path, waiting: Callable[[], None] | None) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            raise OSError(f"{folder} is being prepared by another process; wait for it, or end it") from None
        waiting()
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _told_already() -> None:
    """What is called before waiting once more."""


def _is(descriptor: int, path: Path) -> bool:
    """Whether a path still is the file that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def publish(folder: Path, finished: Path, manifest: Manifest, records: Iterable[ImageRecord]) -> None:
    """Move the betons in `finished` into `folder`, the manifest last: it never describes others."""
    write_whole(finished / IMAGES_LIST, "".join(f"{record.to_json()}\n" for record in records))
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in (*(split.file for split in manifest.splits.values()), IMAGES_LIST):
        (finished / name).replace(folder / name)
    sync_folder(folder)
    write_whole(folder / MANIFEST, manifest.to_json())
