from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest
import torch
from torch import Tensor

from pipeline.serving.runtime.classifier import ProgramQueue, next_program

TIMEOUT = 60


class Recorded:
    """A program that adds a number to its images, records its batch sizes and can be blocked."""

    def __init__(self, number: int):
        self.number = number
        self.sizes: list[int] = []
        self.entered, self.may_go = threading.Event(), threading.Event()
        self.may_go.set()

    def __call__(self, images: Tensor) -> Tensor:
        self.entered.set()
        assert self.may_go.wait(TIMEOUT)
        self.sizes.append(len(images))
        return images + self.number


def numbers(*values: float) -> list[Tensor]:
    return [torch.tensor([value]) for value in values]


def results(rows: list[Future[Tensor]]) -> list[float]:
    return [row.result(TIMEOUT).item() for row in rows]


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ({1: (3, 10.0), 2: (9, 11.0)}, 2),  # the fullest
        ({0: (1, 12.0), 1: (3, 10.0), 2: (9, 11.0)}, 0),  # the predictor has priority
        ({0: (1, 12.0), 1: (1, 4.9), 2: (9, 11.0)}, 1),  # it has waited too long
        ({0: (1, 4.0), 1: (1, 4.9), 2: (9, 3.0)}, 2),  # of those, the oldest
    ],
)
def test_which_program_runs_next(heads, expected):
    assert next_program(heads, late=5.0) == expected


def test_images_of_many_calls_share_a_batch_and_return_in_order():
    program = Recorded(100)
    program.may_go.clear()
    ran: list[tuple[int, int, int]] = []
    queue = ProgramQueue([program], [4], TIMEOUT, ran=lambda *batch: ran.append(batch))
    calls = [queue.submit(0, numbers(0))]
    assert program.entered.wait(TIMEOUT)
    calls += [queue.submit(0, numbers(*values)) for values in ([1, 2], [3], [4, 5, 6])]  # while it is busy
    program.may_go.set()
    assert [results(rows) for rows in calls] == [[100], [101, 102], [103], [104, 105, 106]]
    assert program.sizes == [1, 4, 2]
    queue.close()
    assert ran == [(0, 1, 6), (0, 4, 2), (0, 2, 0)]


def test_the_fuller_batch_runs_first():
    busy, fuller, emptier, order = Recorded(0), Recorded(1), Recorded(2), []
    busy.may_go.clear()
    queue = ProgramQueue([busy, emptier, fuller], [8, 8, 8], patience_seconds=TIMEOUT)
    queue.submit(0, numbers(0))
    assert busy.entered.wait(TIMEOUT)
    held = queue.submit(1, numbers(1))
    full = queue.submit(2, numbers(1, 2, 3))
    for name, row in (("held", held[0]), ("full", full[-1])):
        row.add_done_callback(lambda _, name=name: order.append(name))
    busy.may_go.set()
    queue.close()
    assert order == ["full", "held"]


def test_a_failing_program_fails_only_its_own_images():
    def failing(images: Tensor) -> Tensor:
        raise MemoryError("no memory for the images")

    queue = ProgramQueue([failing, Recorded(1)], [4, 4], patience_seconds=0)
    failed = queue.submit(0, numbers(1, 2))
    for row in failed:
        with pytest.raises(MemoryError, match="no memory"):
            row.result(TIMEOUT)
    assert results(queue.submit(1, numbers(1))) == [2]
    queue.close()


def test_closing_answers_queued_images_and_refuses_new_ones():
    program = Recorded(1)
    program.may_go.clear()
    queue = ProgramQueue([program], [2], patience_seconds=TIMEOUT)
    rows = queue.submit(0, numbers(1, 2, 3))
    program.may_go.set()
    queue.close()
    assert results(rows) == [2, 3, 4]
    with pytest.raises(RuntimeError, match="closed"):
        queue.submit(0, numbers(1))


def test_calls_from_many_threads_get_their_own_answers():
    queue = ProgramQueue([Recorded(1000), Recorded(2000)], [8, 8], patience_seconds=0.01)
    answers: dict[int, list[float]] = {}

    def call(caller: int) -> None:
        values = [float(10 * caller + k) for k in range(10)]
        first = results(queue.submit(0, numbers(*values)))
        answers[caller] = results(queue.submit(1, numbers(*first)))

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(16)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(TIMEOUT)
    assert answers == {caller: [3000.0 + 10 * caller + k for k in range(10)] for caller in range(16)}
    queue.close()
