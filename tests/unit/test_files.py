"""Files that are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from datasets.files import whole_file, write_whole


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
