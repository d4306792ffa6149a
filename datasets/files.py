"""Files that are whole or absent, whatever dies while they are written."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes `path`'s place, flushed to disk, when the body ends well."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)  # on a disk that is full, it would keep it full
        raise
    sync_folder(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content` by `whole_file`."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder last."""
    sync_file(folder)


def sync_file(path: Path) -> None:
    """Make what was written to a file last, by whomever."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
