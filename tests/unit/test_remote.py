"""Files at remote addresses: helpful errors without secrets."""

from __future__ import annotations

from typing import cast

import pytest
from pyarrow.fs import FileSystem

from datasets.beton import BetonError
from datasets.remote import CHUNK_BYTES, RemoteFolder, open_remote, redacted
from datasets.staging import remote_manifest
from tests.s3_server import S3Server


@pytest.fixture(params=["file", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path) -> str:
    """An address without any files."""
    if request.param == "file":
        return (tmp_path / "deep" / "folder").as_uri()
    return request.getfixturevalue("s3").address(f"{tmp_path.name}/folder")


def test_a_file_can_be_read_from_any_byte(uri: str) -> None:
    remote = open_remote(uri)
    content = bytes(range(256)) * (CHUNK_BYTES // 128)
    remote.write("some.file", [content[:1000], content[1000:]])
    assert remote.size("some.file") == len(content)
    assert remote.read("some.file") == content
    assert [len(chunk) for chunk in remote.chunks("some.file", 0)] == [CHUNK_BYTES, CHUNK_BYTES]
    assert b"".join(remote.chunks("some.file", CHUNK_BYTES + 5)) == content[CHUNK_BYTES + 5 :]
    assert list(remote.chunks("some.file", len(content))) == []


def test_a_missing_file_is_none_or_an_error(uri: str) -> None:
    remote = open_remote(uri)
    assert remote.read("no.file") is None
    assert remote.size("no.file") is None
    with pytest.raises(OSError, match=r"folder.*: no\.file cannot be read: .*; check the address"):
        next(remote.chunks("no.file", 0))


@pytest.mark.parametrize(
    "uri", ["ftp://host/folder", "some/folder", "", "s3:///folder", "file:///", "s3://bucket/folder?nonsense=1"]
)
def test_invalid_addresses_are_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="give s3://BUCKET/FOLDER") as caught:
        open_remote(uri)
    assert uri.partition("?")[0] in str(caught.value)


def test_a_missing_bucket_and_missing_rights_are_explained(s3: S3Server) -> None:
    nowhere = s3.address("folder").replace("bucket", "nowhere")
    with pytest.raises(BetonError, match=r"s3://nowhere/folder.* has no prepared data .* check the address"):
        remote_manifest(nowhere)
    with pytest.raises(OSError, match=r"s3://nowhere/folder.*: a\.file cannot be written: .*NO_SUCH_BUCKET"):
        open_remote(nowhere).write("a.file", [b"content"])
    denied = r"manifest\.json cannot be read: .*ACCESS_DENIED.* credentials \(s3: AWS_ACCESS_KEY_ID"
    with s3.rejecting(), pytest.raises(OSError, match=denied):
        remote_manifest(s3.address("folder"))


def test_a_failed_write_is_explained_by_its_own_error_and_not_by_the_one_of_close() -> None:
    class FullDisk:
        type_name = "other"

        def open_output_stream(self, path: str) -> FullDisk:
            return self

        def write(self, chunk: bytes) -> None:
            raise OSError("no space left")

        def close(self) -> None:
            raise ValueError("operation on closed stream")

    with pytest.raises(OSError, match=r"a\.file cannot be written: no space left"):
        RemoteFolder("other://folder", cast("FileSystem", FullDisk()), "folder").write("a.file", [b"content"])


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://bucket/folder@2", "s3://bucket/folder@2"),
        ("s3://KEY:secret@bucket/folder", "s3://KEY:***@bucket/folder"),
        ("s3://KEY:sec/r?e@t@bucket/folder", "s3://KEY:***@bucket/folder"),
        (
            "s3://bucket/folder?scheme=http&endpoint_override=host:9000&token=secret",
            "s3://bucket/folder?scheme=http&endpoint_override=host:9000&token=***",
        ),
        ("gs://bucket/folder?secret", "gs://bucket/folder?***"),
        ("postgresql://user:p/w@host/db", "postgresql://user:***@host/db"),
        ("postgresql+psycopg://user:p@w@host:5432/db", "postgresql+psycopg://user:***@host:5432/db"),
        ("http://user:secret@host:5000", "http://user:***@host:5000"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("data.group_by=(?:scene&a", "data.group_by=(?:scene&a"),
        ("data.uri=s3://bucket/folder?token=secret", "data.uri=s3://bucket/folder?token=***"),
        ("s3//KEY:secret@bucket/folder", "s3//KEY:***@bucket/folder"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
    ],
)
def test_secrets_of_an_address_are_not_shown(uri: str, shown: str) -> None:
    assert redacted(uri) == shown


def test_no_message_holds_a_secret(s3: S3Server) -> None:
    secret = "hunter2%2Fx"
    said: list[str] = []
    for uri in (
        s3.address("empty", user=f"KEY:{secret}@"),
        s3.address("empty", user=f"KEY:{secret}@").replace("bucket", "%"),
        f"s3://KEY:{secret}%@bucket/folder",
        f"ftp://KEY:{secret}@host/folder?sas={secret}",
        f"s3://bucket/folder?{secret}",
        f"s3://bucket/folder?scheme=http&token={secret}",
    ):
        with s3.rejecting(), pytest.raises((ValueError, OSError)) as caught:
            remote_manifest(uri)
        assert caught.value.__suppress_context__, "a traceback would show what pyarrow said"
        said.append(str(caught.value))
    opened = open_remote(s3.address("empty", user=f"KEY:{secret}@"))
    said += [str(opened), repr(opened)]
    assert all("***" in line for line in said[:-1])
    assert [line for line in said if "hunter2" in line] == []
