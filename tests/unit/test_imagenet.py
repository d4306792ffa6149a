from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile

import numpy as np
import pytest
import scipy.io

from datasets.sources.index import SourceError, read_bytes
from datasets.sources.tars import scan_imagenet
from tests.unit.pictures import jpeg

CLASSES = ["n01440764", "n02102040", "n03000684"]
OTHER = "n09999999"
PER_CLASS = 4
NUM_VALIDATION = 12


def train_images():
    """Return {wnid: {file name: bytes}}, with one class that is not among CLASSES."""
    return {
        wnid: {f"{wnid}_{n}.JPEG": jpeg(seed=10 * label + n) for n in range(PER_CLASS)}
        for label, wnid in enumerate([*CLASSES, OTHER])
    }


def validation_images():
    """Return [(wnid, file name, bytes)] in the order of the ground truth, with the classes mixed."""
    order = [*CLASSES, OTHER] * (NUM_VALIDATION // 4)
    return [
        (wnid, f"ILSVRC2012_val_{n:08d}.JPEG", jpeg(seed=500 + n)) for n, wnid in enumerate(reversed(order), start=1)
    ]


def write_tar(path, members):
    path.write_bytes(tar_bytes(members))


def tar_bytes(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def devkit_members():
    ids = [7, 2, 9, 4]
    synsets = np.zeros(4, [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)])
    for row, (number, wnid) in enumerate(zip(ids, [*CLASSES, OTHER], strict=True)):
        synsets[row] = (number, wnid, "some words", 0)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets.reshape(-1, 1)})
    number_of = dict(zip([*CLASSES, OTHER], ids, strict=True))
    truth = "".join(f"{number_of[wnid]}\n" for wnid, _, _ in validation_images())
    root = "ILSVRC2012_devkit_t12/data"
    return [
        (f"{root}/meta.mat", meta.getvalue()),
        (f"{root}/ILSVRC2012_validation_ground_truth.txt", truth.encode()),
    ]


def write_devkit(root):
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(tar_bytes(devkit_members())))


def write_kaggle_labels(root):
    rows = "".join(
        f"{name.removesuffix('.JPEG')},{wnid} 1 2 3 4 {OTHER} 5 6 7 8\n" for wnid, name, _ in validation_images()
    )
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + rows)


def write_train_tar(root):
    classes = [(f"{wnid}.tar", tar_bytes(files.items())) for wnid, files in train_images().items()]
    write_tar(root / "ILSVRC2012_img_train.tar", classes)


def write_validation_tar(root):
    write_tar(root / "ILSVRC2012_img_val.tar", [(name, data) for _, name, data in validation_images()])


def write_train_tree(folder):
    for wnid, files in train_images().items():
        (folder / wnid).mkdir(parents=True)
        for name, data in files.items():
            (folder / wnid / name).write_bytes(data)


def write_validation_tree(folder):
    for wnid, name, data in validation_images():
        (folder / wnid).mkdir(parents=True, exist_ok=True)
        (folder / wnid / name).write_bytes(data)


def write_flat_validation(folder):
    folder.mkdir(parents=True)
    for _, name, data in validation_images():
        (folder / name).write_bytes(data)


def official_tars(root):
    write_train_tar(root)
    write_validation_tar(root)
    write_devkit(root)


def arranged_tree(root):
    write_train_tree(root / "train")
    write_validation_tree(root / "val")


def kaggle(root):
    write_train_tree(root / "ILSVRC/Data/CLS-LOC/train")
    write_flat_validation(root / "ILSVRC/Data/CLS-LOC/val")
    write_kaggle_labels(root)


def class_tars_and_unpacked_devkit(root):
    (root / "train").mkdir()
    for wnid, files in train_images().items():
        (root / "train" / f"{wnid}.tar").write_bytes(tar_bytes(files.items()))
    write_flat_validation(root / "val")
    for name, data in devkit_members():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def tree_and_tar(root):
    write_train_tree(root / "train")
    write_validation_tar(root)
    write_kaggle_labels(root)


def train_tar_of_folders(root):
    members = [(f"train/{wnid}/{name}", data) for wnid, files in train_images().items() for name, data in files.items()]
    write_tar(root / "ILSVRC2012_img_train.tar", members)
    write_validation_tree(root / "val")


def kaggle_with_a_byte_order_mark(root):
    kaggle(root)
    labels = root / "LOC_val_solution.csv"
    labels.write_bytes(b"\xef\xbb\xbf" + labels.read_bytes())


LAYOUTS = [
    train_tar_of_folders,
    kaggle_with_a_byte_order_mark,
    official_tars,
    arranged_tree,
    kaggle,
    class_tars_and_unpacked_devkit,
    tree_and_tar,
]


def scan(root, per_class=None, seed=0):
    return scan_imagenet(root, CLASSES, per_class, seed)


def contents(images):
    return sorted((ref.name, ref.label, read_bytes(ref)) for ref in images)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images(tmp_path, layout):
    layout(tmp_path)
    index = scan(tmp_path).read_index()
    assert index.classes == CLASSES
    assert contents(index.splits["train"]) == sorted(
        (f"train/{wnid}/{name}", CLASSES.index(wnid), data)
        for wnid, files in train_images().items()
        if wnid != OTHER
        for name, data in files.items()
    )
    assert contents(index.splits["validation"]) == sorted(
        (f"val/{wnid}/{name}", CLASSES.index(wnid), data) for wnid, name, data in validation_images() if wnid != OTHER
    )


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout_gives_the_same_choice(tmp_path, layout):
    (tmp_path / "tars").mkdir()
    (tmp_path / "other").mkdir()
    official_tars(tmp_path / "tars")
    layout(tmp_path / "other")
    chosen = [scan(tmp_path / name, per_class=2, seed=3).read_index() for name in ("tars", "other")]
    assert len(chosen[0].splits["train"]) == 6
    assert contents(chosen[0].splits["train"]) == contents(chosen[1].splits["train"])
    assert contents(chosen[0].splits["train"]) != contents(scan(tmp_path / "tars", 2, 4).read_index().splits["train"])


def test_all_missing_classes_are_named(tmp_path):
    arranged_tree(tmp_path)
    shutil.rmtree(tmp_path / "train" / CLASSES[0])
    shutil.rmtree(tmp_path / "train" / CLASSES[2])
    shutil.rmtree(tmp_path / "val" / CLASSES[1])
    message = rf"2 of 3 .* train images: {CLASSES[0]}, {CLASSES[2]}\n1 of 3 .* validation images: {CLASSES[1]}"
    with pytest.raises(SourceError, match=message):
        scan(tmp_path).read_index()


def test_missing_parts_are_explained_with_the_layouts(tmp_path):
    with pytest.raises(SourceError, match=r"is not a folder.*these layouts are read"):
        scan(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"no ILSVRC2012 training and no validation images; these layouts are read"):
        scan(tmp_path)
    write_train_tar(tmp_path)
    with pytest.raises(SourceError, match="has no ILSVRC2012 validation images"):
        scan(tmp_path)


def test_validation_without_ground_truth_is_explained(tmp_path):
    write_train_tar(tmp_path)
    write_validation_tar(tmp_path)
    with pytest.raises(SourceError, match=r"without their classes; add ILSVRC2012_devkit_t12\.tar\.gz or"):
        scan(tmp_path)


def test_validation_images_without_ground_truth_are_named(tmp_path):
    arranged_tree(tmp_path)
    shutil.rmtree(tmp_path / "val")
    write_flat_validation(tmp_path / "val")
    write_devkit(tmp_path)
    (tmp_path / "val" / "ILSVRC2012_val_00000999.JPEG").write_bytes(jpeg())
    with pytest.raises(SourceError, match=r"devkit_t12\.tar\.gz has no class .*ILSVRC2012_val_00000999\.JPEG"):
        scan(tmp_path).read_index()


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"])
@pytest.mark.parametrize("left", [0.45, 0.001])
def test_truncated_tars_are_named(tmp_path, name, left):
    official_tars(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])
    with pytest.raises(SourceError, match=rf"{name}.*download it again"):
        scan(tmp_path).read_index()


@pytest.mark.parametrize(
    ("tar", "member"),
    [
        ("ILSVRC2012_img_train.tar", f"{CLASSES[1]}.tar"),
        ("ILSVRC2012_img_train.tar", f"{CLASSES[0]}_2.JPEG"),
        ("ILSVRC2012_img_val.tar", "ILSVRC2012_val_00000007.JPEG"),
    ],
)
def test_a_damaged_header_inside_a_tar_is_an_error(tmp_path, tar, member):
    official_tars(tmp_path)
    data = (tmp_path / tar).read_bytes()
    (tmp_path / tar).write_bytes(data.replace(member.encode(), member.replace("0", "1").encode()))
    with pytest.raises(SourceError, match=rf"{tar} .*neither a valid header nor the end.*download it again"):
        scan(tmp_path).read_index()


def test_tars_are_read_in_place(tmp_path):
    official_tars(tmp_path)
    before = sorted(tmp_path.iterdir())
    index = scan(tmp_path).read_index()
    assert {ref.path for ref in index.splits["train"]} == {str(tmp_path / "ILSVRC2012_img_train.tar")}
    assert sorted(tmp_path.iterdir()) == before


def test_state_changes_with_tars_and_labels(tmp_path):
    official_tars(tmp_path)
    states = [scan(tmp_path).state]
    for name in sorted(tmp_path.iterdir()):
        os.utime(name, ns=(1, 1))
        states.append(scan(tmp_path).state)
    assert len(set(states)) == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            "ImageId,PredictionString\nILSVRC2012_val_00000001,\n",
            r"solution\.csv, line 2: the PredictionString of .* is empty",
        ),
        ("ImageId,PredictionString\nILSVRC2012_val_00000001\n", r"line 2: there is no ImageId or no PredictionString"),
        ("id,boxes\nILSVRC2012_val_00000001,n1\n", r"line 2: .*; the columns are id, boxes"),
    ],
)
def test_unusable_kaggle_labels_are_named_with_their_line(tmp_path, rows, message):
    kaggle(tmp_path)
    (tmp_path / "LOC_val_solution.csv").write_text(rows)
    with pytest.raises(SourceError, match=message):
        scan(tmp_path).read_index()


def test_an_unusable_ground_truth_is_named_with_its_line(tmp_path):
    class_tars_and_unpacked_devkit(tmp_path)
    truth = tmp_path / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("7\nseven\n")
    with pytest.raises(SourceError, match=r"line 2 of data/ILSVRC2012_validation_ground_truth\.txt is 'seven'"):
        scan(tmp_path).read_index()


def test_a_train_tar_of_other_things_lists_the_layouts(tmp_path):
    write_validation_tree(tmp_path / "val")
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", [("images/1.JPEG", jpeg())])
    with pytest.raises(SourceError, match=r"(?s)no images of the 3 classes \(it has images/1\.JPEG\); these layouts"):
        scan(tmp_path).read_index()


def test_links_in_tars_are_refused(tmp_path):
    train_tar_of_folders(tmp_path)
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "a") as archive:
        link = tarfile.TarInfo(f"train/{CLASSES[0]}/link.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "other.JPEG"
        archive.addfile(link)
    with pytest.raises(SourceError, match=r"not files, such as links: train/\w+/link\.JPEG; unpack it"):
        scan(tmp_path).read_index()


def test_a_broken_link_among_flat_validation_images_is_a_bad_image(tmp_path):
    kaggle(tmp_path)
    one = sorted((tmp_path / "ILSVRC/Data/CLS-LOC/val").iterdir())[1]
    one.unlink()
    one.symlink_to(tmp_path / "nowhere")
    refs = {ref.path: ref for ref in scan(tmp_path).read_index().splits["validation"]}
    with pytest.raises(OSError, match=r"it is a link to .*nowhere"):
        read_bytes(refs[str(one)])
