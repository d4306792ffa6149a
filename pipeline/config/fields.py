"""Types of configuration fields: numbers, paths and names, each with an error message for wrong values.

It also converts between a SQLite file and its address, for tracking.uri.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

from pydantic import AfterValidator, BeforeValidator, Field

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

REGISTERED = "models:/"
"""The prefix of a registered model's address."""


def local_path(value: Any) -> Any:
    """Expand `~` in a path, and refuse an address or an empty path."""
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    if not text.strip() or "\0" in text:
        raise ValueError("give a path; the working folder is '.'")
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text):
        hint = f"write {text.removeprefix('file://')!r}" if scheme[1] == "file" else "mount it or copy it to a disk"
        if scheme[1] == "hf":
            name = text.removeprefix("hf://").removeprefix("datasets/")
            hint = f"run `hf download --repo-type dataset --local-dir FOLDER {name}` and give FOLDER"
        raise ValueError(
            f"this field takes a local path, so {hint}. Only data.uri (prepared data), tracking.uri (MLflow) and "
            "jobs.prepare --upload take an address"
        )
    if text.startswith("~"):
        expanded = os.path.expanduser(text)  # noqa: PTH111  keeps text that is not a path as it is
        if expanded.startswith("~"):
            raise ValueError("its home folder is unknown; write the whole path, or './~...' for a file of that name")
        return expanded
    return value


LocalPath = Annotated[Path, BeforeValidator(local_path)]
PathOrName = Annotated[str, Field(min_length=1), AfterValidator(local_path)]
Text = Annotated[str, Field(min_length=1)]


def _regular_expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(
            f"it is not a regular expression ({error}); put a backslash before special characters"
        ) from None
    return text


RegularExpression = Annotated[Text, AfterValidator(_regular_expression)]


def _matching(pattern: str, allowed: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(allowed)
        return text

    return AfterValidator(check)


RunName = Annotated[
    str,
    _matching(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}",
        "use at most 200 letters, digits, dots, underscores and hyphens, and start with a letter or digit",
    ),
]
ModelName = Annotated[
    str,
    _matching(
        r"(?=.{1,200}\Z)\w(?:[\w .-]*[\w-])?",
        "use at most 200 letters, digits, underscores and hyphens, and dots and spaces between them; MLflow refuses / "
        "and :, and other characters break models:/NAME@ALIAS",
    ),
]
ModelAlias = Annotated[
    str,
    _matching(
        r"(?![vV][0-9]+\Z)(?!(?i:latest)\Z)[A-Za-z0-9_-]{1,200}",
        "use at most 200 letters, digits, underscores and hyphens; MLflow reserves latest and v1, v2 and so on",
    ),
]

SQLITE_SCHEMES = ("sqlite", "sqlite+pysqlite")


def sqlite_address(path: Path) -> str:
    """Return the address of a SQLite file, where `%XX` quotes a character and `?` ends the path."""
    text = str(path)
    quoted = text.replace("%", "%25").replace("?", "%3F")
    # MLflow creates the parent folder of a sqlite:/// address without unquoting the folder's name.
    return f"{'sqlite' if quoted == text else 'sqlite+pysqlite'}:///{quoted}"


def sqlite_path(address: str) -> Path | None:
    """Return the file of a SQLite address, relative if the address is; None for other addresses."""
    scheme, separator, rest = address.partition(":///")
    return Path(unquote(rest.partition("?")[0])) if separator and scheme in SQLITE_SCHEMES else None
