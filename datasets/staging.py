"""Prepared folders at remote addresses: download them once for each node, and upload them.

A downloaded folder also has the file STAGED with the SHA-256 of the downloaded manifest. It distinguishes a downloaded
folder, which may be replaced, from one that was prepared here, which is never replaced.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from datasets.beton import (
    MANIFEST,
    SPLITS,
    BetonError,
    Manifest,
    Split,
    beton_path,
    file_sha256,
    load_manifest,
    parse_manifest,
    verify_betons,
)
from datasets.files import exclusive, shown_bytes, shown_name, sync_folder, write_whole
from datasets.remote import CHUNK_BYTES, RemoteFolder, open_remote

STAGED = "staged.txt"
SECONDS_BETWEEN_LINES = 5.0

Show = Callable[[str], None]


def remote_manifest(uri: str) -> Manifest:
    """Read the manifest of the prepared folder at an address.

    Raises:
        BetonError: there is no prepared folder, or its manifest is damaged.
        ValueError, OSError: as in `open_remote`.
    """
    return _read_manifest(open_remote(uri))[1]


def download_dataset(uri: str, folder: Path, *, splits: Sequence[str] = SPLITS, show: Show = print) -> Manifest:
    """Download the betons of `splits` from an address into `folder`, unless they are already there.

    One process downloads, and others wait for it and use its files. A beton gets its final name after its SHA-256 has
    been compared, and the manifest is written last. An interrupted download resumes. Data that has changed at the
    address is downloaded again.

    Args:
        show: called with a line about each step and, every few seconds, about the progress.

    Raises:
        BetonError: there is no prepared folder, the data does not match its manifest (it changed during the download,
            or is damaged), or `folder` has other data that was prepared here.
        OSError: there is not enough space, or as in `open_remote`.
    """
    folder, remote = Path(folder), open_remote(uri)
    _, manifest = _read_manifest(remote)
    if held := _held(folder, manifest, splits):
        return held
    with exclusive(
        folder, waiting=lambda: show(f"{shown_name(folder)}: waiting for another process that writes to it")
    ):
        text, manifest = _read_manifest(remote)  # read it again, because it may have changed during the wait
        if held := _held(folder, manifest, splits):
            return held
        _require_replaceable(folder, manifest, remote)
        _download_missing(remote, folder, text, manifest, splits, show)
        return verify_betons(folder, splits=splits)


def upload(folder: Path, uri: str, *, show: Show = print) -> Manifest:
    """Upload a prepared folder: first the betons, then the manifest, which never exists without them.

    Raises:
        BetonError: the folder is not prepared or is damaged, or other data is at the address.
        ValueError, OSError: as in `open_remote`.
    """
    folder, remote = Path(folder), open_remote(uri)
    manifest = verify_betons(folder)
    splits = list(manifest.splits.values())
    if (content := remote.read(MANIFEST)) is not None:
        _, there = _parsed(content, remote)
        if there.digest != manifest.digest:
            raise BetonError(
                f"{remote} has other data (digest {there.digest}) than {folder} (digest {manifest.digest}); "
                "upload to another address, or remove the data there"
            )
        if all(remote.size(split.file) == split.size_bytes for split in splits):
            show(f"{remote} already has this data; nothing to do")
            return manifest
    progress = _Progress(f"uploading {shown_name(folder)}", sum(split.size_bytes for split in splits), show)
    for split in splits:
        sha256 = hashlib.sha256()
        remote.write(split.file, _read_file(folder / split.file, sha256, progress))
        if sha256.hexdigest() != split.sha256:
            raise BetonError(
                f"{folder / split.file} is damaged: its SHA-256 is {sha256.hexdigest()}, but its manifest says "
                f"{split.sha256}; prepare the data again: `python -m jobs.prepare --config CONFIG --force`"
            )
    remote.write(MANIFEST, [(folder / MANIFEST).read_bytes()])
    progress.finish(f"uploaded {shown_name(folder)} to {remote}")
    return manifest


def _read_manifest(remote: RemoteFolder) -> tuple[str, Manifest]:
    content = remote.read(MANIFEST)
    if content is None:
        raise BetonError(
            f"{remote} has no prepared data ({MANIFEST} is missing): check the address, wait if it is still being "
            "uploaded, or upload it with `python -m jobs.prepare --config CONFIG --upload ADDRESS`"
        )
    return _parsed(content, remote)


def _parsed(content: bytes, remote: RemoteFolder) -> tuple[str, Manifest]:
    text = content.decode(errors="replace")
    manifest = parse_manifest(text, f"{MANIFEST} of {remote}")
    # A downloaded file name must not point outside of the folder.
    wrong = [split.file for name, split in manifest.splits.items() if split.file != beton_path(Path(), name).name]
    if wrong:
        raise BetonError(f"{MANIFEST} of {remote} is damaged: it names the betons {', '.join(map(repr, wrong))}")
    return text, manifest


def _held(folder: Path, manifest: Manifest, splits: Sequence[str]) -> Manifest | None:
    """Return the folder's manifest if it has this data undamaged, otherwise None.

    No lock is needed, because the manifest is written last.
    """
    try:
        held = verify_betons(folder, splits=splits)
    except BetonError:
        return None
    prepared_here = held.digest == manifest.digest and not _is_staged(folder)
    return held if held == manifest or prepared_here else None


def _is_staged(folder: Path) -> bool:
    """Return whether the folder was downloaded: its manifest is the downloaded one, or is not written yet."""
    manifest, record = folder / MANIFEST, folder / STAGED
    if not record.exists():
        return False
    return not manifest.exists() or record.read_text().split()[:1] == [file_sha256(manifest)]


def _require_replaceable(folder: Path, manifest: Manifest, remote: RemoteFolder) -> None:
    """Raise BetonError if the folder has data that was prepared here."""
    files = [path for path in (folder / MANIFEST, *(beton_path(folder, split) for split in SPLITS)) if path.exists()]
    if not files or _is_staged(folder):
        return
    if load_manifest(folder).digest == manifest.digest:
        verify_betons(folder)  # it is the same data but damaged, so this raises an error with the details
    raise BetonError(
        f"{folder} has data that was prepared here, and {remote} has other data (digest {manifest.digest}); choose "
        f"another data.folder, set data.uri=null to use the local data, or remove {' and '.join(map(str, files))}"
    )


def _download_missing(
    remote: RemoteFolder, folder: Path, text: str, manifest: Manifest, splits: Sequence[str], show: Show
) -> None:
    before = load_manifest(folder) if (folder / MANIFEST).exists() else None
    absent = [name for name in manifest.splits if not _is_in_place(folder, name, before, manifest.splits[name])]
    wanted = {name: manifest.splits[name] for name in absent if name in splits}
    partials = {name: folder / _partial_name(split) for name, split in wanted.items()}
    resumable = [folder / _partial_name(manifest.splits[name]) for name in absent]
    for path in folder.glob(".staging-*.partial"):
        if path not in resumable:
            path.unlink()  # from data that is no longer at the address
    if before and before.digest != manifest.digest:
        show(f"{remote} has changed since it was downloaded (digest {before.digest}, now {manifest.digest})")
    progress = _Progress(f"downloading to {shown_name(folder)}", _bytes_to_read(remote, folder, wanted, partials), show)
    for name, split in wanted.items():
        _download(remote, split, partials[name], progress, show)

    # The rest is quick. A process that dies here leaves no manifest, so the next process compares all bytes.
    (folder / MANIFEST).unlink(missing_ok=True)
    write_whole(folder / STAGED, f"{hashlib.sha256(text.encode()).hexdigest()}  {MANIFEST} of {remote}\n")
    for name in absent:
        if name in partials:
            partials[name].replace(beton_path(folder, name))
        else:
            beton_path(folder, name).unlink(missing_ok=True)  # the new manifest would seem to describe it
    sync_folder(folder)
    write_whole(folder / MANIFEST, text)
    progress.finish(f"downloaded {' and '.join(splits)} of {remote} to {shown_name(folder)}")


def _partial_name(split: Split) -> str:
    return f".staging-{split.sha256}.partial"


def _is_in_place(folder: Path, name: str, before: Manifest | None, split: Split) -> bool:
    """Return whether the folder has this beton of a split. Without a local manifest, all its bytes are compared."""
    path = beton_path(folder, name)
    if before is None:
        return path.exists() and path.stat().st_size == split.size_bytes and file_sha256(path) == split.sha256
    try:
        verify_betons(folder, splits=[name])
    except BetonError:
        return False
    return before.splits[name].sha256 == split.sha256


def _bytes_to_read(remote: RemoteFolder, folder: Path, wanted: dict[str, Split], partials: dict[str, Path]) -> int:
    """Return the number of bytes left to download. Raise an error if they are not there or do not fit on the disk."""
    left = 0
    for name, split in wanted.items():
        size = remote.size(split.file)
        if size != split.size_bytes:
            has = f"no {split.file}" if size is None else f"a {split.file} of {size:,} bytes"
            raise BetonError(
                f"{remote} has {has}, but its manifest says {split.size_bytes:,} bytes: wait if it is still being "
                "uploaded, or remove it and upload it again"
            )
        left += max(0, size - (partials[name].stat().st_size if partials[name].exists() else 0))
    free = shutil.disk_usage(folder).free
    if left > free:
        raise OSError(
            f"{shown_name(folder)} has {shown_bytes(free)} free, but {shown_bytes(left)} of {remote} are left to "
            "download; free some space, or choose another data.folder"
        )
    return left


def _download(remote: RemoteFolder, split: Split, partial: Path, progress: _Progress, show: Show) -> None:
    """Complete the partial file and compare its hash. If resumed content does not match, start over once."""
    if partial.exists() and partial.stat().st_size > split.size_bytes:
        partial.unlink()
    kept = partial.stat().st_size if partial.exists() else 0
    if kept:
        show(f"{split.file}: resuming after {shown_bytes(kept)}")
    found = _complete(remote, split, partial, progress)
    if found != split.sha256 and kept:
        show(f"{split.file}: the partial download does not match; starting over")
        partial.unlink()
        progress.total += kept
        found = _complete(remote, split, partial, progress)
    if found != split.sha256:
        partial.unlink()
        raise BetonError(
            f"{split.file} of {remote} has SHA-256 {found}, but its manifest says {split.sha256}: it changed while it "
            "was read, or is damaged; download it again, and if that fails, remove it and upload it again"
        )


def _complete(remote: RemoteFolder, split: Split, partial: Path, progress: _Progress) -> str:
    """Append the missing bytes to the partial file, sync it to disk, and return the SHA-256 of the whole file."""
    sha256 = hashlib.sha256()
    with partial.open("a+b") as file:
        file.seek(0)
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
        for chunk in remote.chunks(split.file, start=file.tell()):
            file.write(chunk)
            file.flush()  # so that another process can resume if this one is killed
            sha256.update(chunk)
            progress.advance(len(chunk))
        os.fsync(file.fileno())
    return sha256.hexdigest()


def _read_file(path: Path, sha256, progress: _Progress) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
            yield chunk
            progress.advance(len(chunk))


class _Progress:
    """Report the progress of a transfer of `total` bytes as a line every few seconds: there may be no terminal."""

    def __init__(self, what: str, total: int, show: Show):
        self.what, self.total, self.show = what, total, show
        self.done, self.start = 0, time.monotonic()
        self.last_line = self.start
        show(f"{what}: {shown_bytes(total)}")

    def advance(self, count: int) -> None:
        """Count bytes that were transferred, and report them every few seconds."""
        self.done += count
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            left = (self.total - self.done) / self._speed()
            rate = f"{shown_bytes(self._speed())}/s, {left:,.0f} s left"
            self.show(f"{self.what}: {shown_bytes(self.done)} of {shown_bytes(self.total)}, {rate}")

    def finish(self, result: str) -> None:
        """Report the result, with the number of bytes and the seconds."""
        self.show(f"{result}: {shown_bytes(self.done)} in {time.monotonic() - self.start:.1f} s")

    def _speed(self) -> float:
        return self.done / max(time.monotonic() - self.start, 1e-9)
