"""Photovoltaic cells in electroluminescence images, from the package `elpv-dataset` (Deitsch et al. 2019).

Experts answered two questions for each cell: whether it is functional or defective, and whether they are sure. The
package's probability of a defect is 0 or 1/3 for functional, 2/3 or 1 for defective. The label here is the first answer
(probability above 1/2). The probability is also kept as an attribute.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from datasets.files import TRAIN, VALIDATION
from datasets.sources.index import (
    ImageIndex,
    ImageRef,
    Source,
    SourceError,
    checked,
    choose,
    listed,
    split_off,
    state_of,
)

CLASSES = ["functional", "defective"]


def package_folder() -> Path:
    """Return the installed package's folder with labels.csv and images/. Raise SourceError if it is not installed."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise SourceError("the package elpv-dataset is not installed; run `make setup`")
    return Path(spec.origin).parent / "data"


def scan_elpv(folder: Path, validation_fraction: float, images_per_class: int | None, seed: int) -> Source:
    """Find the cells listed in FOLDER/labels.csv (path, probability of a defect, cell type).

    The split is stratified by probability and cell type (mono- or polycrystalline), as in the paper.

    Raises:
        SourceError: labels.csv is missing or malformed, or lists images that do not exist.
    """
    labels = folder / "labels.csv"
    if not labels.is_file():
        raise SourceError(f"{labels} does not exist")
    rows = [_parse(labels, line) for line in labels.read_text("utf-8-sig", "replace").splitlines() if line.strip()]
    paths = {name: folder / name for name, _, _ in rows}
    if missing := [name for name, path in paths.items() if not path.is_file()]:
        raise SourceError(f"{labels} lists {len(missing)} images that do not exist: {listed(missing)}")
    statuses = {name: path.stat() for name, path in paths.items()}
    cell_types = {name: cell_type for name, _, cell_type in rows}

    def read_index() -> ImageIndex:
        refs = [
            ImageRef(name, int(probability > 0.5), str(paths[name]), 0, statuses[name].st_size, (probability,))
            for name, probability, _ in rows
        ]
        train, validation = split_off(
            refs, validation_fraction, seed, stratum=lambda ref: (ref.attributes, cell_types[ref.name])
        )
        splits = {TRAIN: choose(train, images_per_class, seed), VALIDATION: validation}
        return checked(ImageIndex(CLASSES, splits, ("defect_probability",)))

    return Source(state_of([*statuses.items(), ("labels.csv", labels.stat())]), read_index, [folder])


def _parse(labels: Path, line: str) -> tuple[str, float, str]:
    try:
        name, probability, cell_type = line.split()
        return name, float(probability), cell_type
    except ValueError:
        raise SourceError(f"{labels}: {line!r} is not 'path probability type'") from None
