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


@contextmanager
def exclusive(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Make `folder` and keep other processes that would write its data out.

    Args:
        waiting: called before waiting for another process that is at work; without it, that is an OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise OSError(f"{folder} is being prepared by another process; wait for it, or end it") from None
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def publish(folder: Path, finished: Path, manifest: Manifest, records: Iterable[ImageRecord]) -> None:
    """Move the betons in `finished` into `folder`, the manifest last: it never describes others."""
    write_whole(finished / IMAGES_LIST, "".join(f"{record.to_json()}\n" for record in records))
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in (*(split.file for split in manifest.splits.values()), IMAGES_LIST):
        (finished / name).replace(folder / name)
    sync_folder(folder)
    write_whole(folder / MANIFEST, manifest.to_json())
