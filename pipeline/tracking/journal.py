"""The local journal: what is tracked is on disk first, one JSON record a line, and is sent from there."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets.files import write_whole

JOURNAL_FILE, NODE_JOURNALS = "journal.jsonl", "journal-*.jsonl"
Record = dict[str, Any]

_logger = logging.getLogger(__name__)


class Journal:
    """An append-only file of records, and for one server the place up to which it has them.

    A run's folder has one that the driver and rank 0 write, and one more for each node's system metrics.

    A record is delivered at least once: the place is written after the server has answered. MLflow keeps metrics that
    are equal in run, key, step, time and value once only, so there they arrive exactly once.
    """

    def __init__(self, folder: Path, name: str = JOURNAL_FILE):
        self.path = folder / name
        self._delivered_path = folder / f"{name}.delivered"

    def append(self, record: Record) -> None:
        """Add a record, on disk when this returns; raises OSError."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        # Unbuffered: the line is one write, so a second writer's line cannot land inside it.
        with self.path.open("a+b", buffering=0) as file:
            if self._ends_torn(file):
                line = b"\n" + line
            file.write(line)
            os.fsync(file.fileno())

    def read(self, start: int = 0) -> Iterator[tuple[int, Record]]:
        """Yield (place behind the record, record) from byte `start` on; a line that is still incomplete ends it."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(start)
            place = start
            for line in file:
                if not line.endswith(b"\n"):
                    return
                place += len(line)
                record = self._parsed(line)
                if record is not None:
                    yield place, record

    def delivered(self, server: str) -> int:
        """The place up to which `server` has the records; 0 for a server that has none."""
        try:
            content = json.loads(self._delivered_path.read_text())
            if content["server"] == server and content["place"] <= self.path.stat().st_size:
                return content["place"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # absent or damaged: sending everything again is right, only slower
        return 0

    def set_delivered(self, server: str, place: int) -> None:
        write_whole(self._delivered_path, json.dumps({"server": server, "place": place}))

    def num_pending(self, server: str) -> int:
        """How many records `server` does not have yet."""
        return sum(1 for _ in self.read(self.delivered(server)))

    @staticmethod
    def _ends_torn(file: Any) -> bool:
        """Whether a writer died within its line."""
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"

    def _parsed(self, line: bytes) -> Record | None:
        if not line.strip():
            return None
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or "kind" not in record:
            _logger.warning("%s: a damaged line is left out: %.80r", self.path, line)
            return None
        return record


def opened_record() -> Record:
    """The driver has begun, or begun again."""
    return {"kind": "opened", "time_ms": now_ms()}


def metrics_record(stage: str | None, values: Mapping[str, float], step: int, since_ms: int) -> Record:
    """Values of one step of a stage, or of the whole run; `since_ms` is when that step began."""
    # JSON has no NaN and no infinity.
    written = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
    times = {"since_ms": since_ms, "time_ms": now_ms()}
    return {"kind": "metrics", "stage": stage, "step": step, **times, "values": written}


def params_record(stage: str, params: Mapping[str, object]) -> Record:
    """What a stage was run with."""
    times = {"since_ms": now_ms(), "time_ms": now_ms()}
    return {"kind": "params", "stage": stage, **times, "params": {key: str(value) for key, value in params.items()}}


def metric_values(record: Record) -> dict[str, float]:
    """The values of a metrics record."""
    return {key: float(value) for key, value in record["values"].items()}


def artifacts_record(path: str, artifact_path: str | None) -> Record:
    """A file or folder to upload; a relative `path` is below the run's folder."""
    return {"kind": "artifacts", "path": path, "artifact_path": artifact_path, "time_ms": now_ms()}


def status_record(status: str) -> Record:
    """The run has ended: FINISHED, FAILED or KILLED."""
    return {"kind": "status", "status": status, "time_ms": now_ms()}


def now_ms() -> int:
    return time.time_ns() // 1_000_000
