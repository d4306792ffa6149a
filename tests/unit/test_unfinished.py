"""Preparations that are killed or interrupted, or whose files change; and how the next one resumes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

import pytest

from datasets.beton import verify_betons
from datasets.files import LOCK
from datasets.prepare.prepare import Prepared, prepare
from datasets.sources.index import SourceError
from tests.unit.pictures import jpeg, write_class_folders

ROOT = Path(__file__).resolve().parents[2]
NUM_CHUNKS = 5 + 2

# Prepares, and kills itself when the chunk of the given number is requested.
KILLED = """
import os, signal, sys
from pathlib import Path
from datasets.prepare import build
from datasets.prepare.prepare import prepare

def killed_at(number):
    def convert(function, work):
        for index, chunk in enumerate(work):
            if index == number:
                os.kill(os.getpid(), signal.SIGKILL)
            yield function(chunk)
    return convert

build.SECONDS_BETWEEN_WRITES = 0.0
source, out, number = sys.argv[1:]
options = {"max_side": 60, "on_bad_image": "skip", "map_chunks": killed_at(int(number))}
prepare("imagefolder", Path(out), source=Path(source), **options)
"""


class Counted:
    """Convert in this process; `chunks` limits their number; `before` and `after` are called around the first."""

    def __init__(self, before: Callable[[], object] = int, after: Callable[[], object] = int):
        self.chunks, self.before, self.after = 0, before, after

    def __call__(self, function: Callable, work: Iterable, /) -> Generator:
        for chunk in work:
            if self.chunks == 0:
                self.before()
            result = function(chunk)
            if self.chunks == 0:
                self.after()
            self.chunks += 1
            yield result


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that are kept, resized and bad: five training chunks and two validation chunks."""
    source = write_class_folders(tmp_path_factory.mktemp("images") / "source", {"a": 190, "b": 190})
    for number in range(0, 190, 3):
        (source / "a" / f"{number:03d}.jpg").write_bytes(jpeg(90, 70, seed=number))
    (source / "b" / "bad.jpg").write_bytes(b"no image")
    return source


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    assert prepared(out, images, counted := Counted()).num_adopted == 0
    assert counted.chunks == NUM_CHUNKS
    return contents(out)


@pytest.fixture
def killed(images: Path, tmp_path: Path) -> Path:
    """The files of a preparation that was killed after three chunks."""
    return kill_at(3, images, tmp_path / "out")


def kill_at(number: int, images: Path, out: Path) -> Path:
    command = [sys.executable, "-c", KILLED, str(images), str(out), str(number)]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert ended.returncode == -signal.SIGKILL
    return out


def prepared(out: Path, source: Path, counted: Counted, **options) -> Prepared:
    return prepare(
        "imagefolder",
        out,
        source=source,
        map_chunks=counted,
        **{"max_side": 60, "on_bad_image": "skip", "num_processes": 1, **options},
    )


def contents(folder: Path) -> dict[str, bytes]:
    assert not (folder / ".partial").exists()
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(("number", "num_adopted"), [(1, 64), (4, 256), (5, 305), (6, 305 + 64)])
def test_a_killed_preparation_is_resumed(number, num_adopted, images, undisturbed, tmp_path):
    out, counted = kill_at(number, images, tmp_path / "out"), Counted()
    assert sorted(path.name for path in out.iterdir()) == [LOCK, ".partial"]
    done = prepared(out, images, counted)
    assert counted.chunks == NUM_CHUNKS - number
    assert (done.num_adopted, done.num_images) == (num_adopted, 381 - num_adopted)
    assert contents(out) == undisturbed
    verify_betons(out, full=True)


def test_a_preparation_killed_twice_is_resumed_by_processes(images, undisturbed, killed):
    kill_at(2, images, killed)
    prepare("imagefolder", killed, source=images, max_side=60, on_bad_image="skip", num_processes=2)
    assert contents(killed) == undisturbed


@pytest.mark.parametrize(
    "options", [{"max_side": 50}, {"jpeg_quality": 80}, {"split_seed": 3}, {"images_per_class": 150}]
)
def test_other_settings_start_over(options, images, tmp_path):
    out = kill_at(6, images, tmp_path / "out")
    assert prepared(out, images, Counted(), **options).num_adopted == 0
    prepared(tmp_path / "other", images, Counted(), **options)
    assert contents(out) == contents(tmp_path / "other")


def test_changed_images_start_over(tmp_path):
    source = write_class_folders(tmp_path / "source", {"a": 120, "b": 120})
    out = kill_at(2, source, tmp_path / "out")
    (source / "a" / "007.jpg").write_bytes(jpeg(seed=4711))
    assert prepared(out, source, Counted()).num_adopted == 0
    prepared(tmp_path / "other", source, Counted())
    assert contents(out) == contents(tmp_path / "other")


def flip_a_stored_bit(unfinished: Path) -> None:
    with (unfinished / "train.beton").open("r+b") as beton:
        beton.seek(-5_000, os.SEEK_END)
        byte = beton.read(1)[0]
        beton.seek(-1, os.SEEK_CUR)
        beton.write(bytes([byte ^ 1]))


def drop_the_beton(unfinished: Path) -> None:
    (unfinished / "train.beton").unlink()


def cut_the_beton(unfinished: Path) -> None:
    os.truncate(unfinished / "train.beton", (unfinished / "train.beton").stat().st_size - 1)


def cut_the_journal(unfinished: Path) -> None:
    os.truncate(unfinished / "journal.jsonl", (unfinished / "journal.jsonl").stat().st_size - 20)


def garble_the_journal(unfinished: Path) -> None:
    (unfinished / "journal.jsonl").write_bytes(b"\xff{}[]\n")


@pytest.mark.parametrize(
    ("damage", "num_converted"),
    [
        (flip_a_stored_bit, NUM_CHUNKS),
        (drop_the_beton, NUM_CHUNKS),
        (cut_the_beton, NUM_CHUNKS),
        (cut_the_journal, NUM_CHUNKS - 2),
        (garble_the_journal, NUM_CHUNKS),
    ],
)
def test_damaged_leftovers_are_detected(damage, num_converted, images, undisturbed, killed):
    damage(killed / ".partial")
    counted = Counted()
    prepared(killed, images, counted)
    assert counted.chunks == num_converted
    assert contents(killed) == undisturbed


def test_ctrl_c_keeps_finished_work(images, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.prepare.build.SECONDS_BETWEEN_WRITES", 0.0)

    def interrupted(function: Callable, work: Iterable, /) -> Generator:
        for number, chunk in enumerate(work):
            if number == 3:
                raise KeyboardInterrupt
            yield function(chunk)

    with pytest.raises(KeyboardInterrupt):
        prepare("imagefolder", tmp_path, source=images, max_side=60, on_bad_image="skip", map_chunks=interrupted)
    counted = Counted()
    prepared(tmp_path, images, counted)
    assert counted.chunks == NUM_CHUNKS - 3
    assert contents(tmp_path) == undisturbed


def test_a_preparation_killed_while_publishing_is_resumed(images, undisturbed, killed):
    (killed / "train.beton").write_bytes(b"published, but not yet its manifest")
    prepared(killed, images, Counted())
    assert contents(killed) == undisturbed


def test_leftovers_count_as_space_without_their_holes(images, undisturbed, killed, monkeypatch):
    left = sum(512 * path.stat().st_blocks for path in (killed / ".partial").iterdir())
    needed = sum(min(path.stat().st_size, 2 * 60**2) for path in images.rglob("*.jpg"))
    assert left < needed < sum(path.stat().st_size for path in (killed / ".partial").iterdir())
    usage = shutil.disk_usage(killed)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed - left - 1))
    with pytest.raises(OSError, match="MB free"):
        prepared(killed, images, Counted())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed - left))
    assert prepared(killed, images, Counted()).num_adopted == 3 * 64
    assert contents(killed) == undisturbed


def touch(path):
    os.utime(path, ns=(2, 2))


@pytest.mark.parametrize("change", [touch, os.unlink])
def test_a_file_that_changes_during_preparation_is_refused(tmp_path, change):
    source = write_class_folders(tmp_path / "source", {"a": 8, "b": 8})
    for path in source.rglob("*.jpg"):
        os.utime(path, ns=(1, 1))
    changed = Counted(after=lambda: [change(path) for path in source.glob("a/*")])
    with pytest.raises(SourceError, match=r"a/\d+\.jpg changed while it was prepared; rerun"):
        prepared(tmp_path / "out", source, changed)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_source_that_another_machine_cannot_read_is_an_error(tmp_path):
    source = write_class_folders(tmp_path / "source", {"a": 8, "b": 8})
    elsewhere = tmp_path / "elsewhere"
    unseen = Counted(before=lambda: source.rename(elsewhere), after=lambda: elsewhere.rename(source))
    with pytest.raises(OSError, match=rf"{os.uname().nodename} cannot read {source}/.*No such file.*put the source"):
        prepared(tmp_path / "out", source, unseen)
    assert prepared(tmp_path / "out", source, Counted()).num_images == 16
