"""Image files in, an answer for each in order: decoded on threads, run in batches that calls share."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .images import BadImageError, Picture
from .programs import RoutedNetwork, images_at_once

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


IMAGES_AT_ONCE = 64
PATIENCE_SECONDS = 0.05


@dataclass(frozen=True)
class Answer:
    """What is known of one image: all but `error`, or `error` alone and no cost."""

    class_index: int | None = None
    label: str | None = None
    probability: float | None = None
    """of the class, 0 to 1"""
    resolution: int | None = None
    """that it was run at, pixels"""
    gflops: float = 0.0
    """multiply-adds / 1e9, predictor included"""
    error: str | None = None


@dataclass
class _Image:
    """One image on its way through."""

    picture: Picture | None = None
    crop: Tensor | None = None
    """uint8 (S, S, 3) at the side that is needed next"""
    choice: int = 0
    logits: Future[Tensor] | None = None
    error: str | None = None


class Classifier:
    """Runs a network over the images of any number of calls at once, from any thread.

    Args:
        network: handed over; nothing else may run it meanwhile.
        num_threads: that decode; None is one for each CPU of the process.
        patience_seconds: see ProgramQueue.
    """

    def __init__(
        self, network: RoutedNetwork, num_threads: int | None = None, patience_seconds: float = PATIENCE_SECONDS
    ):
        self.network = network
        programs = [partial(network.logits, index) for index in range(len(network.resolutions))]
        sides = list(network.resolutions)
        if network.is_routed:
            programs, sides = [network.predictor_logits, *programs], [network.predictor_size, *sides]
        self._first_backbone = len(programs) - len(network.resolutions)
        # No more than run at once anyway: whoever waits for the first ones goes on while the others run.
        batch_sizes = [images_at_once(side, network.device) for side in sides]
        self._queue = ProgramQueue(programs, batch_sizes, patience_seconds)
        self._decoders = ThreadPoolExecutor(num_threads or len(os.sched_getaffinity(0)), "decoder")

    def close(self) -> None:
        """End the threads; no call may be under way."""
        self._decoders.shutdown()
        self._queue.close()

    def classify(self, images: Sequence[Any], budget_bias: float = 0.0) -> Iterator[Answer]:
        """Yield an answer for each image, in order; any number of images takes the memory of 2 * IMAGES_AT_ONCE.

        Args:
            images: each the bytes of a JPEG or PNG file, or a square crop, uint8 (S, S, 3).
            budget_bias: see `RoutedNetwork.choose`.
        """
        running: list[_Image] = []
        for start in range(0, len(images), IMAGES_AT_ONCE):
            # These are decoded while those before them run.
            begun = self._begin(images[start : start + IMAGES_AT_ONCE], budget_bias)
            yield from self._answers(running)
            running = begun
        yield from self._answers(running)

    def _begin(self, images: Sequence[Any], budget_bias: float) -> list[_Image]:
        """Decode, choose, and hand each image to the queue at its resolution."""
        begun = self._on_threads(self._opened, images)
        sound = [image for image in begun if image.error is None]
        if self.network.is_routed and sound:
            logits = self._queue.submit(0, [_crop(image) for image in sound])
            choice_N = self.network.choose(torch.stack([row.result() for row in logits]), budget_bias)
            for image, choice in zip(sound, choice_N.tolist(), strict=True):
                image.choice = choice
            self._on_threads(self._crop_at_choice, sound)
        for index in range(len(self.network.resolutions)):
            group = [image for image in sound if image.error is None and image.choice == index]
            rows = self._queue.submit(self._first_backbone + index, [_crop(image) for image in group])
            for image, row in zip(group, rows, strict=True):
                image.logits, image.picture, image.crop = row, None, None
        return begun

    def _on_threads(self, function: Callable[[Any], _Image], items: Sequence[Any]) -> list[_Image]:
        return [function(item) for item in items] if len(items) == 1 else list(self._decoders.map(function, items))

    def _opened(self, image: Any) -> _Image:
        try:
            return self._cropped(_Image(Picture(image, self.network.crop_fraction)), self.network.first_side)
        except BadImageError as error:
            return _Image(error=str(error))

    def _crop_at_choice(self, image: _Image) -> _Image:
        side = self.network.resolutions[image.choice]
        return image if side == self.network.first_side else self._cropped(image, side)

    def _cropped(self, image: _Image, side: int) -> _Image:
        assert image.picture
        try:
            image.crop = torch.from_numpy(image.picture.crop(side))
        except BadImageError as error:
            image.error = str(error)
        return image

    def _answers(self, images: Sequence[_Image]) -> Iterator[Answer]:
        for image in images:
            if image.logits is None:
                yield Answer(error=image.error)
                continue
            probability, index = image.logits.result().softmax(dim=0).max(dim=0)
            yield Answer(
                class_index=int(index),
                label=self.network.classes[int(index)],
                probability=float(probability),
                resolution=self.network.resolutions[image.choice],
                gflops=self.network.gflops[image.choice],
            )


def _crop(image: _Image) -> Tensor:
    assert image.crop is not None
    return image.crop
