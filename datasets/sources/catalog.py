"""The catalog of data sets: their descriptions, licenses and sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets.sources import elpv, glyphs
from datasets.sources.folders import scan_image_folder
from datasets.sources.glyphs import GlyphSettings
from datasets.sources.index import Channels, Source, SourceError
from datasets.sources.tars import scan_imagenet

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET100_IDS = Path(__file__).parent / "imagenet100.txt"


@dataclass(frozen=True)
class SourceOptions:
    """The options for finding, choosing and splitting images; `folder` is where the data is prepared."""

    folder: Path
    source: Path | None = None
    validation_source: Path | None = None
    validation_fraction: float = 0.2
    images_per_class: int | None = None
    split_seed: int = 0
    glyphs: GlyphSettings = field(default_factory=GlyphSettings)


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
        classes: the number of classes and the origin of their names.
        mean, std: usual statistics by channel on a scale of 0 to 1, used before any are measured.
        uses: the options besides `folder` that this data set reads.
        scan: finds the images, without reading them.
        published: results of others on the same images, shown in reports.
    """

    name: str
    description: str
    licence: str
    classes: str
    uses: tuple[str, ...]
    scan: Callable[[SourceOptions], Source]
    mean: Channels = IMAGENET_MEAN
    std: Channels = IMAGENET_STD
    published: tuple[Published, ...] = ()


def find_dataset(name: str) -> Dataset:
    """Return the entry of that name; raise ValueError with the known names if there is none."""
    if name not in CATALOG:
        raise ValueError(f"there is no data set {name!r}; choose one of {', '.join(sorted(CATALOG))}")
    return CATALOG[name]


def imagenet100_ids() -> list[str]:
    """Return the 100 WordNet ids of the paper's ImageNet-100, sorted; an id's label is its position."""
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
    return scan_imagenet(source, imagenet100_ids(), options.images_per_class, options.split_seed)


def _scan_image_folder(options: SourceOptions) -> Source:
    return scan_image_folder(
        _required_source(options, "imagefolder"),
        options.validation_source,
        options.validation_fraction,
        options.images_per_class,
        options.split_seed,
    )


def _scan_elpv(options: SourceOptions) -> Source:
    folder = options.source or elpv.package_folder()
    return elpv.scan_elpv(folder, options.validation_fraction, options.images_per_class, options.split_seed)


def _scan_glyphs(options: SourceOptions) -> Source:
    return glyphs.scan_glyphs(
        glyph_images(options.folder), options.glyphs, options.images_per_class, options.split_seed
    )


ELPV_PROTOCOL = (
    "their own 25 % test split, cells weighted by the experts' confidence in training; here another random 25 % are "
    "held out, stratified by label and cell type, every cell counts once, and nothing is pre-trained"
)

CATALOG = {
    entry.name: entry
    for entry in (
        Dataset(
            name="imagenet100",
            description="100 categories of ILSVRC2012, the paper's choice, from a tree or the official tar files",
            licence="ImageNet terms of access: non-commercial research and education only",
            classes="100 WordNet ids, listed in datasets/imagenet100.txt",
            uses=("source", "images_per_class", "split_seed"),
            scan=_scan_imagenet100,
        ),
        Dataset(
            name="imagefolder",
            description="any folder of class folders, with or without a validation folder",
            licence="that of your images",
            classes="the names of the class folders, sorted",
            uses=("source", "validation_source", "validation_fraction", "images_per_class", "split_seed"),
            scan=_scan_image_folder,
        ),
        Dataset(
            name="elpv",
            description="2,624 photovoltaic cells in electroluminescence images, functional or defective "
            "(Deitsch et al. 2019), from the package elpv-dataset",
            licence="CC BY-NC-SA 4.0 (images and labels of elpv-dataset; non-commercial use only)",
            classes="functional, defective (probability of a defect above 1/2)",
            uses=("source", "validation_fraction", "images_per_class", "split_seed"),
            scan=_scan_elpv,
            mean=(0.597, 0.597, 0.597),
            std=(0.16, 0.16, 0.16),
            published=(
                Published("SVM (Deitsch et al. 2019)", 0.824, ELPV_PROTOCOL),
                Published("VGG19, pre-trained on ImageNet (Deitsch et al. 2019)", 0.884, ELPV_PROTOCOL),
            ),
        ),
        Dataset(
            name="glyphs",
            description="generated letters of widely varying height over textured backgrounds",
            licence="generated here; glyph shapes of the DejaVu and STIX fonts (free licenses, shipped by matplotlib)",
            classes=f"the letters {', '.join(glyphs.LETTERS)}",
            uses=("glyphs", "images_per_class", "split_seed"),
            scan=_scan_glyphs,
            mean=(0.5, 0.5, 0.5),
            std=(0.2, 0.2, 0.2),
        ),
    )
}
