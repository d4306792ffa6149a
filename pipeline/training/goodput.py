"""Goodput: where a run's wall-clock time goes, from one clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

SET_UP, TABLE, COMPILE, DATA_WAIT, STEP, EVALUATE, CHECKPOINT = PHASES = (
    "set_up",
    "table",
    "compile",
    "data_wait",
    "step",
    "evaluate",
    "checkpoint",
)


class Goodput:
    """A clock that is in exactly one phase at any time, so the phases' seconds add up to the whole.

    It is the time of this process: a GPU works on while the clock is in another phase, and what a stage's first step
    compiles, allocates or tunes is `compile` with or without torch.compile. It starts in `set_up`.

    Args:
        now: seconds since some moment.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._seconds = now, dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = SET_UP, now()

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds in each phase until now."""
        self.enter(self._phase)
        return MappingProxyType(dict(self._seconds))

    def enter(self, phase: str) -> None:
        """Leave the phase that the clock is in for `phase`, one of PHASES."""
        now = self._now()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now
        assert phase in self._seconds, phase

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """`phase` for the body, then the phase of before."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def metrics(self) -> dict[str, float]:
        """`goodput_PHASE_seconds`, and `goodput_PHASE_share` of the total, a fraction of 1."""
        seconds = self.seconds
        total = sum(seconds.values()) or 1.0
        return {f"goodput_{phase}_seconds": value for phase, value in seconds.items()} | {
            f"goodput_{phase}_share": value / total for phase, value in seconds.items()
        }
