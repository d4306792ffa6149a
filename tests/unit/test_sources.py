from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from datasets.sources.folders import scan_image_folder, walk_images
from datasets.sources.index import (
    ImageIndex,
    ImageRef,
    SourceError,
    checked,
    choose,
    counted,
    is_ignored,
    listed,
    read_bytes,
    split_off,
    stored_chunks,
)
from tests.unit.pictures import jpeg, write_class_folders

PERMISSIONS_HOLD = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
"""Start a command that may only read and write what permissions allow, also as root."""


def refs(num_classes: int, per_class: int) -> list[ImageRef]:
    return [ImageRef(f"{label}/{n:04d}", label, "", 0, 0) for label in range(num_classes) for n in range(per_class)]


def scan(source, validation=None, fraction=0.25, per_class=None, seed=0):
    return scan_image_folder(source, validation, fraction, per_class, seed)


def names(images):
    return {ref.name for ref in images}


def test_split_is_stratified_and_complete():
    images = refs(3, 40)
    train, validation = split_off(images, 0.25, seed=0)
    assert names(train) | names(validation) == names(images)
    assert not names(train) & names(validation)
    assert [sum(ref.label == label for ref in validation) for label in range(3)] == [10, 10, 10]


def test_choices_do_not_depend_on_the_order_of_listing_but_on_the_seed():
    images = refs(3, 40)
    backwards = images[::-1]
    assert [names(part) for part in split_off(images, 0.3, 1)] == [names(part) for part in split_off(backwards, 0.3, 1)]
    assert names(choose(images, 5, 1)) == names(choose(backwards, 5, 1))
    assert stored_chunks(images, 1) == stored_chunks(backwards, 1)
    assert names(split_off(images, 0.3, 2)[1]) != names(split_off(images, 0.3, 1)[1])
    assert names(choose(images, 5, 2)) != names(choose(images, 5, 1))
    assert stored_chunks(images, 2) != stored_chunks(images, 1)


def test_new_images_hardly_move_the_others():
    images = refs(1, 100)
    before = names(split_off(images, 0.3, 0)[1])
    after = names(split_off([*images, *(ImageRef(f"0/new{n}", 0, "", 0, 0) for n in range(10))], 0.3, 0)[1])
    assert len(before - after) <= 10
    assert len(before & after) >= 20


def test_images_per_class_keeps_all_of_a_smaller_class():
    images = refs(1, 3) + [ImageRef(f"1/{n}", 1, "", 0, 0) for n in range(9)]
    chosen = choose(images, 5, 0)
    assert [sum(ref.label == label for ref in chosen) for label in (0, 1)] == [3, 5]
    assert choose(images, None, 0) == images


def test_storage_order_mixes_the_classes():
    labels = [ref.label for chunk in stored_chunks(refs(10, 50), 0) for ref in chunk]
    assert len(set(labels[:20])) >= 6


def test_every_stratum_keeps_an_image_on_both_sides():
    for fraction in (0.001, 0.999):
        train, validation = split_off(refs(2, 2), fraction, 0)
        assert len(train) == len(validation) == 2
    with pytest.raises(SourceError, match="0/0000 is the only image of its class"):
        split_off(refs(2, 1), 0.5, 0)


def test_plain_files_and_parts_of_files_are_read_alike(tmp_path):
    path = tmp_path / "archive"
    path.write_bytes(b"0123456789")
    assert read_bytes(ImageRef("a", 0, str(path), 0, 10)) == b"0123456789"
    assert read_bytes(ImageRef("a", 0, str(path), 3, 4)) == b"3456"
    with pytest.raises(OSError, match="2 bytes where 4 were expected"):
        read_bytes(ImageRef("a", 0, str(path), 8, 4))


def test_classes_without_images_are_all_named():
    index = ImageIndex(["a", "b", "c"], {"train": refs(1, 1), "validation": refs(3, 1)[1:]})
    with pytest.raises(SourceError, match=r"2 of 3 classes have no train images: b, c\n1 of 3 .* validation images: a"):
        checked(index)
    with pytest.raises(SourceError, match="only one class"):
        checked(ImageIndex(["a"], {"train": refs(1, 1)}))


def test_long_lists_are_cut():
    assert listed(["a", "b"], limit=2) == "a, b"
    assert listed(["a", "b", "c", "d"], limit=2) == "a, b and 2 more"


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "labels.csv", "notes.TXT", "._001.jpg", "desktop.ini"])
def test_files_that_accompany_images_are_ignored(name):
    assert is_ignored(name)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.png", "a.heic", "a.zip", "a", "a.jpg.part"])
def test_any_other_file_must_be_an_image(name):
    assert not is_ignored(name)


def test_class_folders_are_sorted_and_split(tmp_path):
    write_class_folders(tmp_path, {"dog": 8, "Cat": 4, "ant": 4})
    (tmp_path / "dog" / "readme.txt").write_text("about dogs")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    index = scan(tmp_path).read_index()
    assert index.classes == ["Cat", "ant", "dog"]
    assert {split: len(images) for split, images in index.splits.items()} == {"train": 12, "validation": 4}
    ref = index.splits["train"][0]
    assert read_bytes(ref) == (tmp_path / ref.name).read_bytes()
    assert index.classes[ref.label] == ref.name.split("/")[0]


@pytest.mark.parametrize("name", ["val", "validation"])
def test_train_and_validation_folders_are_found(tmp_path, name):
    write_class_folders(tmp_path / "train", {"a": 2, "b": 3})
    write_class_folders(tmp_path / name, {"a": 1, "b": 1}, seed=5)
    write_class_folders(tmp_path / "test", {"a": 9})
    index = scan(tmp_path).read_index()
    assert names(index.splits["train"]) == {"train/a/000.jpg", "train/a/001.jpg"} | {
        f"train/b/00{n}.jpg" for n in range(3)
    }
    assert names(index.splits["validation"]) == {"validation/a/000.jpg", "validation/b/000.jpg"}


def test_the_validation_folder_may_be_elsewhere(tmp_path):
    write_class_folders(tmp_path / "one", {"a": 2, "b": 3})
    write_class_folders(tmp_path / "two", {"a": 1, "b": 1})
    index = scan(tmp_path / "one", tmp_path / "two").read_index()
    assert {split: len(images) for split, images in index.splits.items()} == {"train": 5, "validation": 2}
    assert scan(tmp_path / "one", None).read_index().splits["validation"][0].path.startswith(str(tmp_path / "one"))


def test_a_train_folder_without_validation_is_split(tmp_path):
    write_class_folders(tmp_path / "train", {"a": 4, "b": 4})
    index = scan(tmp_path).read_index()
    assert {split: len(images) for split, images in index.splits.items()} == {"train": 6, "validation": 2}


def test_a_class_may_be_called_train(tmp_path):
    write_class_folders(tmp_path, {"plane": 2, "train": 2})
    assert scan(tmp_path).read_index().classes == ["plane", "train"]


def test_images_per_class_does_not_limit_validation(tmp_path):
    write_class_folders(tmp_path, {"a": 8, "b": 8})
    whole, some = scan(tmp_path).read_index(), scan(tmp_path, per_class=3).read_index()
    assert len(some.splits["train"]) == 6
    assert names(some.splits["validation"]) == names(whole.splits["validation"])


def test_linked_files_are_followed(tmp_path):
    write_class_folders(tmp_path / "real", {"a": 2, "b": 2})
    (tmp_path / "linked").mkdir()
    for name in ("a", "b"):
        (tmp_path / "linked" / name).mkdir()
        for image in (tmp_path / "real" / name).iterdir():
            (tmp_path / "linked" / name / image.name).symlink_to(image)
    index = scan(tmp_path / "linked").read_index()
    assert read_bytes(index.splits["train"][0]) == (tmp_path / "real" / index.splits["train"][0].name).read_bytes()


def make(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(jpeg())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["notes.txt"], "has no class folders"),
        (["a/notes.txt", "b/notes.txt"], "have no images"),
        (["a/1.jpg", "a/2.jpg"], "only one class"),
        (["a/1.jpg", "a/2.jpg", "b/notes.txt"], "no train images: b"),
        (["a/x/1.jpg", "b/y/2.jpg", "b/3.jpg"], "class folders in .* have folders: a/x, b/y"),
        (["a/1.jpg", "a/2.jpg", "b/1.jpg"], "b/1.jpg is the only image of its class"),
        (["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/c/1.jpg"], "does not have: c"),
        (["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"], "no validation images: b"),
        (["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "validation/a/1.jpg"], "both val and validation"),
    ],
)
def test_unusable_folders_are_explained(tmp_path, files, message):
    make(tmp_path, *files)
    with pytest.raises(SourceError, match=message):
        scan(tmp_path).read_index()


def test_missing_folders_are_explained(tmp_path):
    with pytest.raises(SourceError, match=r"data\.source .*nowhere is not a folder"):
        scan(tmp_path / "nowhere")
    write_class_folders(tmp_path, {"a": 2, "b": 2})
    with pytest.raises(SourceError, match=r"data\.validation_source .*nowhere is not a folder"):
        scan(tmp_path, tmp_path / "nowhere")


def test_state_changes_with_every_change_and_only_then(tmp_path):
    write_class_folders(tmp_path, {"a": 3, "b": 3})
    state = scan(tmp_path).state
    assert scan(tmp_path).state == state
    one = tmp_path / "a" / "000.jpg"
    os.utime(one, ns=(1, 1))
    touched = scan(tmp_path).state
    one.rename(tmp_path / "b" / "999.jpg")
    moved = scan(tmp_path).state
    (tmp_path / "c").mkdir()
    added = scan(tmp_path).state
    assert len({state, touched, moved, added}) == 4


def test_odd_entries_are_bad_images_or_counted(tmp_path):
    """Broken links, pipes, sockets and link loops are listed and fail when they are read; nothing blocks."""
    write_class_folders(tmp_path, {"a": 3, "b": 3})
    folder = tmp_path / "a"
    (folder / "gone.jpg").symlink_to("/nowhere/at-all.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "null.jpg").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.jpg"))
    (folder / "notes.txt").write_text("about a")
    (folder / ".hidden.jpg").touch()
    (folder / "__MACOSX").mkdir()
    (tmp_path / "loose.jpg").touch()
    (tmp_path / ".git").mkdir()
    os.mkfifo(tmp_path / "pipe")
    source = scan(tmp_path)
    splits = source.read_index().splits
    failed = {}
    for ref in (ref for images in splits.values() for ref in images):
        try:
            read_bytes(ref)
        except OSError as error:
            failed[ref.name] = str(error)
    assert failed == {
        "a/gone.jpg": "it is a link to /nowhere/at-all.jpg, which cannot be opened (No such file or directory)",
        "a/loop.jpg": "it is a link to loop.jpg, which cannot be opened (Too many levels of symbolic links)",
        "a/pipe.jpg": "it is a named pipe, not a file",
        "a/null.jpg": "it is a device, not a file",
        "a/socket.jpg": "it is a socket, not a file",
    }
    assert source.skipped == {
        ".txt file": 1,
        "hidden file": 1,
        "hidden folder": 2,
        ".jpg file beside the class folders": 1,
        "named pipe": 1,
    }


@pytest.mark.parametrize("name", ["c", "train", "val"])
def test_a_broken_link_in_place_of_a_class_or_split_is_an_error(tmp_path, name):
    write_class_folders(tmp_path / "train" if name == "val" else tmp_path, {"a": 2, "b": 2})
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=f"has links that cannot be followed: {name}; restore"):
        scan(tmp_path)


def test_linked_class_folders_are_followed(tmp_path):
    write_class_folders(tmp_path / "real", {"a": 2, "b": 2})
    (tmp_path / "linked").mkdir()
    for name in ("a", "b"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "real" / name)
    assert scan(tmp_path / "linked").read_index().classes == ["a", "b"]


def test_folders_beside_train_and_validation_are_counted(tmp_path):
    for split in ("train", "val", "test"):
        write_class_folders(tmp_path / split, {"a": 2, "b": 2})
    assert scan(tmp_path).skipped == {"folder beside the train folder": 1}


READ_ALL = """
import sys
from pathlib import Path
from datasets.sources.folders import scan_image_folder
from datasets.sources.index import read_bytes
for folder in sys.argv[1:]:
    try:
        refs = scan_image_folder(Path(folder), None, 0.5, None, 0).read_index().splits["train"]
        [read_bytes(ref) for ref in refs]
    except (OSError, ValueError) as error:
        print(type(error).__name__, error)
"""


def test_folders_and_files_without_permission_are_errors(tmp_path):
    write_class_folders(tmp_path / "folder", {"a": 2, "b": 2})
    write_class_folders(tmp_path / "file", {"a": 2, "b": 2})
    write_class_folders(tmp_path / "listed", {"a": 2, "b": 2})
    (tmp_path / "folder" / "b").chmod(0)
    (tmp_path / "listed" / "b").chmod(0o444)
    for image in (tmp_path / "file" / "b").iterdir():
        image.chmod(0)
    folders = [tmp_path / name for name in ("folder", "listed", "file")]
    command = [*PERMISSIONS_HOLD, sys.executable, "-c", READ_ALL, *folders]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert child.stdout.splitlines() == [
        f"SourceError the folder {tmp_path}/folder/b cannot be listed: Permission denied",
        f"SourceError the folder {tmp_path}/listed/b cannot be listed: Permission denied",
        "OSError Permission denied",
    ]


def test_class_names_in_two_unicode_forms_are_an_error_that_shows_them(tmp_path):
    write_class_folders(tmp_path / "train", {"caf\u00e9": 2, "b": 2})
    write_class_folders(tmp_path / "val", {"cafe\u0301": 2, "b": 2})
    with pytest.raises(
        SourceError, match=r"Unicode forms .*: 'caf\\xe9' in .*train and 'cafe\\u0301' in .*val; rename"
    ):
        scan(tmp_path)
    write_class_folders(tmp_path / "alone", {"caf\u00e9": 2, "cafe\u0301": 2})
    with pytest.raises(SourceError, match=r"Unicode forms .*'cafe\\u0301' in .* and 'caf\\xe9' in"):
        scan(tmp_path / "alone")


def test_names_that_are_the_same_as_text_are_an_error(tmp_path):
    write_class_folders(tmp_path / "class", {os.fsdecode(b"\xe9"): 2, r"\xe9": 2})
    with pytest.raises(SourceError, match=r"several classes have the same name: \\xe9; rename"):
        scan(tmp_path / "class").read_index()
    write_class_folders(tmp_path / "file", {"a": 2, "b": 2})
    for name in (os.fsdecode(b"\xe9.jpg"), r"\xe9.jpg"):
        (tmp_path / "file" / "a" / name).write_bytes(jpeg())
    with pytest.raises(SourceError, match=r"several images have the same name: a/\\xe9\.jpg; rename"):
        scan(tmp_path / "file").read_index()


def test_a_walk_lists_images_once_and_counts_the_rest(tmp_path):
    write_class_folders(tmp_path / "photos", {"x": 1})
    outside = write_class_folders(tmp_path / "outside", {"y": 1})
    root = tmp_path / "photos"
    for name in ("a.JPEG", "b.webp", "c.bmp", "d.tif", "e.tiff", "f.png", "notes.txt", "raw.cr2", "raw"):
        (root / name).touch()
    (root / "link-inside").symlink_to(root / "x")
    (root / "link-outside").symlink_to(outside)
    (root / "link-up").symlink_to(tmp_path)
    (root / "gone.jpg").symlink_to("/nowhere")
    (root / "gone").symlink_to("/nowhere")
    os.mkfifo(root / "pipe.jpg")
    walk = walk_images(root)
    assert list(walk.files) == [
        *("a.JPEG", "b.webp", "c.bmp", "d.tif", "e.tiff", "f.png", "gone", "gone.jpg", "x/000.jpg"),
        "link-outside/y/000.jpg",
    ]
    assert walk.skipped == {
        ".txt file": 1,
        ".cr2 file": 1,
        "file without a suffix": 1,
        "named pipe": 1,
        "folder that is read under another name": 3,
    }
    assert counted(walk.skipped).startswith(
        "7 entries that are not images: folder that is read under another name (3), "
    )
