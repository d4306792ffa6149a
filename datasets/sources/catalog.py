"""The data sets by name: what they are, under which licence, and where their images come from."""

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
    """What a data set may need to find, choose and split its images; `folder` is where the data is prepared."""

    folder: Path
    source: Path | None = None
    validation_source: Path | None = None
    validation_fraction: float = 0.2
    images_per_class: int | None = None
    split_seed: int = 0
    glyphs: GlyphSettings = field(default_factory=GlyphSettings)


@dataclass(frozen=True)
class Published:
    """A published top-1 accuracy (0 to 1), and how its protocol differs from ours."""

    label: str
    top1: float
    note: str


@dataclass(frozen=True)
class Dataset:
    """An entry of the catalogue.

    Attributes:
        classes: how many there are and where their names come from.
        mean, std: usual statistics by channel on a scale of 0 to 1, for use before any are measured.
        uses: the options besides `folder` that this data set reads.
        scan: finds the images, without reading them.
        published: what others report on the same images, shown in reports.
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
    """The entry of that name; ValueError with the known ones where there is none."""
    if name not in CATALOG:
        raise ValueError(f"no data set is called {name!r}; known are {', '.join(sorted(CATALOG))}")
    return CATALOG[name]


def imagenet100_ids() -> list[str]:
    """The 100 WordNet ids of the paper's ImageNet-100, sorted; an id's label is its position."""
    return IMAGENET100_IDS.read_text().split()


def glyph_images(folder: Path) -> Path:
    """Where the generated images of a prepared folder lie."""
    return folder / "images"


def _required_source(options: SourceOptions, dataset: str) -> Path:
    if options.source is None:
        raise SourceError(f"data.source is missing; {dataset} needs the folder that holds its images")
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
    "their own 25 % test split, cells weighted by the experts' confidence in training; ours holds out another random "
    "25 %, stratified by label and cell type, every cell counts once, and nothing is pre-trained"
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
            licence="generated here; glyph shapes of the DejaVu and STIX fonts (free licences, shipped by matplotlib)",
            classes=f"the letters {', '.join(glyphs.LETTERS)}",
            uses=("glyphs", "images_per_class", "split_seed"),
            scan=_scan_glyphs,
            mean=(0.5, 0.5, 0.5),
            std=(0.2, 0.2, 0.2),
        ),
    )
}
