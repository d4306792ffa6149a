"""Only one process at a time writes into a folder of data."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from datasets.files import exclusive

NUM_THREADS, TURNS = 6, 40


def test_one_process_writes_at_a_time_and_the_lock_is_removed(tmp_path: Path) -> None:
    folder, inside, most = tmp_path / "data", [0], [0]
    together = Barrier(NUM_THREADS)

    def take_turns() -> None:
        together.wait()
        for _ in range(TURNS):
            with exclusive(folder, waiting=lambda: None):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                (folder / "held").touch(exist_ok=False)
                (folder / "held").unlink()
                inside[0] -= 1

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for done in [pool.submit(take_turns) for _ in range(NUM_THREADS)]:
            done.result()
    assert most == [1]
    assert list(folder.iterdir()) == []


def test_a_locked_folder_is_an_error_without_waiting(tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(OSError, match="is being prepared by another process"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass
