"""A prepared folder: train.beton, validation.beton and the manifest that says what they hold and proves it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datasets import turbojpeg
from datasets.beton_file import BetonError, Layout, Sample, checksum, file_sha256, read_jpeg, read_layout, write_beton

__all__ = [
    "TRAIN",
    "VALIDATION",
    "BetonError",
    "Manifest",
    "Sample",
    "Split",
    "beton_path",
    "load_manifest",
    "parse_manifest",
    "read_jpeg",
    "verify_betons",
    "write_beton",
]

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
FORMAT = 2
MANIFEST = "manifest.json"
IMAGES_LIST = "images.jsonl"
SAMPLED_IMAGES = 32


@dataclass(frozen=True)
class Split:
    """One beton: `class_counts` by label; `attributes` has one value a sample, in beton order, such as glyph height."""

    file: str
    count: int
    class_counts: list[int]
    size_bytes: int
    sha256: str
    attributes: dict[str, list[float]]


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    Attributes:
        classes: names, by label.
        settings: everything that the betons depend on besides the images themselves.
        mean, std: of the training images' pixels, by channel, on a scale of 0 to 1. More than a few hundred images
            are represented by an even sample of them (datasets/conversion.py), because looking at every pixel would
            double the time of a preparation; the mean is then known to about 0.01.
        source_digest: of the names and contents of all images that were read.
        skipped: {path, reason} of every bad image that was left out.
        source_state: of names, sizes and modification times, to see quickly that nothing changed.
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
        """Identifies the prepared data: 32 hexadecimal digits of a SHA-256 over classes and betons."""
        identity = [self.dataset, self.classes, *(self.splits[name].sha256 for name in sorted(self.splits))]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    def to_json(self) -> str:
        """Mappings one key a line, lists on one line, so that a manifest with thousands of samples stays readable."""
        return _to_json(asdict(self)) + "\n"


def beton_path(folder: Path, split: str) -> Path:
    """Where the beton of a split lies in a prepared folder."""
    return Path(folder) / f"{split}.beton"


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a prepared folder.

    Raises:
        BetonError: the folder is not prepared, its preparation was cut short, or the manifest is damaged.
    """
    path = Path(folder) / MANIFEST
    prepare = "run `python -m jobs.prepare --config CONFIG`"
    try:
        text = path.read_text()
    except FileNotFoundError:
        if any(beton_path(folder, split).exists() for split in SPLITS):
            raise BetonError(
                f"{folder} holds betons but no {MANIFEST}: its preparation was cut short, or the file was removed; "
                f"{prepare} --force"
            ) from None
        raise BetonError(f"{folder} holds no prepared data ({MANIFEST} is missing); {prepare}") from None
    return parse_manifest(text, str(path))


def parse_manifest(text: str, origin: str) -> Manifest:
    """The manifest in `text`; BetonError, which names its `origin`, where it is damaged or of another format."""
    prepare = "prepare the data again: `python -m jobs.prepare --config CONFIG --force`"
    try:
        tree = json.loads(text)
        made_by = tree["format"]
        if made_by != FORMAT:
            raise BetonError(f"{origin} has format {made_by}, this version reads {FORMAT}; {prepare}")
        splits = {name: Split(**split) for name, split in tree.pop("splits").items()}
        mean, std = tuple(tree.pop("mean")), tuple(tree.pop("std"))
        manifest = Manifest(**tree, mean=mean, std=std, splits=splits)
        missing = [split for split in SPLITS if split not in splits]
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise BetonError(f"{origin} is damaged ({type(error).__name__}: {error}); {prepare}") from None
    if missing:
        raise BetonError(f"{origin} is damaged: it lacks the split {' and '.join(missing)}; {prepare}")
    return manifest


def verify_betons(folder: Path, full: bool = False, splits: Sequence[str] = SPLITS) -> Manifest:
    """Check that the betons of a prepared folder are the ones that its manifest describes.

    Args:
        full: compare the SHA-256 of every byte; otherwise sizes, headers, tables, counts, labels and the beginnings
            of some images only.
        splits: the betons to look at; a folder that is staged for a part may hold that alone.

    Raises:
        BetonError: naming every beton that is missing, cut short, damaged or of another preparation.
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
        raise BetonError(f"{path} has {path.stat().st_size:,} bytes, its manifest says {split.size_bytes:,}")
    layout = read_layout(path)
    _verify_labels(path, layout, split, num_classes)
    _verify_some_images(path, layout)
    if full and (found := file_sha256(path)) != split.sha256:
        raise BetonError(f"{path} is damaged: SHA-256 {found}, its manifest says {split.sha256}")


def _verify_labels(path: Path, layout: Layout, split: Split, num_classes: int) -> None:
    labels_N = layout.metadata["label"]
    if len(labels_N) != split.count:
        raise BetonError(f"{path} has {len(labels_N)} samples, its manifest says {split.count}")
    if labels_N.max() >= num_classes:
        raise BetonError(f"{path} is damaged: label {labels_N.max()} where there are {num_classes} classes")
    if np.bincount(labels_N, minlength=num_classes).tolist() != split.class_counts:
        raise BetonError(f"{path} is of another preparation: the counts of its classes are not those of its manifest")


def _verify_some_images(path: Path, layout: Layout) -> None:
    """Whether evenly spread images have their checksums, and are JPEGs of the recorded size."""
    count = len(layout.metadata)
    with path.open("rb") as file:
        for index in np.unique(np.linspace(0, count - 1, min(count, SAMPLED_IMAGES)).astype(int)):
            file.seek(int(layout.allocations["ptr"][index]))
            jpeg, image = file.read(int(layout.allocations["size"][index])), layout.metadata["image"][index]
            if checksum(jpeg) != layout.metadata["checksum"][index]:
                raise BetonError(f"{path} is damaged: sample {index} does not have its checksum")
            try:
                header = turbojpeg.read_header(jpeg)
            except turbojpeg.JpegError as error:
                raise BetonError(f"{path} is damaged: sample {index} is no JPEG ({error})") from None
            if (header.width, header.height) != (image["width"], image["height"]):
                raise BetonError(
                    f"{path} is damaged: sample {index} has {header.width}x{header.height} pixels, "
                    f"its record says {image['width']}x{image['height']}"
                )
