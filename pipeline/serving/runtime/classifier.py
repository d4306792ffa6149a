"""Classify image files: decode them on threads, and run them in batches that concurrent calls share."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from .images import BadImageError, Picture
from .policy import STOP, Policy, can_stop, confidence, next_resolution
from .programs import Program, RoutedNetwork, images_at_once

log = logging.getLogger(__name__)
_Item = tuple[float, Tensor, Future[Tensor]]


class Row(Protocol):
    """A row of logits that may still be computed."""

    def result(self) -> Tensor:
        """Wait for the row and return it. Raise the program's exception if it failed."""
        ...


class Programs(Protocol):
    """The interface that runs programs, on a thread of this process or elsewhere."""

    def submit(self, program: int, images: Sequence[Tensor]) -> Sequence[Row]:
        """Run a program on images of one shape and return a row, which may still be computed, for each image."""
        ...

    def close(self) -> None:
        """Stop the threads."""
        ...


class ProgramQueue:
    """One thread that runs programs on the images of all calls. Each program has its own queue of images.

    The thread never waits for more images, so a single image is answered immediately. Images of other calls collect
    while a program runs. The fullest batch runs next, unless an image has waited for `patience_seconds`.

    Args:
        programs: functions (n, ...) -> (n, ...) that treat each row independently, for any n >= 1. The first has
            priority: it is the predictor, whose answers fill the other batches.
        batch_sizes: largest batch of each program, in images.
        patience_seconds: how long an image may wait while fuller batches run first.
        ran: called after each batch with the program's index, the batch size, and the number of images that wait for
            it.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        batch_sizes: Sequence[int],
        patience_seconds: float,
        ran: Callable[[int, int, int], None] | None = None,
    ):
        self._programs, self._batch_sizes, self._patience_seconds = programs, batch_sizes, patience_seconds
        self._ran = ran
        self._waiting: list[deque[_Item]] = [deque() for _ in programs]
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="programs", daemon=True)
        self._thread.start()

    def submit(self, program: int, images: Sequence[Tensor]) -> list[Future[Tensor]]:
        """Queue images of one shape for `programs[program]`, and return a future row for each image.

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
        """Run the queued images, then stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            program, images, futures = batch
            try:
                rows = self._programs[program](torch.stack(images))
            except Exception as error:  # the callers get any error
                for future in futures:
                    future.set_exception(error)
            else:
                for future, row in zip(futures, rows, strict=True):
                    future.set_result(row)
            if self._ran:
                try:
                    self._ran(program, len(images), len(self._waiting[program]))
                except Exception:  # without this thread, every later result would wait forever
                    log.exception("a batch was answered, but could not be counted")

    def _next_batch(self) -> tuple[int, list[Tensor], list[Future[Tensor]]] | None:
        """Wait for a batch. Return None when the queue is closed and empty."""
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
    """Return the program to run next.

    This is the program with the oldest image, if that arrived before `late`. Otherwise it is program 0 if it has
    images, or the program with the most images.

    Args:
        heads: for each program with waiting images, their number and when the oldest arrived, in seconds.
        late: a time on the same clock.
    """
    waited_long = [(since, program) for program, (_, since) in heads.items() if since <= late]
    if waited_long:
        return min(waited_long)[1]
    return 0 if 0 in heads else max(heads, key=lambda program: heads[program][0])


IMAGES_AT_ONCE = 64
TASKS_PER_THREAD = 4
"""The number of tasks that a decoding thread gets for a group of images."""
PATIENCE_SECONDS = 0.05


def program_queue(network: RoutedNetwork, ran: Callable[[int, int, int], None] | None = None) -> ProgramQueue:
    """Return a queue for all programs of a network, with the predictor first if it is routed.

    Args:
        ran: as in `ProgramQueue`.
    """
    programs = [partial(network.logits, index) for index in range(len(network.resolutions))]
    sides = list(network.resolutions)
    if network.is_routed:
        programs, sides = [network.predictor_logits, *programs], [network.predictor_size, *sides]
    # Larger batches would run in several parts anyway; this way the first results return while the others run.
    batch_sizes = [images_at_once(side, network.device) for side in sides]
    return ProgramQueue(programs, batch_sizes, PATIENCE_SECONDS, ran)


@dataclass(frozen=True)
class Answer:
    """The answer for one image. Either everything but `error` is set, or only `error` is, and the cost is 0."""

    class_index: int | None = None
    label: str | None = None
    probability: float | None = None
    """The probability of the class, 0 to 1."""
    resolution: int | None = None
    """The resolution whose answer counts, in pixels."""
    resolutions: str | None = None
    """All resolutions that ran, in order, such as "32,48"."""
    gflops: float = 0.0
    """Multiply-adds / 1e9 at all resolutions that ran, including the predictor if it ran."""
    error: str | None = None


@dataclass
class _Image:
    """The state of one image that is being classified."""

    picture: Picture | None = None
    crop: Tensor | None = None
    """The crop that is needed next, uint8 (S, S, 3)."""
    ran: list[int] = field(default_factory=list)
    """Indices of the resolutions that ran."""
    gflops: float = 0.0
    logits: Row | None = None
    error: str | None = None


class Classifier:
    """Run a network on the images of any number of concurrent calls, from any thread.

    Args:
        network: no other code may run it at the same time.
        num_threads: number of decoding threads, and of large images that are decoded at the same time; None is one per
            CPU of the process.
        programs: runs the network's programs, the predictor first if it is routed; None runs them on one thread.
    """

    def __init__(self, network: RoutedNetwork, num_threads: int | None = None, programs: Programs | None = None):
        self.network = network
        self._first_backbone = int(network.is_routed)
        self._queue = programs or program_queue(network)
        num_threads = num_threads or len(os.sched_getaffinity(0))
        self._num_tasks = TASKS_PER_THREAD * num_threads
        self._decoders = ThreadPoolExecutor(num_threads, "decoder")
        # A call with one image decodes it on its own thread, so the number of decoders does not limit such calls.
        self._large = threading.Semaphore(num_threads)

    def close(self) -> None:
        """Stop the threads. No call may be running."""
        self._decoders.shutdown()
        self._queue.close()

    def classify(self, images: Sequence[Any], policy: Policy | None = None) -> Iterator[Answer]:
        """Yield an answer for each image, in order. At most 2 * IMAGES_AT_ONCE images are in memory.

        Args:
            images: each is the bytes of an image file, the same bytes as base64 text, or a square crop, uint8 (S, S,
                3).
            policy: None is the policy that the model was registered with.
        """
        policy = policy or self.network.default_policy
        running: list[_Image] = []
        opening = self._open(images[:IMAGES_AT_ONCE], policy)
        for start in range(0, len(images), IMAGES_AT_ONCE):
            begun = list(opening)
            # The next images are decoded while these run.
            opening = self._open(images[start + IMAGES_AT_ONCE : start + 2 * IMAGES_AT_ONCE], policy)
            self._begin(begun, policy)
            yield from self._answers(running)
            running = begun
        yield from self._answers(running)

    def _open(self, images: Sequence[Any], policy: Policy) -> Iterable[_Image]:
        """Start to decode images, and to take the crops that the policy needs first."""
        network = self.network
        first_side = network.predictor_size if policy.needs_predictor else network.resolutions[policy.members[0]]
        return self._on_threads(partial(self._opened, first_side), images)

    def _begin(self, images: Sequence[_Image], policy: Policy) -> None:
        """Run images as the policy says. The logits of each image's last resolution may still be computed."""
        network = self.network
        usable = [image for image in images if image.error is None]
        if not usable:
            return
        predictor_NR = None
        if policy.needs_predictor:
            rows = self._queue.submit(0, [_crop(image) for image in usable])
            predictor_NR = torch.stack([row.result() for row in rows])
        now = network.first_resolution(policy, predictor_NR, len(usable)).tolist()
        for index in policy.members:
            group = [place for place, where in enumerate(now) if where == index and usable[place].error is None]
            if group:
                following = self._run(policy, index, [usable[place] for place in group])
                for place, where in zip(group, following, strict=True):
                    now[place] = where
        for image in usable:
            image.gflops = network.cost(policy, image.ran)
            image.picture = image.crop = None

    def _run(self, policy: Policy, index: int, images: Sequence[_Image]) -> list[int]:
        """Queue images at a resolution, and return where each of them runs next."""
        side = self.network.resolutions[index]
        list(self._on_threads(partial(self._cropped, side), images))
        usable = [image for image in images if image.error is None]
        rows = self._queue.submit(self._first_backbone + index, [_crop(image) for image in usable])
        for image, row in zip(usable, rows, strict=True):
            image.logits = row
            image.ran.append(index)
        following = dict.fromkeys(map(id, images), STOP)
        if can_stop(policy, index) and usable:
            confidence_N = confidence(torch.stack([row.result() for row in rows]))
            exhausted_N = torch.tensor([_picture(image).extent <= side for image in usable])
            next_N = next_resolution(policy, index, confidence_N, exhausted_N)
            following |= dict(zip(map(id, usable), next_N.tolist(), strict=True))
        return [following[id(image)] for image in images]

    def _on_threads(self, function: Callable[[Any], _Image], items: Sequence[Any]) -> Iterable[_Image]:
        """Start to apply a function to all items on the decoding threads, and return the results in order.

        A single item is processed on the calling thread, when the result is read.
        """
        if len(items) == 1:
            return map(function, items)
        size = max(1, len(items) // self._num_tasks)
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        return chain.from_iterable(self._decoders.map(lambda part: [function(item) for item in part], parts))

    def _opened(self, side: int, image: Any) -> _Image:
        try:
            network = self.network
            return self._cropped(side, _Image(Picture(image, network.crop_fraction, network.largest_side, self._large)))
        except BadImageError as error:
            return _Image(error=str(error))

    def _cropped(self, side: int, image: _Image) -> _Image:
        """Return the image with its crop at `side`, or with the reason why there is no crop."""
        if image.crop is None or image.crop.shape[0] != side:
            try:
                image.crop = torch.from_numpy(_picture(image).crop(side))
            except BadImageError as error:
                image.error = str(error)
        return image

    def _answers(self, images: Sequence[_Image]) -> Iterator[Answer]:
        rows = [image.logits.result() for image in images if image.error is None and image.logits is not None]
        best = torch.stack(rows).softmax(dim=1).max(dim=1) if rows else ()
        probabilities_and_classes = zip(*(values.tolist() for values in best), strict=True)
        for image in images:
            if image.error is not None or image.logits is None:
                yield Answer(error=image.error)
                continue
            probability, index = next(probabilities_and_classes)
            yield Answer(
                class_index=index,
                label=self.network.classes[index],
                probability=probability,
                resolution=self.network.resolutions[image.ran[-1]],
                resolutions=",".join(str(self.network.resolutions[index]) for index in image.ran),
                gflops=image.gflops,
            )


def _picture(image: _Image) -> Picture:
    assert image.picture is not None
    return image.picture


def _crop(image: _Image) -> Tensor:
    assert image.crop is not None
    return image.crop
