"""A prepared folder at a remote address: s3://, gs://, hdfs://, file:// or anything else that `pyarrow.fs` opens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

CHUNK_BYTES = 8 << 20
HIDDEN = "***"
# Address parameters that are not secret; the values of all others are hidden.
OPEN_PARAMETERS = {"allow_bucket_creation", "endpoint_override", "region", "retry_limit_seconds", "scheme", "user"}
# Match up to the last @, because a password may contain characters that should have been written as %XX.
_PASSWORD = re.compile(r"(?<=//)([^/?#@:]*):(.+)@", re.DOTALL)
_PARAMETER = re.compile(r"(?<=[?&])(?:([^?&=]*)=)?([^?&]+)")
_ADVICE = (
    "check the address, this machine's network and its credentials (s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "a profile or a role; gs: GOOGLE_APPLICATION_CREDENTIALS), on every node"
)


def redacted(uri: str) -> str:
    """Return the address for display: without its password and without parameters that may be secret."""
    shown = _PASSWORD.sub(rf"\1:{HIDDEN}@", uri)
    if "://" not in shown:
        return shown  # not an address, so `?` and `&` do not start parameters
    return _PARAMETER.sub(
        lambda found: found[0] if found[1] in OPEN_PARAMETERS else f"{found[1] or ''}={HIDDEN}".lstrip("="), shown
    )


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of a `pyarrow.fs` file system. `str` gives its address without secrets.

    Every method raises OSError if the address cannot be reached. The message says what to check and contains no
    secrets.
    """

    uri: str = field(repr=False)
    filesystem: FileSystem
    path: str

    def __str__(self) -> str:
        return redacted(self.uri)

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, or None if there is no such file."""
        with self._explained(f"{name} cannot be read"):
            try:
                with self.filesystem.open_input_file(self._path(name)) as file:
                    return file.read()
            except FileNotFoundError:
                return None

    def size(self, name: str) -> int | None:
        """Return the number of bytes of a file, or None if there is no such file."""
        with self._explained(f"the size of {name} cannot be read"):
            return self.filesystem.get_file_info(self._path(name)).size

    def chunks(self, name: str, start: int) -> Iterator[bytes]:
        """Yield the bytes of a file from `start`, CHUNK_BYTES at a time."""
        problem = f"{name} cannot be read"
        with self._explained(problem):
            file = self.filesystem.open_input_file(self._path(name))
        with file:
            with self._explained(problem):
                file.seek(start)
            while True:
                with self._explained(problem):
                    chunk = file.read(CHUNK_BYTES)
                if not chunk:
                    return
                yield chunk

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write a file, and create its folder on file systems that have folders."""
        problem = f"{name} cannot be written"
        with self._explained(problem):
            if self.filesystem.type_name in ("local", "hdfs"):  # elsewhere a folder is only a part of a name
                self.filesystem.create_dir(self.path)
            file = self.filesystem.open_output_stream(self._path(name))
        try:
            for chunk in chunks:
                with self._explained(problem):
                    file.write(chunk)
        except BaseException:
            with suppress(Exception):  # the first error is the cause
                file.close()
            raise
        with self._explained(problem):
            file.close()

    def _path(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"

    @contextmanager
    def _explained(self, problem: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, NotImplementedError) as error:
            raise OSError(f"{self}: {problem}: {message_of(error, self.uri)}; {_ADVICE}") from None


def open_remote(uri: str) -> RemoteFolder:
    """Open the folder at an address. pyarrow's parameters are allowed, such as `?endpoint_override=HOST:PORT`.

    Raises:
        ValueError: `uri` is not the address of a folder.
        OSError: the file system cannot be used from this machine.
    """
    from pyarrow.fs import FileSystem  # too slow to import while a configuration is being read

    forms = "give s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, hdfs://HOST:PORT/FOLDER or file:///FOLDER"
    try:
        filesystem, path = FileSystem.from_uri(uri)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{redacted(uri)!r} is not the address of a folder ({message_of(error, uri)}); {forms}"
        ) from None
    except OSError as error:
        raise OSError(f"{redacted(uri)} cannot be opened: {message_of(error, uri)}; {_ADVICE}") from None
    if not path.strip("/"):
        raise ValueError(f"{redacted(uri)!r} names no folder; {forms}")
    return RemoteFolder(uri, filesystem, path)


def message_of(error: Exception, uri: str) -> str:
    """Return an error's message on one line, without the secrets of the address `uri`."""
    text = " ".join(str(error).split()).replace(uri, redacted(uri))
    hidden = [found[2] for found in _PASSWORD.finditer(uri)]
    hidden += [found[2] for found in _PARAMETER.finditer(uri) if found[1] not in OPEN_PARAMETERS]
    for secret in {*hidden, *map(unquote, hidden)}:
        text = text.replace(secret, HIDDEN)
    return text
