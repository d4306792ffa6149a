"""Prepare a data set: write its images as betons with a manifest, in parallel, and only if something changed."""

from __future__ import annotations

import json
import platform
import re
import shutil
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from datasets import turbojpeg
from datasets.beton import (
    FORMAT,
    IMAGES_LIST,
    MANIFEST,
    SPLITS,
    VALIDATION,
    BetonError,
    Manifest,
    beton_path,
    load_manifest,
    read_jpeg,
    read_layout,
    verify_betons,
)
from datasets.files import (
    DataError,
    exclusive,
    overlap,
    shown_bytes,
    shown_name,
    sync_folder,
    value_differences,
    write_whole,
)
from datasets.parallel import OrderedMap, available_cpus, map_ordered, progress_bar
from datasets.prepare.build import JOURNAL, BadImagesError, Built, ImageRecord, LeftoversError, build_betons
from datasets.prepare.convert import Check, Conversion, channel_statistics, digest_chunk
from datasets.sources.catalog import Dataset, SourceOptions, find_dataset, glyph_images
from datasets.sources.glyphs import GENERATOR_VERSION, GlyphSettings, generate, is_generated
from datasets.sources.index import ImageIndex, Source, SourceError, listed, stored_chunks


def publish(folder: Path, finished: Path, manifest: Manifest, records: Iterable[ImageRecord]) -> None:
    """Move the betons in `finished` into `folder`. The manifest is written last, so it never describes other files."""
    write_whole(finished / IMAGES_LIST, "".join(f"{record.to_json()}\n" for record in records))
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in (*(split.file for split in manifest.splits.values()), IMAGES_LIST):
        (finished / name).replace(folder / name)
    sync_folder(folder)
    write_whole(folder / MANIFEST, manifest.to_json())


class ChangedInputsError(DataError):
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
    """The inputs of a preparation. `settings` does not include the source's path."""

    dataset: str
    settings: Mapping[str, Any]
    images: Source
    skip_bad: bool


def require_unchanged(
    folder: Path, manifest: Manifest, inputs: Inputs, num_processes: int, show_progress: bool
) -> None:
    """Check that a folder was prepared from the same inputs.

    This is quick if names, sizes and modification times are the same. Otherwise the contents of images are compared.

    Raises:
        ChangedInputsError: lists every difference.
    """
    before = {"dataset": manifest.dataset, **manifest.settings}
    changed = value_differences(before, {"dataset": inputs.dataset, **inputs.settings})
    differences = [f"data.{difference}" for difference in changed]
    if manifest.skipped and not inputs.skip_bad:
        differences.append(f"data.on_bad_image: 'skip' (images left out: {len(manifest.skipped)}) -> 'error'")
    if not differences and manifest.source_state != inputs.images.state:
        records = read_records(folder / IMAGES_LIST)
        differences = _image_differences(records, inputs.images.read_index(), num_processes, show_progress)
    if differences:
        raise ChangedInputsError(folder, differences)


def read_records(path: Path) -> list[ImageRecord]:
    """Read the list of source images that is stored next to the betons. Raise BetonError if it is damaged."""
    try:
        with path.open("rb") as lines:
            return [ImageRecord(*json.loads(line)) for line in lines]
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise BetonError(f"{path} is missing or damaged ({error}); prepare the data again with --force") from None


def _image_differences(
    records: list[ImageRecord], index: ImageIndex, num_processes: int, show_progress: bool
) -> list[str]:
    """Describe how the images differ from the recorded ones. Modification times are ignored."""
    recorded = {record.name: record for record in records}
    found = {ref.name: (split, ref) for split, refs in index.splits.items() for ref in refs}
    common = sorted(recorded.keys() & found.keys())
    changed = [name for name in common if recorded[name].size != found[name][1].size]
    if not changed:
        parts = stored_chunks([found[name][1] for name in common], seed=0)
        with progress_bar("compare contents", len(common), show_progress) as advance:
            for refs, digests in zip(parts, map_ordered(digest_chunk, parts, num_processes), strict=True):
                pairs = zip(refs, digests, strict=True)
                changed += [ref.name for ref, digest in pairs if recorded[ref.name].content != digest]
                advance(len(refs))
    kinds = {
        "added": sorted(found.keys() - recorded.keys()),
        "removed": sorted(recorded.keys() - found.keys()),
        "changed": sorted(changed),
        "now in another split": [name for name in common if recorded[name].split != found[name][0]],
        "now of another class": [
            name for name in common if recorded[name].class_name != index.classes[found[name][1].label]
        ],
    }
    alike = _alike({*kinds["added"], *kinds["removed"]})
    return [
        f"{len(names)} image{'s' if len(names) > 1 else ''} {kind}: "
        + listed([ascii(name) if name in alike else name for name in names])
        for kind, names in kinds.items()
        if names
    ]


def _alike(names: Iterable[str]) -> set[str]:
    """Return the names that differ from another one only in their Unicode form, so that they look the same."""
    names = list(names)
    forms = Counter(unicodedata.normalize("NFC", name) for name in names)
    return {name for name in names if forms[unicodedata.normalize("NFC", name)] > 1}


PARTIAL = ".partial"
SAMPLES, NUM_SAMPLES = "samples", 8
SAMPLE_NAME = re.compile(rf"[0-{NUM_SAMPLES - 1}]-[\w-]{{1,50}}\.jpg")
_ELSEWHERE = "move it, or choose another data.folder"


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`.

    Attributes:
        unchanged: whether there was nothing to do.
        num_images: number of images that were read in `seconds`.
        num_adopted: number of further images that an interrupted preparation had already converted.
        not_images: numbers of entries of the source that are not images, by kind.
    """

    manifest: Manifest
    unchanged: bool
    num_images: int
    seconds: float
    num_adopted: int = 0
    not_images: Counter[str] = field(default_factory=Counter)


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
    check_images: Check = "data",
    on_bad_image: Literal["error", "skip"] = "error",
    split_seed: int = 0,
    group_by: str | None = None,
    label_column: str | None = None,
    glyphs: GlyphSettings | None = None,
    num_processes: int | None = None,
    map_chunks: OrderedMap | None = None,
    download: bool = False,
    force: bool = False,
    show_progress: bool = False,
) -> Prepared:
    """Write train.beton, validation.beton, images.jsonl, manifest.json and some sample images into `folder`.

    A folder that was already prepared from the same images with the same settings is left as it is. Names, sizes and
    modification times decide, and only if they differ, the contents of the images. The files are the same for any
    number of processes. The arguments have the meaning that they have in the configuration's `data` section.

    A preparation that is interrupted, even killed, or that ends at bad images leaves its work in FOLDER/.partial. The
    next one resumes it if images, settings and versions are the same, and writes the same files as an uninterrupted
    one.

    Args:
        num_processes: None means one for each CPU that this process may use.
        map_chunks: runs the conversion instead of `num_processes` processes of this machine.
        download: download what `source` lacks, for a data set of torchvision.
        force: prepare again, whatever the folder has.

    Raises:
        ChangedInputsError: the folder was prepared differently and `force` is false.
        BetonError: the folder is incomplete or damaged and `force` is false.
        BadImagesError: some images are bad and `on_bad_image` is "error"; all are listed.
        SourceError: the source does not have what the data set needs.
        DataError: FOLDER/samples contains files that are not sample images.
        OSError: there is no space or no permission, or another process is preparing this folder.
    """
    # Use absolute paths, because `map_chunks` may run in another folder.
    entry, folder = find_dataset(dataset), Path(folder).absolute()
    options = SourceOptions(
        folder=folder,
        source=source and Path(source).absolute(),
        validation_source=validation_source and Path(validation_source).absolute(),
        validation_fraction=validation_fraction,
        images_per_class=images_per_class,
        split_seed=split_seed,
        group_by=group_by,
        label_column=label_column,
        download=download,
        glyphs=glyphs or GlyphSettings(),
    )
    if "source" in entry.uses:
        _require_separate(
            folder, [("data.source", options.source), ("data.validation_source", options.validation_source)]
        )
    conversion = Conversion(max_side, jpeg_quality, check_images)
    processes = num_processes or available_cpus()
    settings, images = _settings(entry, options, conversion), entry.scan(options)
    _require_separate(folder, [("a folder of data.source", path) for path in images.folders])
    inputs = Inputs(dataset, settings, images, skip_bad=on_bad_image == "skip")
    with exclusive(folder):
        if not force and _holds_data(folder):
            manifest = _confirmed(folder, inputs, processes, show_progress)
            return Prepared(manifest, True, 0, 0.0, not_images=images.skipped)
        _require_only_samples(folder)
        if dataset == "glyphs":
            _draw_glyphs(options, processes, show_progress)
        if map_chunks is None or dataset == "glyphs":  # glyphs are drawn on this machine
            map_chunks = partial(map_ordered, num_processes=processes)
        return _build(entry, options, conversion, inputs, map_chunks, show_progress)


def _require_separate(folder: Path, sources: Sequence[tuple[str, Path | None]]) -> None:
    """Raise SourceError if the prepared folder and a source overlap, because the folder's files would be read as
    images."""
    for name, source in sources:
        if source is not None and (relation := overlap(folder, source)):
            raise SourceError(
                f"data.folder {folder} {relation} {name} {source}; choose a data.folder outside the source"
            )


def _settings(entry: Dataset, options: SourceOptions, conversion: Conversion) -> dict[str, Any]:
    """Return everything besides the images that the betons depend on. The source's path is not part of it."""
    used = {name: getattr(options, name) for name in entry.uses if name not in ("source", "validation_source")}
    if "glyphs" in used:
        used["glyphs"] = {**asdict(options.glyphs), "generator": GENERATOR_VERSION}
    return {**used, **asdict(conversion)}


def _holds_data(folder: Path) -> bool:
    """Return whether the folder has a finished preparation, or betons that no preparation can resume."""
    if (folder / PARTIAL / JOURNAL).exists() and not (folder / MANIFEST).exists():
        return False
    return any(path.exists() for path in (folder / MANIFEST, *(beton_path(folder, split) for split in SPLITS)))


def _confirmed(folder: Path, inputs: Inputs, num_processes: int, show_progress: bool) -> Manifest:
    """Return the manifest of a folder that needs no preparation. Otherwise raise the errors that `prepare` lists."""
    manifest = load_manifest(folder)
    require_unchanged(folder, manifest, inputs, num_processes, show_progress)
    verify_betons(folder)
    if manifest.source_state != inputs.images.state:
        # The images are the same, but in another place or with other times. Store the new state for a quick next check.
        manifest = replace(manifest, source_state=inputs.images.state)
        write_whole(folder / MANIFEST, manifest.to_json())
    return manifest


def _draw_glyphs(options: SourceOptions, num_processes: int, show_progress: bool) -> None:
    folder, settings = glyph_images(options.folder), options.glyphs
    if not is_generated(folder, settings):
        with progress_bar("draw glyphs", settings.num_train + settings.num_validation, show_progress) as advance:
            generate(folder, settings, num_processes, advance)


def _build(
    entry: Dataset,
    options: SourceOptions,
    conversion: Conversion,
    inputs: Inputs,
    map_chunks: OrderedMap,
    show_progress: bool,
) -> Prepared:
    folder, start = options.folder, time.perf_counter()
    index, unfinished = inputs.images.read_index(), options.folder / PARTIAL
    _require_space(folder, index, conversion)
    num_images, versions = sum(map(len, index.splits.values())), _versions()
    made_from = {
        "dataset": entry.name,
        "settings": inputs.settings,
        "images": inputs.images.state,
        "versions": versions,
    }

    def build() -> Built:
        with progress_bar(f"prepare {entry.name}", num_images, show_progress) as advance:
            return build_betons(
                index,
                unfinished,
                conversion,
                seed=options.split_seed,
                made_from=made_from,
                map_chunks=map_chunks,
                skip_bad=inputs.skip_bad,
                advance=advance,
            )

    try:
        try:
            built = build()
        except LeftoversError:
            shutil.rmtree(unfinished)
            built = build()
    except BadImagesError:  # with data.on_bad_image=skip, the next preparation resumes this one
        raise
    except ValueError:  # the user must change the images, so there is nothing to resume
        shutil.rmtree(unfinished)
        raise
    manifest = _manifest(entry, index, inputs, built, versions)
    publish(folder, unfinished, manifest, built.records)
    _write_samples(folder, manifest)
    shutil.rmtree(unfinished)
    seconds, num_read = time.perf_counter() - start, num_images - built.num_adopted
    return Prepared(manifest, False, num_read, seconds, built.num_adopted, inputs.images.skipped)


def _write_samples(folder: Path, manifest: Manifest) -> None:
    """Write a few validation images as files, to try a model on."""
    samples = folder / SAMPLES
    samples.mkdir(exist_ok=True)
    for path in samples.iterdir():
        if _is_sample(path):
            path.unlink()
    beton = beton_path(folder, VALIDATION)
    labels = read_layout(beton).metadata["label"]
    for index in range(min(NUM_SAMPLES, len(labels))):
        # A file name has at most 255 bytes, and a character up to 4.
        name = re.sub(r"[^\w-]", "_", manifest.classes[int(labels[index])])[:50]
        (samples / f"{index}-{name}.jpg").write_bytes(read_jpeg(beton, index))


def _is_sample(path: Path) -> bool:
    """Return whether `_write_samples` may have written a file."""
    return SAMPLE_NAME.fullmatch(path.name) is not None and path.is_file()


def _require_only_samples(folder: Path) -> None:
    """Raise DataError if FOLDER/samples is not a folder, or contains anything besides sample images."""
    samples = folder / SAMPLES
    if samples.is_symlink() or (samples.exists() and not samples.is_dir()):
        raise DataError(f"{samples} is not a folder, but sample images are written there; {_ELSEWHERE}")
    others = sorted(path.name for path in samples.iterdir() if not _is_sample(path)) if samples.exists() else []
    if others:
        names = listed([shown_name(name) for name in others])
        raise DataError(f"{samples} is for sample images, but it has other files: {names}; {_ELSEWHERE}")


def _require_space(folder: Path, index: ImageIndex, conversion: Conversion) -> None:
    # A resized image needs far less than two bytes for each pixel of a square of that side.
    most = 2 * conversion.max_side**2 if conversion.max_side else None
    sizes = (ref.size for refs in index.splits.values() for ref in refs)
    needed = sum(min(size, most) if most else size for size in sizes)
    # Leftovers of an interrupted preparation are reused or overwritten. Blocks are counted, because betons have holes.
    left_over = sum(512 * file.stat().st_blocks for file in (folder / PARTIAL).glob("*"))
    free = shutil.disk_usage(folder).free + left_over
    if needed > free:
        raise OSError(
            f"{shown_name(folder)} has {shown_bytes(free)} free, but about {shown_bytes(needed)} are needed; "
            "free some space, or choose another data.folder"
        )


def _manifest(entry: Dataset, index: ImageIndex, inputs: Inputs, built: Built, versions: dict[str, str]) -> Manifest:
    mean, std = channel_statistics(built.pixels)
    return Manifest(
        format=FORMAT,
        dataset=entry.name,
        classes=index.classes,
        settings=dict(inputs.settings),
        mean=mean,
        std=std,
        source_digest=built.source_digest,
        skipped=built.skipped,
        versions=versions,
        splits=built.splits,
        licence=entry.licence,
        source_state=inputs.images.state,
    )


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "pillow": version("pillow"),
        "libjpeg_turbo": turbojpeg.library_version(),
        "ffcv": version("ffcv"),
    }
