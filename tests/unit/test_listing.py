"""CSV files as sources, groups that stay together, and torchvision's data sets."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from datasets.beton import load_manifest, split_keys
from datasets.prepare.build import BadImagesError
from datasets.prepare.prepare import prepare
from datasets.sources.catalog import CATALOG, SourceOptions, find_dataset
from datasets.sources.index import ImageRef, SourceError, group_number, split_off
from datasets.sources.torchvision_sets import DATA_SETS
from pipeline.cluster.driver import split_of
from pipeline.config.load import load_config
from tests.unit.pictures import decoded, encoded, jpeg, smooth_rgb, write_class_folders


def write_list(folder: Path, lines, images=None, name="labels.csv", encoding="utf-8-sig") -> Path:
    """Write a CSV file (by default with a byte order mark) and its images, which are those of its first column."""
    images = [line.split(",")[0].strip('"') for line in lines[1:]] if images is None else images
    for number, image in enumerate(images):
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        (folder / image).write_bytes(jpeg(seed=number))
    (folder / name).write_text("\r\n".join(lines), encoding)
    return folder / name


def index_of(source, dataset="imagefolder", **options):
    return find_dataset(dataset).scan(SourceOptions(folder=Path("out"), source=Path(source), **options)).read_index()


def names(index, split):
    return sorted(ref.name for ref in index.splits[split])


def test_a_csv_file_gives_paths_labels_and_splits(tmp_path):
    lines = [
        "split,label,path",
        "train,été,é/a.jpg",
        'Train,"a, b","b ""1"".jpg"',
        "val,été,c.jpg",
        'test,"a, b",é/d.jpg',
    ]
    file = write_list(tmp_path / "in", lines, ["é/a.jpg", 'b "1".jpg', "c.jpg", "é/d.jpg"])
    with pytest.raises(SourceError, match="1 of 2 classes have no validation images: a, b"):
        index_of(file)
    file.write_text(file.read_text("utf-8-sig").replace("test,", "validation,"), "utf-8")
    index = index_of(file)
    assert index.classes == ["a, b", "été"]
    assert names(index, "train") == ['b "1".jpg', "é/a.jpg"]
    assert names(index, "validation") == ["c.jpg", "é/d.jpg"]
    done = prepare("imagefolder", tmp_path / "out", source=file, num_processes=1)
    assert [split.class_counts for split in done.manifest.splits.values()] == [[1, 1], [1, 1]]
    assert prepare("imagefolder", tmp_path / "out", source=file, num_processes=1).unchanged


def test_test_rows_of_a_csv_file_are_counted_if_they_are_not_used(tmp_path):
    lines = [f"{split}{n}.jpg,{n % 2},{split}" for split in ("train", "test", "val") for n in range(4)]
    file = write_list(tmp_path / "in", ["path,label,split", *lines])
    done = prepare("imagefolder", tmp_path / "out", source=file, num_processes=1)
    assert done.not_images == {"test row": 4}
    assert [split.count for split in done.manifest.splits.values()] == [4, 4]
    file = write_list(tmp_path / "in", ["path,label,split", *lines[:8]])
    done = prepare("imagefolder", tmp_path / "out", source=file, num_processes=1, force=True)
    assert done.not_images == {}
    assert [split.count for split in done.manifest.splits.values()] == [4, 4]


def test_classes_that_are_numbers_are_sorted_by_value(tmp_path):
    file = write_list(tmp_path, ["path,grade", *(f"{n}.jpg,{n % 12}" for n in range(24))])
    index = index_of(file, label_column="grade")
    assert index.classes == [str(n) for n in range(12)]
    assert all(int(ref.name.split(".")[0]) % 12 == ref.label for refs in index.splits.values() for ref in refs)


def test_mistakes_of_a_csv_file_are_reported_together(tmp_path):
    lines = [
        "path,label,split",
        "a.jpg,1,train",
        "b.jpg,2,train",
        "./a.jpg,2,train",
        "c.jpg,1,dusk",
        "d.jpg,1,",
        "e.jpg,2,val",
    ]
    with pytest.raises(SourceError) as caught:
        index_of(write_list(tmp_path, lines))
    message = str(caught.value)
    assert "(line 4): ./a.jpg is already listed in line 2" in message
    assert "(line 5): there is no split dusk; write train, validation or test" in message
    assert "has a split for some images, but not for all" in message


def test_lines_without_an_image_are_bad_images(tmp_path):
    good = [f"{n}.jpg,{n % 2}" for n in range(8)]
    bad = ["gone.jpg,1", ",1", "0x.jpg,", "folder,1", "short"]
    file = write_list(tmp_path / "in", ["path,label", *good, *bad], [*(line.split(",")[0] for line in good), "0x.jpg"])
    (tmp_path / "in/folder").mkdir()
    with pytest.raises(BadImagesError) as caught:
        prepare("imagefolder", tmp_path / "out", source=file)
    assert dict(caught.value.bad) == {
        f"{file} (line 10)": "gone.jpg: No such file or directory",
        f"{file} (line 11)": "it has no path",
        f"{file} (line 12)": "it has no label",
        f"{file} (line 13)": "folder: it is a folder, not a file",
        f"{file} (line 14)": "it has no label",
    }
    manifest = prepare("imagefolder", tmp_path / "out", source=file, on_bad_image="skip", num_processes=1).manifest
    assert len(manifest.skipped) == 5
    assert sum(split.count for split in manifest.splits.values()) == 8


def test_a_csv_file_needs_its_columns_and_valid_quotes(tmp_path):
    file = write_list(tmp_path, ["file;label", "a.jpg;1"], [])
    with pytest.raises(
        SourceError, match="no column path and no column label; its first line has the columns file;label"
    ):
        index_of(file)
    file.write_text("")
    with pytest.raises(SourceError, match="has the columns none"):
        index_of(file)
    file.write_text('path,label\n"a.jpg,1')
    with pytest.raises(SourceError, match=r"labels\.csv, line 1: unexpected end of data"):
        index_of(file)
    file.write_text("path,label\n")
    with pytest.raises(SourceError, match="there is only one class"):
        index_of(file)
    with pytest.raises(SourceError, match="write a column split instead"):
        index_of(file, validation_source=tmp_path)


def refs(num_groups, size, num_classes=2):
    """Groups of consecutive images; each group has images of one class, or of all."""
    return [
        ImageRef(f"g{n // size}/{n}", n % num_classes, "", 0, 0, group=f"g{n // size}")
        for n in range(num_groups * size)
    ]


def test_groups_stay_on_one_side_and_classes_keep_their_share():
    images = refs(100, 6)
    for seed in range(3):
        train, validation = split_off(images, 0.2, seed)
        assert not {ref.group for ref in train} & {ref.group for ref in validation}
        assert sorted(train + validation) == sorted(images)
        assert [sum(ref.label == n for ref in validation) for n in range(2)] == [60, 60]
    assert split_off(images[::-1], 0.2, 0)[1] != split_off(images, 0.2, 1)[1]
    assert set(split_off(images[::-1], 0.2, 0)[1]) == set(split_off(images, 0.2, 0)[1])


def test_every_class_is_on_both_sides_if_groups_allow_it():
    rare = [ImageRef(f"rare{n}", 2, "", 0, 0, group=f"r{n // 50}") for n in range(100)]
    train, validation = split_off([*refs(20, 4), *rare], 0.1, 0)
    assert [sum(ref.label == 2 for ref in part) for part in (train, validation)] == [50, 50]
    with pytest.raises(SourceError, match=r"too few groups: rare0; give a data\.group_by with smaller groups"):
        split_off([*refs(20, 4), *(ref._replace(group="r") for ref in rare)], 0.1, 0)


def test_a_regular_expression_or_a_column_groups_images(tmp_path):
    folder = tmp_path / "in"
    for label in ("cat", "dog"):
        write_class_folders(folder, {label: 0})
        for n in range(60):
            (folder / label / f"scene{n // 2:02d}_{n}.jpg").write_bytes(jpeg(seed=n))
    for pattern in (r"scene(\d+)_", r"scene\d+"):
        index = index_of(folder, group_by=pattern, validation_fraction=0.5)
        groups = [{ref.name[:11][4:] for ref in index.splits[name]} for name in ("train", "validation")]
        assert list(map(len, groups)) == [15, 15]
        assert not set.intersection(*groups)
    lines = [
        f"{label}/{file.name},{label},s{file.name[5:7]}"
        for label in ("cat", "dog")
        for file in (folder / label).iterdir()
    ]
    (folder / "labels.csv").write_text("\n".join(["path,label,scene", *lines]))
    by_column = index_of(folder / "labels.csv", group_by="scene", validation_fraction=0.5)
    assert {ref.group for refs in by_column.splits.values() for ref in refs} == {f"s{n:02d}" for n in range(30)}
    with pytest.raises(SourceError, match=r"'x\(y\)' finds no group in the names of 120 images"):
        index_of(folder, group_by="x(y)")
    with pytest.raises(SourceError, match=r"only 6 groups of validation images; .* at least 10 are needed"):
        index_of(folder, group_by=r"_(\d)\d*", validation_fraction=0.3)


def test_given_splits_must_not_share_groups(tmp_path):
    lines = [f"{n}.jpg,{n % 2},{'train' if n < 30 else 'validation'},{n // 3 * 3}" for n in range(60)]
    lines[29] = "29.jpg,1,train,30"
    file = write_list(tmp_path, ["path,label,split,scene", *lines])
    with pytest.raises(SourceError, match="groups that are in training and in validation: 30"):
        index_of(file, group_by="scene")


def test_the_manifest_has_the_group_of_every_sample(tmp_path):
    file = write_list(tmp_path / "in", ["path,label,scene", *(f"{n}.jpg,{n % 2},é{n // 4}" for n in range(80))])
    prepare("imagefolder", tmp_path / "out", source=file, group_by="scene", validation_fraction=0.5, num_processes=1)
    groups = [split.groups for split in load_manifest(tmp_path / "out").splits.values()]
    assert [len(numbers) for numbers in groups] == [40, 40]
    assert {*groups[0], *groups[1]} == {group_number(f"é{n}") for n in range(20)}
    assert not {*groups[0]} & {*groups[1]}
    config = load_config("imagefolder", [f"data.folder={tmp_path / 'out'}"])
    keys_N = split_keys(config.data.folder)
    for fit, apply in split_of(config).parts(keys_N):
        assert not {*keys_N[fit]} & {*keys_N[apply]}
        assert len(fit) + len(apply) == 40
    assert keys_N.tolist() == groups[1]


def write_gtsrb(root: Path) -> Path:
    """Write PPM images of four classes, without names, in GTSRB's layout."""
    for label in range(4):
        folder = root / f"gtsrb/GTSRB/Training/{label:05d}"
        folder.mkdir(parents=True)
        for n in range(3):
            (folder / f"{n}.ppm").write_bytes(encoded(Image.fromarray(smooth_rgb(30 + n, 25, 10 * label + n)), "PPM"))
    test = root / "gtsrb/GTSRB/Final_Test/Images"
    test.mkdir(parents=True)
    for n in range(8):
        (test / f"{n:05d}.ppm").write_bytes(encoded(Image.fromarray(smooth_rgb(40, 40, 500 + n)), "PPM"))
    lines = ["Filename;Width;ClassId", *(f"{n:05d}.ppm;40;{n % 4}" for n in range(8))]
    (root / "gtsrb/GT-final_test.csv").write_text("\n".join(lines))
    return root


def write_pets(root: Path) -> Path:
    folder = root / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for split, start in (("trainval", 0), ("test", 6)):
        files = [(("Abyssinian", "great_dane")[n % 2] + f"_{n}", n % 2 + 1) for n in range(start, start + 6)]
        (folder / f"annotations/{split}.txt").write_text("".join(f"{name} {label} 1 1\n" for name, label in files))
        for n, (name, _) in enumerate(files):
            (folder / f"images/{name}.jpg").write_bytes(jpeg(seed=start + n))
    return root


def write_imagenette(root: Path) -> Path:
    for split in ("train", "val"):
        write_class_folders(root / "imagenette2" / split, {"n01440764": 3, "n02102040": 3}, seed=len(split))
    for file in list((root / "imagenette2").rglob("*.jpg")):
        file.rename(file.with_suffix(".JPEG"))
    return root


@pytest.mark.parametrize(
    ("name", "write", "classes", "counts"),
    [
        ("GTSRB", write_gtsrb, ["0", "1", "2", "3"], [[3] * 4, [2] * 4]),
        ("OxfordIIITPet", write_pets, ["Abyssinian", "Great Dane"], [[3, 3], [3, 3]]),
        ("Imagenette", write_imagenette, ["tench", "English springer"], [[3, 3], [3, 3]]),
    ],
)
def test_data_sets_of_torchvision_are_read_from_their_folder(tmp_path, name, write, classes, counts):
    dataset, root = f"torchvision/{name}", write(tmp_path / "root")
    manifest = prepare(dataset, tmp_path / "out", source=root, num_processes=1).manifest
    assert manifest.classes == classes
    assert [split.class_counts for split in manifest.splits.values()] == counts
    assert prepare(dataset, tmp_path / "out", source=root, num_processes=1).unchanged
    if name == "OxfordIIITPet":
        (root / "oxford-iiit-pet/images/Abyssinian_0.jpg").unlink()
        with pytest.raises(
            SourceError, match=r"lacks 1 files of OxfordIIITPet: oxford-iiit-pet/images/Abyssinian_0\.jpg"
        ):
            index_of(root, dataset)


def test_a_missing_data_set_of_torchvision_is_explained(tmp_path):
    for name in DATA_SETS:
        assert f"torchvision/{name}" in CATALOG
        with pytest.raises(SourceError, match=f"does not have {name} as torchvision lays it out.*--download"):
            index_of(tmp_path, f"torchvision/{name}")
    with pytest.raises(OSError, match=r"torchvision cannot download StanfordCars .* cannot be downloaded anymore"):
        index_of(tmp_path, "torchvision/StanfordCars", download=True)


@pytest.mark.parametrize("kind", ["PPM", "PNG", "BMP", "TIFF", "WEBP", "AVIF"])
def test_every_format_is_converted(tmp_path, kind):
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "AVIF" else {}
    images = {n: smooth_rgb(64, 48, n) for n in range(4)}
    for n, pixels in images.items():
        file = tmp_path / f"in/{n % 2}/{n}.{kind.lower()}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(Image.fromarray(pixels), kind, **options))
    prepare("imagefolder", tmp_path / "out", source=tmp_path / "in", jpeg_quality=95, num_processes=1)
    for sample in (tmp_path / "out/samples").iterdir():
        errors = [abs(decoded(sample.read_bytes()) - pixels).mean() for pixels in images.values()]
        assert min(errors) < 3 < sorted(errors)[1]
    assert list((tmp_path / "out/samples").iterdir())
