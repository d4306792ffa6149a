"""Whether a prepared folder is still what its images and settings call for, and if not, how they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.beton import IMAGES_LIST, BetonError, Manifest
from datasets.build import ImageRecord
from datasets.conversion import chunks, digest_chunk
from datasets.parallel import map_ordered
from datasets.progress import progress_bar
from datasets.sources import ImageIndex, Source, listed


class ChangedInputsError(ValueError):
    """The folder was prepared from other images or with other settings."""

    def __init__(self, folder: Path, differences: list[str]):
        self.differences = differences
        lines = "\n".join(f"  {difference}" for difference in differences)
        super().__init__(
            f"{folder} was prepared differently:\n{lines}\n"
            "pass --force to prepare it again, or choose another data.folder"
        )


@dataclass(frozen=True)
class Inputs:
    """What a preparation depends on. `settings` is flat or nested one level; where the images lie is not part of it."""

    dataset: str
    settings: Mapping[str, Any]
    images: Source
    skip_bad: bool


def require_unchanged(
    folder: Path, manifest: Manifest, inputs: Inputs, num_processes: int, show_progress: bool
) -> None:
    """Quick where names, sizes and modification times are as they were; otherwise the images' contents decide.

    Raises:
        ChangedInputsError: with every difference.
    """
    before = {"dataset": manifest.dataset, **manifest.settings}
    changed = setting_differences(before, {"dataset": inputs.dataset, **inputs.settings})
    differences = [f"data.{difference}" for difference in changed]
    if manifest.skipped and not inputs.skip_bad:
        differences.append(f"data.on_bad_image: 'skip' ({len(manifest.skipped)} images were left out) -> 'error'")
    if not differences and manifest.source_state != inputs.images.state:
        records = read_records(folder / IMAGES_LIST)
        differences = _image_differences(records, inputs.images.read_index(), num_processes, show_progress)
    if differences:
        raise ChangedInputsError(folder, differences)


def setting_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for everything in which two mappings differ."""
    differences = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differences += [f"{key}.{difference}" for difference in setting_differences(old, new)]
        elif old != new:
            differences.append(f"{key}: {old!r} -> {new!r}")
    return differences


def read_records(path: Path) -> list[ImageRecord]:
    """The list of source images that a preparation leaves beside its betons; BetonError where it is damaged."""
    try:
        with path.open() as lines:
            return [ImageRecord(*json.loads(line)) for line in lines]
    except (FileNotFoundError, TypeError, json.JSONDecodeError) as error:
        raise BetonError(f"{path} is missing or damaged ({error}); prepare the data again with --force") from None


def _image_differences(
    records: list[ImageRecord], index: ImageIndex, num_processes: int, show_progress: bool
) -> list[str]:
    """How the images differ from those that were recorded; modification times do not count."""
    recorded = {record.name: record for record in records}
    found = {ref.name: (split, ref) for split, refs in index.splits.items() for ref in refs}
    common = sorted(recorded.keys() & found.keys())
    changed = [name for name in common if recorded[name].size != found[name][1].size]
    if not changed:
        digests: list[str] = []
        with progress_bar("compare contents", len(common), show_progress) as advance:
            for some in map_ordered(digest_chunk, chunks([found[name][1] for name in common]), num_processes):
                digests += some
                advance(len(some))
        changed = [name for name, digest in zip(common, digests, strict=True) if recorded[name].content != digest]
    kinds = {
        "added": sorted(found.keys() - recorded.keys()),
        "removed": sorted(recorded.keys() - found.keys()),
        "changed": changed,
        "now in another split": [name for name in common if recorded[name].split != found[name][0]],
        "now of another class": [
            name for name in common if recorded[name].class_name != index.classes[found[name][1].label]
        ],
    }
    return [
        f"{len(names)} image{'s' if len(names) > 1 else ''} {kind}: {listed(names)}"
        for kind, names in kinds.items()
        if names
    ]
