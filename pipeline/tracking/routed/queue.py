"""Images of many calls, brought together into well-filled batches of each program."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

Program = Callable[[Tensor], Tensor]
_Item = tuple[float, Tensor, Future[Tensor]]


class ProgramQueue:
    """One thread that runs programs; images wait at the program that they are for, whichever call they are of.

    It never waits for more while there is something to run, so an image alone is answered as fast as it can be. While a
    program runs, images of other calls gather, and the fullest batch goes next, unless an image has been passed over
    for `patience_seconds`.

    Args:
        programs: (n, ...) -> (n, ...), row by row, for any n >= 1. The first goes before the others: it is the
            predictor, whose answers fill their batches.
        batch_sizes: for each program, images that are run at once at most.
        patience_seconds: the latency that an image may be held for, so that batches are fuller.
    """

    def __init__(self, programs: Sequence[Program], batch_sizes: Sequence[int], patience_seconds: float):
        self._programs, self._batch_sizes, self._patience_seconds = programs, batch_sizes, patience_seconds
        self._waiting: list[deque[_Item]] = [deque() for _ in programs]
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="programs", daemon=True)
        self._thread.start()

    def submit(self, program: int, images: Sequence[Tensor]) -> list[Future[Tensor]]:
        """Let `programs[program]` be run on each of the images, which have one shape; returns a future row for each.

        Raises:
            RuntimeError: the queue is closed.
        """
        futures: list[Future[Tensor]] = [Future() for _ in images]
        now = time.monotonic()
        with self._changed:
            if self._closed:
                raise RuntimeError("the queue is closed")
            self._waiting[program].extend((now, image, future) for image, future in zip(images, futures, strict=True))
            self._changed.notify()
        return futures

    def close(self) -> None:
        """Run what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            program, images, futures = batch
            try:
                rows = self._programs[program](torch.stack(images))
            except Exception as error:  # whatever it is, it is the callers'
                for future in futures:
                    future.set_exception(error)
            else:
                for future, row in zip(futures, rows, strict=True):
                    future.set_result(row)

    def _next_batch(self) -> tuple[int, list[Tensor], list[Future[Tensor]]] | None:
        """Wait for a batch; None when the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or any(self._waiting))
            heads = {k: (len(items), items[0][0]) for k, items in enumerate(self._waiting) if items}
            if not heads:
                return None
            program = next_program(heads, time.monotonic() - self._patience_seconds)
            items = self._waiting[program]
            taken = [items.popleft() for _ in range(min(len(items), self._batch_sizes[program]))]
        return program, [image for _, image, _ in taken], [future for _, _, future in taken]


def next_program(heads: Mapping[int, tuple[int, float]], late: float) -> int:
    """Which program to run: the one with the longest wait that began before `late`, else 0, else the fullest.

    Args:
        heads: of each program that something waits for, how many images, and since when the oldest.
        late: on the same clock.
    """
    waited_long = [(since, program) for program, (_, since) in heads.items() if since <= late]
    if waited_long:
        return min(waited_long)[1]
    return 0 if 0 in heads else max(heads, key=lambda program: heads[program][0])
