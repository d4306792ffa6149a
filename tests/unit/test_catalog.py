from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import get_args

import pytest

from datasets.sources import elpv
from datasets.sources.catalog import CATALOG, SourceOptions, find_dataset, imagenet100_ids
from datasets.sources.index import SourceError
from pipeline.config.schema import DataConfig
from tests.unit.pictures import jpeg
from tests.unit.test_imagenet import arranged_tree


def test_catalog_describes_the_data_sets_that_the_configuration_allows():
    assert set(CATALOG) == set(get_args(DataConfig.model_fields["dataset"].annotation))
    assert {"imagenet100", "imagefolder", "elpv", "glyphs"} <= set(CATALOG)
    for name, entry in CATALOG.items():
        assert find_dataset(name) is entry
        assert entry.name == name
        assert entry.licence
        assert set(entry.uses) <= set(SourceOptions.__dataclass_fields__)
    with pytest.raises(
        ValueError, match="'cifar'; choose one of elpv, glyphs, imagefolder, imagenet100, torchvision/Country211"
    ):
        find_dataset("cifar")


def test_the_paper_s_100_categories():
    ids = imagenet100_ids()
    assert len(ids) == len(set(ids)) == 100
    assert ids == sorted(ids)
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in ids)


@pytest.mark.parametrize("name", ["imagenet100", "imagefolder"])
def test_a_missing_source_is_an_error(name, tmp_path):
    with pytest.raises(SourceError, match=f"data.source is missing; {name}"):
        find_dataset(name).scan(SourceOptions(folder=tmp_path))


@pytest.mark.parametrize(
    ("name", "options", "unused"),
    [
        ("imagenet100", {"group_by": "x", "validation_fraction": 0.1}, "data.validation_fraction or data.group_by"),
        ("imagenet100", {"validation_source": Path("v"), "label_column": "y"}, "source or data.label_column"),
        ("imagefolder", {"label_column": "y"}, "a folder of class folders does not use data.label_column"),
        ("torchvision/DTD", {"validation_source": Path("v")}, "torchvision/DTD does not use data.validation_source"),
        ("elpv", {"group_by": "x"}, "elpv does not use data.group_by"),
        ("glyphs", {"validation_fraction": 0.1}, "glyphs does not use data.source or data.validation_fraction"),
    ],
)
def test_an_option_that_a_source_does_not_use_is_an_error(name, options, unused, tmp_path):
    arranged_tree(tmp_path)
    with pytest.raises(SourceError, match=unused):
        find_dataset(name).scan(SourceOptions(folder=tmp_path, source=tmp_path, **options))


def test_elpv_has_the_published_counts(tmp_path):
    index = find_dataset("elpv").scan(SourceOptions(folder=tmp_path, validation_fraction=0.25)).read_index()
    assert index.classes == ["functional", "defective"]
    images = [ref for refs in index.splits.values() for ref in refs]
    assert len(images) == 2624
    probabilities = [ref.attributes[0] for ref in images]
    by_probability = {value: probabilities.count(value) for value in sorted(set(probabilities))}
    assert list(by_probability.values()) == [1508, 295, 106, 715]
    assert sum(ref.label for ref in images) == 106 + 715
    assert all(ref.label == (ref.attributes[0] > 0.5) for ref in images)
    assert len(index.splits["validation"]) == pytest.approx(656, abs=4)


def write_cells(root, lines, count):
    (root / "images").mkdir(parents=True)
    for number in range(count):
        (root / "images" / f"cell{number}.png").write_bytes(jpeg(seed=number))
    (root / "labels.csv").write_text("".join(lines))
    return root


def cells(count):
    kinds = [(0.0, "mono"), (0.0, "poly"), (0.3333333333333333, "mono"), (1.0, "poly")]
    return [f"images/cell{n}.png  {kinds[n % 4][0]}   {kinds[n % 4][1]}\n" for n in range(count)]


def test_elpv_split_is_stratified_by_probability_and_cell_type(tmp_path):
    write_cells(tmp_path, cells(32), 32)
    index = elpv.scan_elpv(tmp_path, 0.25, None, 0).read_index()
    kinds = [int(ref.name.removeprefix("images/cell").removesuffix(".png")) % 4 for ref in index.splits["validation"]]
    assert sorted(kinds) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_elpv_errors_are_explained(tmp_path):
    with pytest.raises(SourceError, match=r"labels\.csv does not exist"):
        elpv.scan_elpv(tmp_path, 0.25, None, 0)
    write_cells(tmp_path / "a", cells(8), 7)
    with pytest.raises(SourceError, match=r"1 images that do not exist: images/cell7\.png"):
        elpv.scan_elpv(tmp_path / "a", 0.25, None, 0)
    write_cells(tmp_path / "b", [*cells(8), "images/cell1.png sometimes mono\n"], 8)
    with pytest.raises(SourceError, match="sometimes mono' is not"):
        elpv.scan_elpv(tmp_path / "b", 0.25, None, 0)


def test_elpv_state_changes_with_labels_and_images(tmp_path):
    write_cells(tmp_path, cells(8), 8)
    states = [elpv.scan_elpv(tmp_path, 0.25, None, 0).state]
    for name in ("labels.csv", "images/cell3.png"):
        os.utime(tmp_path / name, ns=(1, 1))
        states.append(elpv.scan_elpv(tmp_path, 0.25, None, 0).state)
    assert len(set(states)) == 3
    copy = shutil.copytree(tmp_path, tmp_path.parent / "copy")
    assert elpv.scan_elpv(copy, 0.25, None, 0).state == states[-1]
