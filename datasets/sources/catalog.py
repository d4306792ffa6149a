"""The catalog of data sets: their licenses, options and sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

from datasets.sources import elpv, glyphs
from datasets.sources.folders import scan_image_folder
from datasets.sources.glyphs import GlyphSettings
from datasets.sources.index import Source, SourceError
from datasets.sources.listing import Choice, scan_csv
from datasets.sources.shards import find_shards, scan_shards
from datasets.sources.tars import scan_imagenet
from datasets.sources.torchvision_sets import DATA_SETS, scan_torchvision

IMAGENET100_IDS = Path(__file__).parent / "imagenet100.txt"

SOURCE_SPECIFIC = ("source", "validation_source", "validation_fraction", "group_by", "label_column")
"""Options that only some sources use."""


@dataclass(frozen=True)
class SourceOptions:
    """The options for finding, choosing and splitting images, as in the configuration's `data` section.

    `folder` is the folder into which the data is prepared.
    """

    folder: Path
    source: Path | None = None
    validation_source: Path | None = None
    validation_fraction: float = 0.2
    images_per_class: int | None = None
    split_seed: int = 0
    group_by: str | None = None
    label_column: str | None = None
    download: bool = False
    glyphs: GlyphSettings = field(default_factory=GlyphSettings)

    def choice(self, wnids: Sequence[str] | None = None) -> Choice:
        """Return how images of a list are chosen."""
        chosen = (self.validation_fraction, self.images_per_class, self.split_seed, self.group_by, self.label_column)
        return Choice(*chosen, wnids)

    def require_only(self, source: str, *used: str) -> None:
        """Raise SourceError if an option of SOURCE_SPECIFIC is set but `source` does not use it."""
        defaults = {option.name: option.default for option in fields(self)}
        unused = [name for name in SOURCE_SPECIFIC if name not in used and getattr(self, name) != defaults[name]]
        if unused:
            names = [f"data.{name}" for name in unused]
            them = "it" if len(names) == 1 else "them"
            raise SourceError(f"{source} does not use {' or '.join(names)}; remove {them} from the configuration")


@dataclass(frozen=True)
class Published:
    """A published top-1 accuracy (0 to 1), and how its protocol differs from this project's."""

    label: str
    top1: float
    note: str


@dataclass(frozen=True)
class Dataset:
    """An entry of the catalog.

    Attributes:
        licence: license of the images, as text.
        uses: options besides `folder` that this data set reads.
        scan: function that finds the images without reading them.
        published: published results on the same images, shown in reports.
    """

    name: str
    licence: str
    uses: tuple[str, ...]
    scan: Callable[[SourceOptions], Source]
    published: tuple[Published, ...] = ()


def find_dataset(name: str) -> Dataset:
    """Return the entry with that name. Raise ValueError with the known names if there is none."""
    if name not in CATALOG:
        raise ValueError(f"there is no data set {name!r}; choose one of {', '.join(sorted(CATALOG))}")
    return CATALOG[name]


def imagenet100_ids() -> list[str]:
    """Return the 100 WordNet ids of the paper's ImageNet-100, sorted. An id's label is its position."""
    return IMAGENET100_IDS.read_text().split()


def glyph_images(folder: Path) -> Path:
    """Return the folder of the generated images in a prepared folder."""
    return folder / "images"


def _required_source(options: SourceOptions, dataset: str) -> Path:
    if options.source is None:
        raise SourceError(f"data.source is missing; {dataset} needs the folder with its images")
    return options.source


def _scan_imagenet100(options: SourceOptions) -> Source:
    source = _required_source(options, "imagenet100")
    if found := _scan_list(source, options, imagenet100_ids()):
        return found
    options.require_only("imagenet100 from folders or tars", "source")
    return scan_imagenet(source, imagenet100_ids(), options.images_per_class, options.split_seed)


def _scan_image_folder(options: SourceOptions) -> Source:
    source = _required_source(options, "imagefolder")
    if found := _scan_list(source, options):
        return found
    options.require_only("a folder of class folders", "source", "validation_source", "validation_fraction", "group_by")
    return scan_image_folder(
        source,
        options.validation_source,
        options.validation_fraction,
        options.images_per_class,
        options.split_seed,
        options.group_by,
    )


def _scan_list(source: Path, options: SourceOptions, wnids: Sequence[str] | None = None) -> Source | None:
    """Return the source of shards or a CSV file, or None if `source` is neither."""
    choice, held_out = options.choice(wnids), options.validation_source
    if source.suffix.lower() == ".csv" and source.is_file():
        if held_out:
            raise SourceError("data.validation_source is not for CSV files; write a column split instead")
        return scan_csv(source, choice)
    if not (shards := find_shards(source)):
        return None
    validation = find_shards(held_out) if held_out else []
    if held_out and not validation:
        raise SourceError(f"data.validation_source {held_out} has no shards, but data.source {source} has")
    return scan_shards(shards, validation, choice)


def _scan_torchvision(options: SourceOptions, name: str) -> Source:
    root = _required_source(options, f"torchvision/{name}")
    options.require_only(f"torchvision/{name}", "source", "validation_fraction", "group_by")
    return scan_torchvision(name, root, options.choice(), options.download)


def _scan_elpv(options: SourceOptions) -> Source:
    options.require_only("elpv", "source", "validation_fraction")
    folder = options.source or elpv.package_folder()
    return elpv.scan_elpv(folder, options.validation_fraction, options.images_per_class, options.split_seed)


def _scan_glyphs(options: SourceOptions) -> Source:
    options.require_only("glyphs")
    return glyphs.scan_glyphs(
        glyph_images(options.folder), options.glyphs, options.images_per_class, options.split_seed
    )


ELPV_PROTOCOL = (
    "their own 25 % test split, cells weighted by the experts' confidence in training; here another random 25 % are "
    "held out, stratified by label and cell type, and every cell counts once"
)

CHOICES = ("source", "validation_source", "validation_fraction", "images_per_class", "split_seed", "group_by")

CATALOG = {
    entry.name: entry
    for entry in (
        Dataset(
            name="imagenet100",
            licence="ImageNet terms of access: non-commercial research and education only",
            uses=(*CHOICES, "label_column"),
            scan=_scan_imagenet100,
        ),
        Dataset(
            name="imagefolder",
            licence="that of your images",
            uses=(*CHOICES, "label_column"),
            scan=_scan_image_folder,
        ),
        Dataset(
            name="elpv",
            licence="CC BY-NC-SA 4.0 (images and labels of elpv-dataset; non-commercial use only)",
            uses=("source", "validation_fraction", "images_per_class", "split_seed"),
            scan=_scan_elpv,
            published=(
                Published("SVM (Deitsch et al. 2019)", 0.824, ELPV_PROTOCOL),
                Published("VGG19, pre-trained on ImageNet (Deitsch et al. 2019)", 0.884, ELPV_PROTOCOL),
            ),
        ),
        Dataset(
            name="glyphs",
            licence="generated here; glyph shapes of the DejaVu and STIX fonts (free licenses, shipped by matplotlib)",
            uses=("glyphs", "images_per_class", "split_seed"),
            scan=_scan_glyphs,
        ),
        *(
            Dataset(
                name=f"torchvision/{name}",
                licence=f"that of {name}'s publisher",
                uses=("source", "validation_fraction", "images_per_class", "split_seed", "group_by"),
                scan=partial(_scan_torchvision, name=name),
            )
            for name in DATA_SETS
        ),
    )
}
