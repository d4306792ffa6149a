"""docs/operations.md quotes what the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
COMMANDS = re.compile(r"ray |--|\w+=|[\w.]+$|RAY_|~|/")
"""what is quoted that is no message: commands, options, fields, files"""


def said() -> list[str]:
    """Every piece of text in the code; an f-string is in pieces between its values."""
    files = [file for package in ("datasets", "pipeline", "jobs") for file in (ROOT / package).rglob("*.py")]
    trees = [ast.parse(file.read_text()) for file in files]
    constants = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = [text.decode("latin-1") if isinstance(text, bytes) else text for text in constants]
    return [text for text in texts if isinstance(text, str)]


def quoted() -> list[str]:
    """What the first column of the tables, and the text, quote as the words of a run."""
    rows = [row.split(" | ")[0] for row in PAGE.splitlines() if row.startswith("| ") and "---" not in row]
    prose = [line for line in PAGE.splitlines() if "`stopp" in line or "`interrupted" in line]
    found = [quote for text in (*rows, *prose) for quote in re.findall(r"`([^`]+)`", text)]
    return [quote for quote in found if not COMMANDS.match(quote)]


def test_every_quoted_message_is_one_of_the_code() -> None:
    texts, quotes = said(), quoted()
    assert len(quotes) > 40
    unsaid = [
        quote
        for quote in quotes
        if not any(re.sub(r"\d", "", quote).strip() in text for text in texts)  # numbers are those of a run
    ]
    assert unsaid == []
