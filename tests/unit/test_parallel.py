from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import count, islice
from pathlib import Path

import pytest

from datasets.parallel import CHUNKS_AHEAD, map_ordered

ROOT = Path(__file__).resolve().parents[2]


def double_slowly(number: int) -> int:
    time.sleep(0.02 * (number % 3 == 0))
    return 2 * number


def fail_at_five(number: int) -> int:
    if number == 5:
        raise KeyError("five")
    return number


def die_at_five(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_results_come_in_the_order_of_the_work(num_processes):
    assert list(map_ordered(double_slowly, range(30), num_processes)) == [2 * number for number in range(30)]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_no_work_gives_no_results(num_processes):
    assert list(map_ordered(double_slowly, [], num_processes)) == []


def test_few_results_are_computed_ahead_and_leaving_early_stops_the_processes():
    taken = []

    def work():
        for number in count():
            taken.append(number)
            yield number

    results = map_ordered(double_slowly, work(), 2)
    assert list(islice(results, 3)) == [0, 2, 4]
    assert len(taken) <= 3 + 2 * CHUNKS_AHEAD
    results.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_exception_reaches_the_caller(num_processes):
    with pytest.raises(KeyError, match="five"):
        list(map_ordered(fail_at_five, range(20), num_processes))


def test_a_dead_process_is_an_error():
    with pytest.raises(ChildProcessError, match="one of 2 processes died"):
        list(map_ordered(die_at_five, range(20), 2))


def test_processes_exit_with_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from datasets.parallel import map_ordered\n"
        "def process_id(number):\n    time.sleep(0.01)\n    return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    for child in map_ordered(process_id, iter(int, 1), 2):\n        print(child, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and "\nState:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline, f"process {child} outlived its parent"
        time.sleep(0.02)
