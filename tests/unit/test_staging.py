"""Downloads of betons from a remote address: once per node, and never incomplete."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datasets import staging
from datasets.beton import SPLITS, TRAIN, VALIDATION, BetonError, beton_path, load_manifest, read_layout, verify_betons
from datasets.files import LOCK
from datasets.prepare.prepare import prepare
from datasets.remote import CHUNK_BYTES
from datasets.staging import STAGED, download_dataset, remote_manifest, upload
from tests.conftest import ROOT
from tests.s3_server import S3Server
from tests.unit.pictures import write_class_folders

FILES = ["manifest.json", "train.beton", "validation.beton"]

# Downloads argv[1] to argv[2]; after a line that contains argv[3], waits until its input ends.
CHILD = """
import sys
from pathlib import Path
from datasets import staging

def show(line):
    print(line, flush=True)
    if sys.argv[3] in line:
        sys.stdin.read()

staging.SECONDS_BETWEEN_LINES = 0
staging.download_dataset(sys.argv[1], Path(sys.argv[2]), show=show)
"""


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two prepared folders with the same classes and counts, but different images."""
    root = tmp_path_factory.mktemp("prepared")
    for seed in (0, 1):
        source = write_class_folders(root / f"source-{seed}", {"cat": 5, "dog": 5}, seed=10 * seed)
        prepare("imagefolder", root / str(seed), source=source, num_processes=1)
    return root / "0", root / "1"


@pytest.fixture
def remote(tmp_path: Path, prepared: tuple[Path, Path]) -> Path:
    """A copy of the first prepared folder, to download from `remote.as_uri()`."""
    return put(prepared[0], tmp_path / "remote")


@pytest.fixture
def node(tmp_path: Path) -> Path:
    return tmp_path / "node"


def put(source: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copyfile(source / name, folder / name)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def betons_and_manifest(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def overwrite(path: Path, start: int = 0, end: int | None = None) -> None:
    """Overwrite a file with as many other bytes."""
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xee" * ((end or path.stat().st_size) - start))


def flip_one_bit(path: Path) -> None:
    """Change a byte between the last image and the table, which only the hash of the whole file detects."""
    layout = read_layout(path)
    position = path.stat().st_size - layout.allocations.nbytes - 1
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def partial(folder: Path, split: str) -> Path:
    return folder / f".staging-{load_manifest(folder).splits[split].sha256}.partial"


@pytest.fixture
def child() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that downloads, and kill it at the end."""
    started = []

    def start(uri: str, folder: Path, pause: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD, uri, str(folder), pause]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen(command, **pipes, text=True, cwd=ROOT))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], words: str) -> str:
    """Read until a line with `words` in it."""
    assert process.stdout is not None
    return next(line for line in process.stdout if words in line)


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_an_uploaded_and_downloaded_folder_equals_the_prepared_one(
    kind: str, tmp_path: Path, prepared: tuple[Path, Path], node: Path, request: pytest.FixtureRequest
) -> None:
    there = tmp_path / "deep" / "remote"
    uri = there.as_uri() if kind == "file" else request.getfixturevalue("s3").address("deep/remote")
    lines: list[str] = []

    manifest = upload(prepared[0], uri, show=lines.append)
    assert remote_manifest(uri) == manifest
    assert download_dataset(uri, node, show=lines.append) == manifest

    assert betons_and_manifest(node) == betons_and_manifest(prepared[0])
    assert sorted(contents(node)) == sorted([*FILES, STAGED])
    assert verify_betons(node, full=True) == manifest
    assert [line for line in lines if line.startswith(f"downloading to {node}: 33.")]
    lines.clear()
    assert download_dataset(uri, node, show=lines.append) == manifest
    assert upload(prepared[0], uri, show=lines.append) == manifest
    assert lines == [f"{uri} already has this data; nothing to do"]


def test_concurrent_processes_download_once(
    s3: S3Server, tmp_path: Path, prepared: tuple[Path, Path], node: Path, child
) -> None:
    uri = s3.address("at-once")
    upload(prepared[0], uri)
    s3.requests()
    download_dataset(uri, tmp_path / "alone", show=lambda line: None)
    alone = [line for line in s3.requests() if "GET /bucket/at-once/" in line and ".beton" in line]

    first = child(uri, node, pause=" left")
    wait_for(first, " left")  # in the middle of the first beton
    others = [child(uri, node, pause="never") for _ in range(2)]
    for process in others:
        wait_for(process, "waiting")
    first.communicate()
    for process in others:
        assert process.communicate()[0] == "", "found it done, and did nothing"
    assert [process.returncode for process in (first, *others)] == [0, 0, 0]

    together = [line for line in s3.requests() if "GET /bucket/at-once/" in line and ".beton" in line]
    assert len(together) == len(alone) >= 4
    assert betons_and_manifest(node) == betons_and_manifest(prepared[0])


def test_a_killed_download_resumes(remote: Path, prepared: tuple[Path, Path], node: Path, child) -> None:
    process = child(remote.as_uri(), node, pause=" left")
    wait_for(process, " left")
    process.kill()
    process.wait()
    left, lock = sorted(node.iterdir(), reverse=True)
    assert lock.name == LOCK
    assert left.name == partial(remote, TRAIN).name
    assert left.stat().st_size == CHUNK_BYTES

    overwrite(remote / "train.beton", end=CHUNK_BYTES)  # what is already here is not read again
    lines: list[str] = []
    download_dataset(remote.as_uri(), node, show=lines.append)

    assert "train.beton: resuming after 8.4 MB" in lines
    assert betons_and_manifest(node) == betons_and_manifest(prepared[0])
    assert sorted(contents(node)) == sorted([*FILES, STAGED])


def test_a_process_that_waited_uses_the_current_data(remote: Path, prepared: tuple[Path, Path], node: Path) -> None:
    node.mkdir()
    other = os.open(node / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)

    def change(line: str) -> None:
        if line == f"{node}: waiting for another process that writes to it":
            put(prepared[1], remote)
            os.close(other)

    assert download_dataset(remote.as_uri(), node, show=change) == load_manifest(prepared[1])
    assert betons_and_manifest(node) == betons_and_manifest(prepared[1])


@pytest.mark.parametrize("size", [1000, CHUNK_BYTES + 5, 1 << 26])
def test_a_partial_file_that_does_not_match_is_discarded(
    size: int, s3: S3Server, prepared: tuple[Path, Path], node: Path
) -> None:
    uri = s3.address(f"partial-{size}")
    upload(prepared[0], uri)
    node.mkdir()
    (node / partial(prepared[0], TRAIN).name).write_bytes(b"\xee" * size)
    (node / f".staging-{'0' * 64}.partial").write_bytes(b"of data that was replaced")

    download_dataset(uri, node)

    assert betons_and_manifest(node) == betons_and_manifest(prepared[0])
    assert sorted(contents(node)) == sorted([*FILES, STAGED])


def test_a_process_that_dies_while_renaming_costs_no_download(
    remote: Path, prepared: tuple[Path, Path], node: Path
) -> None:
    download_dataset(remote.as_uri(), node)
    (node / "manifest.json").unlink()
    (node / "validation.beton").rename(node / partial(remote, VALIDATION).name)
    for split in SPLITS:
        overwrite(beton_path(remote, split))

    download_dataset(remote.as_uri(), node)

    assert betons_and_manifest(node) == betons_and_manifest(prepared[0])


def test_a_beton_without_a_manifest_is_compared_in_full(remote: Path, prepared: tuple[Path, Path], node: Path) -> None:
    download_dataset(remote.as_uri(), node)
    (node / "manifest.json").unlink()
    flip_one_bit(node / "train.beton")

    download_dataset(remote.as_uri(), node)

    assert betons_and_manifest(node) == betons_and_manifest(prepared[0])


def test_only_damaged_betons_are_downloaded_again(remote: Path, prepared: tuple[Path, Path], node: Path) -> None:
    download_dataset(remote.as_uri(), node)
    (node / "train.beton").write_bytes((node / "train.beton").read_bytes()[:-24])
    overwrite(remote / "validation.beton")

    download_dataset(remote.as_uri(), node)

    assert betons_and_manifest(node) == betons_and_manifest(prepared[0])


def test_a_beton_not_matching_its_manifest_is_refused(remote: Path, prepared: tuple[Path, Path], node: Path) -> None:
    flip_one_bit(remote / "train.beton")
    with pytest.raises(BetonError, match=r"train\.beton of file:///.*remote has SHA-256 .* or is damaged"):
        download_dataset(remote.as_uri(), node)
    assert contents(node) == {}

    put(prepared[0], remote)
    download_dataset(remote.as_uri(), node)
    assert betons_and_manifest(node) == betons_and_manifest(prepared[0])


def test_a_beton_that_changes_while_it_is_read_is_refused(
    remote: Path, prepared: tuple[Path, Path], node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "SECONDS_BETWEEN_LINES", 0)

    def change(line: str) -> None:
        if line.startswith(f"downloading to {node}: 8.4 MB of 33."):
            put(prepared[1], remote)

    with pytest.raises(BetonError, match="it changed while it was read"):
        download_dataset(remote.as_uri(), node, show=change)
    assert contents(node) == {}

    download_dataset(remote.as_uri(), node)
    assert betons_and_manifest(node) == betons_and_manifest(prepared[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), r"has no prepared data .*--upload"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest\.json of file:///.* is damaged"),
        (
            lambda folder: (folder / "train.beton").unlink(),
            r"remote has no train\.beton, but its manifest says [\d,]+ bytes",
        ),
        (
            lambda folder: (folder / "train.beton").write_bytes(b"cut"),
            r"a train\.beton of 3 bytes, but its manifest says",
        ),
    ],
)
def test_an_incomplete_remote_folder_is_refused(change, message: str, remote: Path, node: Path) -> None:
    change(remote)
    with pytest.raises(BetonError, match=message):
        download_dataset(remote.as_uri(), node)
    assert not node.exists() or contents(node) == {}


def test_a_manifest_cannot_lead_out_of_the_folder(remote: Path, node: Path) -> None:
    tree = json.loads((remote / "manifest.json").read_text())
    tree["splits"]["train"]["file"] = "../train.beton"
    (remote / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(BetonError, match=r"names the betons '\.\./train\.beton'"):
        download_dataset(remote.as_uri(), node)

    tree["splits"]["train"]["file"] = "train.beton"
    tree["splits"]["../../x"] = {**tree["splits"]["train"], "file": "x.beton"}
    (remote / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(BetonError, match=r"it has the unknown split '\.\./\.\./x'"):
        download_dataset(remote.as_uri(), node)


def test_too_little_space_is_an_error_before_the_first_byte(
    remote: Path, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.mkdir()
    usage = shutil.disk_usage(node)._replace(free=2_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(OSError, match=r"node has 2\.0 MB free, but 33\.\d MB of file:///.* are left to download"):
            download_dataset(remote.as_uri(), node)
        assert contents(node) == {}
    download_dataset(remote.as_uri(), node)


def test_changed_data_is_downloaded_again_and_reported(remote: Path, prepared: tuple[Path, Path], node: Path) -> None:
    download_dataset(remote.as_uri(), node)
    before, after = (load_manifest(folder).digest for folder in prepared)
    put(prepared[1], remote)
    lines: list[str] = []

    download_dataset(remote.as_uri(), node, show=lines.append)

    assert lines[0].endswith(f"has changed since it was downloaded (digest {before}, now {after})")
    assert betons_and_manifest(node) == betons_and_manifest(prepared[1])


def test_one_split_can_be_downloaded_alone(remote: Path, prepared: tuple[Path, Path], node: Path) -> None:
    manifest = download_dataset(remote.as_uri(), node, splits=[VALIDATION])
    assert sorted(contents(node)) == ["manifest.json", STAGED, "validation.beton"]
    assert download_dataset(remote.as_uri(), node) == manifest

    # Both have betons of the same size: the old beton must not be taken for the new one.
    put(prepared[1], remote)
    download_dataset(remote.as_uri(), node, splits=[VALIDATION])
    assert sorted(contents(node)) == ["manifest.json", STAGED, "validation.beton"]
    download_dataset(remote.as_uri(), node)
    assert betons_and_manifest(node) == betons_and_manifest(prepared[1])


def test_the_download_of_one_split_keeps_the_interrupted_download_of_the_other(remote: Path, node: Path) -> None:
    node.mkdir()
    (node / partial(remote, TRAIN).name).write_bytes((remote / "train.beton").read_bytes()[:CHUNK_BYTES])
    download_dataset(remote.as_uri(), node, splits=[VALIDATION])
    lines: list[str] = []
    download_dataset(remote.as_uri(), node, show=lines.append)
    assert "train.beton: resuming after 8.4 MB" in lines


def test_data_prepared_here_is_never_replaced(remote: Path, prepared: tuple[Path, Path], node: Path) -> None:
    put(prepared[1], node)
    before = contents(node)
    with pytest.raises(BetonError, match=r"prepared here.* choose another data\.folder, set data\.uri=null"):
        download_dataset(remote.as_uri(), node)
    assert contents(node) == before

    (node / "manifest.json").unlink()
    with pytest.raises(BetonError, match="its preparation was interrupted"):
        download_dataset(remote.as_uri(), node)
    assert contents(node) == {name: data for name, data in before.items() if name != "manifest.json"}


def test_downloaded_data_that_was_prepared_again_is_not_replaced(
    remote: Path, prepared: tuple[Path, Path], node: Path
) -> None:
    download_dataset(remote.as_uri(), node)
    put(prepared[1], node)
    with pytest.raises(BetonError, match="prepared here"):
        download_dataset(remote.as_uri(), node)
    assert betons_and_manifest(node) == betons_and_manifest(prepared[1])


def test_the_same_data_prepared_here_is_used(remote: Path, prepared: tuple[Path, Path], node: Path) -> None:
    put(prepared[0], node)
    lines: list[str] = []
    download_dataset(remote.as_uri(), node, show=lines.append)
    assert lines == []
    assert sorted(contents(node)) == FILES

    (node / "train.beton").write_bytes(b"cut")
    with pytest.raises(BetonError, match=r"train\.beton has 3 bytes"):
        download_dataset(remote.as_uri(), node)
    assert (node / "train.beton").read_bytes() == b"cut"


def test_an_upload_replaces_no_other_data_and_refuses_damage(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    there = tmp_path / "there"
    damaged = put(prepared[0], tmp_path / "damaged")
    flip_one_bit(damaged / "validation.beton")
    with pytest.raises(BetonError, match=r"validation\.beton is damaged: its SHA-256"):
        upload(damaged, there.as_uri())
    assert sorted(contents(there)) == ["train.beton", "validation.beton"]
    with pytest.raises(BetonError, match="has no prepared data"):
        remote_manifest(there.as_uri())

    upload(prepared[0], there.as_uri())
    assert contents(there) == betons_and_manifest(prepared[0])
    with pytest.raises(BetonError, match="upload to another address, or remove the data there"):
        upload(prepared[1], there.as_uri())
    assert contents(there) == betons_and_manifest(prepared[0])
