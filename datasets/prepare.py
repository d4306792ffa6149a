"""From the images of a data set to betons and a manifest: in parallel, checked, and only when something changed."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from PIL import features

from datasets.beton import FORMAT, IMAGES_LIST, MANIFEST, SPLITS, Manifest, beton_path, load_manifest, verify_betons
from datasets.build import Built, ImageRecord, build_betons
from datasets.catalog import Dataset, SourceOptions, find_dataset, glyph_images
from datasets.conversion import Conversion, channel_statistics, chunks, digest_chunk
from datasets.glyphs import GENERATOR_VERSION, GlyphSettings, generate, is_generated
from datasets.parallel import available_cpus, map_ordered
from datasets.progress import progress_bar
from datasets.sources import ImageIndex, Source, listed

PARTIAL = ".partial"


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
class Prepared:
    """What `prepare` did: `unchanged` when there was nothing to do; `num_images` were read in `seconds`."""

    manifest: Manifest
    unchanged: bool
    num_images: int
    seconds: float


def prepare(
    dataset: str,
    folder: Path,
    *,
    source: Path | None = None,
    validation_source: Path | None = None,
    validation_fraction: float = 0.2,
    images_per_class: int | None = None,
    max_side: int | None = 500,
    jpeg_quality: int = 90,
    on_bad_image: Literal["error", "skip"] = "error",
    split_seed: int = 0,
    glyphs: GlyphSettings | None = None,
    num_processes: int | None = None,
    force: bool = False,
    show_progress: bool = False,
) -> Prepared:
    """Write train.beton, validation.beton, images.jsonl and, last, manifest.json into `folder`.

    Does nothing where the folder was already prepared from the same images with the same settings; that is seen
    from names, sizes and modification times, and only where those differ from the images' contents. The files are
    the same for any number of processes. Their meaning is that of the configuration's `data` section.

    Args:
        num_processes: None is one for each CPU that this process may use.
        force: prepare again whatever is there.

    Raises:
        ChangedInputsError: the folder was prepared differently and `force` is false.
        BetonError: the folder is half-written or damaged and `force` is false.
        BadImagesError: with every bad image, unless `on_bad_image` is "skip".
        SourceError: the source does not hold what the data set needs.
        OSError: no space, no permission, or another preparation of this folder is under way.
    """
    entry, start = find_dataset(dataset), time.perf_counter()
    options = SourceOptions(
        folder=Path(folder),
        source=source,
        validation_source=validation_source,
        validation_fraction=validation_fraction,
        images_per_class=images_per_class,
        split_seed=split_seed,
        glyphs=glyphs or GlyphSettings(),
    )
    conversion = Conversion(max_side, jpeg_quality)
    settings = _settings(entry, options, conversion)
    processes = num_processes or available_cpus()
    with _exclusive(options.folder):
        images = entry.scan(options)
        if not force and _holds_data(options.folder):
            manifest = _unchanged(options.folder, entry, settings, images, on_bad_image, processes, show_progress)
            return Prepared(manifest, True, 0, time.perf_counter() - start)
        if dataset == "glyphs":
            _draw_glyphs(options, processes, show_progress)
        index = images.read_index()
        _require_space(options.folder, index, conversion)
        partial = options.folder / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            num_images, start = sum(map(len, index.splits.values())), time.perf_counter()
            with progress_bar(f"prepare {dataset}", num_images, show_progress) as advance:
                built = build_betons(
                    index,
                    partial,
                    conversion,
                    seed=split_seed,
                    num_processes=processes,
                    skip_bad=on_bad_image == "skip",
                    advance=advance,
                )
            manifest = _manifest(entry, index, settings, built, images.state)
            _publish(options.folder, partial, manifest, built.records)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Prepared(manifest, False, num_images, time.perf_counter() - start)


def _settings(entry: Dataset, options: SourceOptions, conversion: Conversion) -> dict[str, Any]:
    """Everything besides the images that the betons depend on; where the images lie does not matter."""
    used = {name: getattr(options, name) for name in entry.uses if name not in ("source", "validation_source")}
    if "glyphs" in used:
        used["glyphs"] = {**asdict(options.glyphs), "generator": GENERATOR_VERSION}
    return {**used, **asdict(conversion)}


def _holds_data(folder: Path) -> bool:
    return any((folder / name).exists() for name in (MANIFEST, *(beton_path(folder, split).name for split in SPLITS)))


def _unchanged(
    folder: Path,
    entry: Dataset,
    settings: dict[str, Any],
    images: Source,
    on_bad_image: str,
    num_processes: int,
    show_progress: bool,
) -> Manifest:
    """The manifest of a folder that needs no preparation; otherwise raises what `prepare` documents."""
    manifest = load_manifest(folder)
    differences = _setting_differences(
        {"dataset": manifest.dataset, **manifest.settings}, {"dataset": entry.name, **settings}
    )
    if manifest.skipped and on_bad_image == "error":
        differences.append(f"on_bad_image: 'skip' ({len(manifest.skipped)} images were left out) -> 'error'")
    if not differences and manifest.source_state != images.state:
        differences = _image_differences(folder, images.read_index(), num_processes, show_progress)
    if differences:
        raise ChangedInputsError(folder, differences)
    verify_betons(folder)
    if manifest.source_state != images.state:
        manifest = replace(manifest, source_state=images.state)
        _write_synced(folder / MANIFEST, manifest.to_json())
    return manifest


def _setting_differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    differences = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            differences += [f"{key}.{difference}" for difference in _setting_differences(old, new)]
        elif old != new:
            differences.append(f"{key}: {old!r} -> {new!r}")
    return differences


def _image_differences(folder: Path, index: ImageIndex, num_processes: int, show_progress: bool) -> list[str]:
    """How the images differ from those that the folder was prepared from; modification times do not count."""
    recorded = {(record.split, record.name): record for record in _read_records(folder / IMAGES_LIST)}
    found = {(split, ref.name): ref for split, refs in index.splits.items() for ref in refs}
    common = sorted(recorded.keys() & found.keys())
    changed = [key for key in common if recorded[key].size != found[key].size]
    if not changed:
        refs = [found[key] for key in common]
        with progress_bar("compare contents", len(refs), show_progress) as advance:
            digests = []
            for some in map_ordered(digest_chunk, chunks(refs), num_processes):
                digests += some
                advance(len(some))
        changed = [key for key, digest in zip(common, digests, strict=True) if recorded[key].content != digest]
    kinds = {
        "added": sorted(found.keys() - recorded.keys()),
        "removed": sorted(recorded.keys() - found.keys()),
        "changed": changed,
    }
    return [f"{len(keys)} images {kind}: {listed([name for _, name in keys])}" for kind, keys in kinds.items() if keys]


def _draw_glyphs(options: SourceOptions, num_processes: int, show_progress: bool) -> None:
    folder, settings = glyph_images(options.folder), options.glyphs
    if not is_generated(folder, settings):
        with progress_bar("draw glyphs", settings.num_train + settings.num_validation, show_progress) as advance:
            generate(folder, settings, num_processes, advance)


def _require_space(folder: Path, index: ImageIndex, conversion: Conversion) -> None:
    # An image that is resized ends well below two bytes a pixel of a square of that side.
    most = 2 * conversion.max_side**2 if conversion.max_side else None
    sizes = (ref.size for refs in index.splits.values() for ref in refs)
    needed = sum(min(size, most) if most else size for size in sizes)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder} has {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB are needed")


def _manifest(entry: Dataset, index: ImageIndex, settings: dict[str, Any], built: Built, state: str) -> Manifest:
    mean, std = channel_statistics(built.histogram)
    return Manifest(
        format=FORMAT,
        dataset=entry.name,
        classes=index.classes,
        settings=settings,
        mean=mean,
        std=std,
        source_digest=built.source_digest,
        skipped=built.skipped,
        versions={
            "python": platform.python_version(),
            "numpy": version("numpy"),
            "pillow": version("pillow"),
            "libjpeg_turbo": str(features.version("libjpeg_turbo")),
            "ffcv": version("ffcv"),
        },
        splits=built.splits,
        licence=entry.licence,
        source_state=state,
    )


def _publish(folder: Path, partial: Path, manifest: Manifest, records: list[ImageRecord]) -> None:
    """Move finished files into place, the manifest last: at no moment does a manifest describe other betons."""
    _write_synced(partial / IMAGES_LIST, "".join(record.to_json() + "\n" for record in records))
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in (*(split.file for split in manifest.splits.values()), IMAGES_LIST):
        (partial / name).replace(folder / name)
    _sync_folder(folder)
    _write_synced(folder / MANIFEST, manifest.to_json())


def _read_records(path: Path) -> list[ImageRecord]:
    with path.open() as lines:
        return [ImageRecord(*json.loads(line)) for line in lines]


def _write_synced(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Keep a second preparation of the same folder out."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{folder} is being prepared by another process; wait for it, or end it") from None
        yield
    finally:
        os.close(descriptor)
