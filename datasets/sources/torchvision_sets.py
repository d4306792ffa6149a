"""Data sets that torchvision finds and downloads. Only those that consist of image files with one label each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets.files import TRAIN, VALIDATION, shown_name
from datasets.sources.index import ImageRef, Source, SourceError, listed
from datasets.sources.listing import Choice, Listed, Listing, scan_listing

DATA_SETS: dict[str, tuple[str, str] | None] = {
    "Country211": ("train", "valid"),
    "DTD": ("train", "val"),
    "EuroSAT": None,
    "FGVCAircraft": ("train", "val"),
    "Flowers102": ("train", "val"),
    "Food101": ("train", "test"),
    "GTSRB": ("train", "test"),
    "Imagenette": ("train", "val"),
    "OxfordIIITPet": ("trainval", "test"),
    "RenderedSST2": ("train", "val"),
    "StanfordCars": ("train", "test"),
    "SUN397": None,
}
"""Maps a data set to torchvision's names of its training and validation images, or to None without such names."""


def scan_torchvision(name: str, root: Path, choice: Choice, download: bool) -> Source:
    """Find the images of `torchvision.datasets.NAME` in its folder, without reading them.

    Args:
        root: folder that torchvision takes as `root`; the data set is in a folder below it.
        download: whether to download what is missing, if the publisher still offers it.

    Raises:
        SourceError: the data set is not there, or some of its files are missing.
        OSError: the data set cannot be downloaded.
    """
    listing, entries, missing = Listing(), [], []
    splits = DATA_SETS[name]
    for split, kind in zip((TRAIN, VALIDATION), splits, strict=True) if splits else (("", None),):
        data = _opened(name, root, kind, download)
        listing.class_names = [one[0] if isinstance(one, tuple) else one for one in getattr(data, "classes", [])]
        for path, label in _files(data):
            relative = os.path.relpath(path, root)
            try:
                status = os.stat(path)  # noqa: PTH116  a fifth of Path's time
            except OSError:
                missing.append(shown_name(relative))
                continue
            entries.append((relative, status))
            ref = ImageRef(shown_name(relative), 0, path, 0, status.st_size)
            listing.images.append(Listed(ref, listing.class_names[label] if listing.class_names else str(label), split))
    if missing:
        raise SourceError(
            f"{root} lacks {len(missing):,} files of {name}: {listed(missing)}; restore them, or remove its folder "
            "there and pass --download to jobs.prepare"
        )
    folders = sorted({Path(one.ref.path).parent for one in listing.images})
    return scan_listing(entries, lambda: listing, choice, folders)


def _opened(name: str, root: Path, split: str | None, download: bool) -> Any:
    from torchvision import datasets as sets  # takes seconds, and only this needs it

    arguments = {"split": split} if split else {}
    try:
        return getattr(sets, name)(root, download=download, **arguments)
    except (RuntimeError, OSError, ValueError, LookupError) as error:
        if download:
            raise OSError(f"torchvision cannot download {name} to {root}: {error}") from None
        raise SourceError(
            f"{root} does not have {name} as torchvision lays it out ({error}); give the folder that torchvision takes "
            "as root, or pass --download to jobs.prepare"
        ) from None


def _files(data: Any) -> Iterator[tuple[str, int]]:
    """Yield path and label of every image of a torchvision data set."""
    samples = getattr(data, "_samples", None) or getattr(data, "samples", None)
    if samples is None:
        files = getattr(data, "_image_files", None) or data._images
        samples = zip(files, data._labels, strict=True)
    for path, label in samples:
        yield os.fspath(path), int(label)
