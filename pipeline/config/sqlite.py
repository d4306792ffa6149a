"""Convert between a SQLite file's path and its address, where `%XX` quotes a character and `?` ends the path."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

SCHEMES = ("sqlite", "sqlite+pysqlite")


def sqlite_address(path: Path) -> str:
    """Return the address of a SQLite file."""
    text = str(path)
    quoted = text.replace("%", "%25").replace("?", "%3F")
    # MLflow creates the parent folder of a sqlite:/// address without unquoting the folder's name.
    return f"{'sqlite' if quoted == text else 'sqlite+pysqlite'}:///{quoted}"


def sqlite_path(address: str) -> Path | None:
    """Return the file of a SQLite address, relative if the address is; None for other addresses."""
    scheme, separator, rest = address.partition(":///")
    return Path(unquote(rest.partition("?")[0])) if separator and scheme in SCHEMES else None
