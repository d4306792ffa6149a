"""docs/operations.md quotes the messages of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
COMMANDS = re.compile(r"ray |--|\w+=|[\w.]+$|RAY_|~|/")
"""Matches quotes that are not messages: commands, options, fields, files."""


def texts_in_code() -> list[str]:
    """Return every string constant in the code; an f-string is split at its values."""
    files = [file for package in ("datasets", "pipeline", "jobs") for file in (ROOT / package).rglob("*.py")]
    trees = [ast.parse(file.read_text()) for file in files]
    constants = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = [text.decode("latin-1") if isinstance(text, bytes) else text for text in constants]
    return [text for text in texts if isinstance(text, str)]


def quoted() -> list[str]:
    """Return the messages that the page quotes, in the first column of its tables and in its text."""
    rows = [row.split(" | ")[0] for row in PAGE.splitlines() if row.startswith("| ") and "---" not in row]
    prose = [line for line in PAGE.splitlines() if "`stopp" in line or "`interrupted" in line]
    found = [quote for text in (*rows, *prose) for quote in re.findall(r"`([^`]+)`", text)]
    return [quote for quote in found if not COMMANDS.match(quote)]


def test_every_quoted_message_is_in_the_code() -> None:
    texts, quotes = texts_in_code(), quoted()
    assert len(quotes) > 40
    missing = [
        quote
        for quote in quotes
        if not any(re.sub(r"\d", "", quote).strip() in text for text in texts)  # numbers are from one run
    ]
    assert missing == []
