"""Write complete files, lock folders, name splits, and show file names, sizes and changed values as text."""

from __future__ import annotations

import errno
import fcntl
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)


def shown_name(name: str | os.PathLike[str]) -> str:
    r"""Return a file name or path as valid Unicode text on one line.

    This is the form in which names are printed and stored (class names, images.jsonl, messages). Bytes that are not
    UTF-8 become `\xNN`, and control characters and line separators their Python escapes. Other names stay as they are.
    Two names can have the same form, so files are opened by their original names.
    """
    text = valid_text(os.fspath(name))
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char
        for char in text
    )


def shown_bytes(num_bytes: float) -> str:
    """Return a size in bytes as text, in GB (1e9 bytes) or, below 1 GB, in MB (1e6 bytes)."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def valid_text(text: str) -> str:
    r"""Return a text with every byte that is not UTF-8 (a surrogate, as Python reads it from disk) as `\xNN`."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class DataError(ValueError):
    """An error in data or names that the user can fix; the message is valid Unicode text."""

    def __init__(self, message: str):
        super().__init__(valid_text(message))


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing. If the `with` block ends without an error, sync the file to disk and rename it to
    `path`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)  # on a full disk, it would use the remaining space
        raise
    sync_folder(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content` with `whole_file`."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Sync the renames in a folder to disk."""
    sync_file(folder)


def sync_file(path: Path) -> None:
    """Sync a file to disk, including what other processes wrote to it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_within(inner: Path, outer: Path) -> bool:
    """Return whether `inner` is `outer` or inside it, after following links; neither has to exist."""
    inner, outer = inner.resolve(), outer.resolve()
    if inner.is_relative_to(outer):
        return True
    # The same folder can have two paths, for example by a bind mount.
    return outer.exists() and any(path.exists() and path.samefile(outer) for path in (inner, *inner.parents))


def overlap(one: Path, other: Path) -> str:
    """Return how folder `one` relates to folder `other`: "is", "is inside", "contains", or "" if they are separate.

    Use this, before anything is created, to refuse a folder for results (data.folder, runs, MLflow's files, uploads)
    inside a folder that is read, and the reverse. Links are followed, and neither folder has to exist.
    """
    inside, contains = is_within(one, other), is_within(other, one)
    return "is" if inside and contains else "is inside" if inside else "contains" if contains else ""


LOCK = ".lock"
"""The file in a folder whose lock gives the right to write there."""


@contextmanager
def exclusive(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Create `folder`, and lock out other processes that would write its data.

    Args:
        waiting: called before waiting for another process. Without it, a locked folder raises OSError.

    Raises:
        OSError: another process has the lock, or the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    while True:
        # Lock a file opened for writing: on NFS such a lock holds on all nodes, a folder's lock only on its own node.
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not lock_file(descriptor, lock):
                if waiting is None:
                    raise OSError(f"{shown_name(folder)} is being prepared by another process; wait for it, or stop it")
                waiting()
                waiting = _no_message
                lock_file(descriptor, lock, wait=True)
            if not _is(descriptor, lock):  # its last owner removed it, and another process may have created a new one
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def lock_file(descriptor: int, path: Path, *, wait: bool = False) -> bool:
    """Lock an open file until it is closed. Return False if another process has the lock and `wait` is false.

    Args:
        path: the file's path, for messages.

    Raises:
        OSError: the file system of `path` has no locks, or they do not work.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            return False
        kind, mount = _file_system(path)
        raise OSError(
            error.errno,
            f"{shown_name(path.parent)} cannot be locked ({os.strerror(error.errno or 0)}): the file system {kind} at "
            f"{mount} has no working file locks; choose a folder on another file system, or mount this one with locks "
            "(NFS: start its lock service, or mount it with local_lock=flock if one machine alone writes to it)",
        ) from None
    return True


def _file_system(path: Path) -> tuple[str, str]:
    """Return the type and the mount point of the file system of a path."""
    mounts = {}
    for line in Path("/proc/self/mounts").read_bytes().splitlines():
        _, mount, kind, *_ = line.split()
        unescaped = mount.decode("unicode_escape").encode("latin-1")  # a space is written as \040
        mounts[os.fsdecode(unescaped)] = kind.decode()  # a later mount hides an earlier one
    path = path.resolve()
    mount = next(str(parent) for parent in (path, *path.parents) if str(parent) in mounts or parent == parent.parent)
    return mounts.get(mount, "unknown"), shown_name(mount)


def _no_message() -> None:
    """Do nothing. This replaces `waiting` once it has been called."""


def _is(descriptor: int, path: Path) -> bool:
    """Return whether a path is still the file that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def value_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return `key: old -> new` for every dotted key in which two trees of mappings differ."""
    old, new = dict(flattened(before)), dict(flattened(after))
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)
    ]


def flattened(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every value in a tree of mappings."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flattened(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree
