"""Complete files, names as text, folders that overlap, and file systems without locks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from datasets.files import DataError, overlap, shown_name, whole_file, write_whole

# Makes the kernel refuse flock with ENOLCK in this process, as a file system without locks does: a seccomp filter that
# loads the number of the system call, compares it with flock's, and returns the error.
WITHOUT_LOCKS = """
import ctypes, errno, platform, struct, sys
from pathlib import Path

def refuse_flock(error):
    number = {"x86_64": 73, "aarch64": 32}[platform.machine()]
    program = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | error), (0x06, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    described = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, described, 0, 0) == 0, ctypes.get_errno()

refuse_flock(errno.ENOLCK)
from datasets.files import exclusive
from pipeline.cluster.driver import only_driver
folder = Path(sys.argv[1])
for lock in (exclusive(folder), exclusive(folder, waiting=lambda: print("waiting")), only_driver(folder / "lock")):
    try:
        with lock:
            print("locked")
    except (OSError, ValueError) as error:
        print(type(error).__name__, error)
"""


def test_a_failed_write_keeps_the_old_file_and_uses_no_space(tmp_path: Path) -> None:
    def fill_the_disk() -> None:
        with whole_file(tmp_path / "state") as file:
            file.write(b"half")
            raise OSError(28, "No space left on device")

    write_whole(tmp_path / "state", "old")
    with pytest.raises(OSError, match="No space left"):
        fill_the_disk()
    assert (tmp_path / "state").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"caf\xc3\xa9 \xe2\x80\x8d.jpg", "caf\u00e9 \u200d.jpg"),
        (b"caf\xe9.jpg", r"caf\xe9.jpg"),
        (b"\xff\xc3\xa9", "\\xff\u00e9"),
        (b"a\nb\x1b[1m\xe2\x80\xa8", r"a\nb\x1b[1m\u2028"),
    ],
)
def test_names_are_shown_as_valid_text_on_one_line(name: bytes, shown: str) -> None:
    assert shown_name(os.fsdecode(name)) == shown
    assert shown_name(Path(os.fsdecode(b"folder/" + name))) == f"folder/{shown}"


def test_messages_of_data_errors_are_valid_text() -> None:
    assert str(DataError(os.fsdecode(b"line\nof \xe9"))).encode() == b"line\nof \\xe9"


def test_overlapping_folders_are_found_through_links(tmp_path: Path) -> None:
    (tmp_path / "data" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert overlap(tmp_path / "link", tmp_path / "data") == "is"
    assert overlap(tmp_path / "link" / "new" / "folder", tmp_path / "data") == "is inside"
    assert overlap(tmp_path / "data", tmp_path / "link" / "inner") == "contains"
    assert overlap(tmp_path / "data2", tmp_path / "data") == ""
    assert overlap(tmp_path / "data" / ".." / "other", tmp_path / "data") == ""


def test_a_file_system_without_locks_is_named(tmp_path: Path) -> None:
    child = subprocess.run([sys.executable, "-c", WITHOUT_LOCKS, tmp_path], capture_output=True, text=True, check=True)
    lines = child.stdout.splitlines()
    assert len(lines) == 3, child.stdout
    for line in lines:
        assert line.startswith("OSError")
        assert f"{tmp_path} cannot be locked (No locks available): the file system " in line
        assert "has no working file locks; choose a folder on another file system" in line
