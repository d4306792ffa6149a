"""The local journal of everything that is tracked, one JSON record per line, and its delivery to the MLflow server."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import MAX_METRICS_PER_BATCH

from datasets.files import write_whole
from datasets.remote import redacted
from pipeline.tracking.runs import (
    Description,
    children,
    find_or_create_run,
    find_or_create_stage,
    find_run,
    param_text,
)
from pipeline.tracking.store import REJECTED, TrackingError, connect, now_ms

JOURNAL_FILE, NODE_JOURNALS = "journal.jsonl", "journal-*.jsonl"
_RECORDS_AT_ONCE = 200
Record = dict[str, Any]

_logger = logging.getLogger(__name__)


class Journal:
    """An append-only file of records, and the byte offset up to which one server has received them in one run.

    A run's folder has one journal that the driver and rank 0 write, and one for each node's system metrics.

    A record is delivered at least once, because the offset is written after the server has answered. MLflow stores
    metrics that are equal in run, key, step, time and value only once, so metrics arrive exactly once.
    """

    def __init__(self, folder: Path, name: str = JOURNAL_FILE):
        self.path = folder / name
        self._delivered_path = folder / f"{name}.delivered"

    def append(self, record: Record) -> None:
        """Append a record and sync it to disk. Raise OSError if that fails."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        # Write without a buffer: the line is a single write, so lines of two writers cannot be mixed up.
        with self.path.open("a+b", buffering=0) as file:
            if self._ends_torn(file):
                line = b"\n" + line
            if (written := file.write(line)) != len(line):
                raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes were written", str(self.path))
            os.fsync(file.fileno())

    def read(self, start: int = 0) -> Iterator[tuple[int, Record]]:
        """Yield (offset after the record, record) from byte `start`. Stop at a line that is still incomplete."""
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

    def delivered(self, server: str, run_id: str | None = None) -> int:
        """Return the offset up to which `server` has the records in a run, or in any run if None; 0 without records."""
        try:
            content = json.loads(self._delivered_path.read_text())
            same = content["server"] == server and run_id in (None, content["run_id"])
            if same and content["place"] <= self.path.stat().st_size:
                return content["place"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # the file is absent or damaged; sending everything again is correct, but slower
        return 0

    def set_delivered(self, server: str, run_id: str, place: int) -> None:
        """Store the offset up to which `server` has the records in a run."""
        write_whole(self._delivered_path, json.dumps({"server": server, "run_id": run_id, "place": place}))

    def num_pending(self, server: str) -> int:
        """Return how many records `server` does not have yet."""
        return sum(1 for _ in self.read(self.delivered(server)))

    @staticmethod
    def _ends_torn(file: Any) -> bool:
        """Return whether a writer died in the middle of a line."""
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
            _logger.warning("%s: skipped a damaged line: %.80r", self.path, line)
            return None
        return record


def opened_record() -> Record:
    """Return the record of a start or restart of the driver."""
    return {"kind": "opened", "time_ms": now_ms()}


def metrics_record(stage: str | None, values: Mapping[str, float], step: int, since_ms: int) -> Record:
    """Return the record of one step of a stage, or of the whole run if `stage` is None.

    Args:
        since_ms: when the step began, in milliseconds since 1970.
    """
    # JSON has no NaN and no infinity, so these are stored as text.
    written = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
    times = {"since_ms": since_ms, "time_ms": now_ms()}
    return {"kind": "metrics", "stage": stage, "step": step, **times, "values": written}


def params_record(stage: str, params: Mapping[str, object]) -> Record:
    """Return the record of a stage's parameters."""
    times = {"since_ms": now_ms(), "time_ms": now_ms()}
    return {"kind": "params", "stage": stage, **times, "params": {key: str(value) for key, value in params.items()}}


def metric_values(record: Record) -> dict[str, float]:
    """Return the values of a metrics record."""
    return {key: float(value) for key, value in record["values"].items()}


def artifacts_record(path: str, artifact_path: str | None) -> Record:
    """Return the record of a file or folder to upload; a relative `path` is below the run's folder."""
    return {"kind": "artifacts", "path": path, "artifact_path": artifact_path, "time_ms": now_ms()}


def status_record(status: str) -> Record:
    """Return the record of the end of the run: FINISHED, FAILED or KILLED."""
    return {"kind": "status", "status": status, "time_ms": now_ms()}


class Delivery:
    """Send the records that the server does not have yet, in order. Not thread-safe.

    Args:
        uri: address of the server or store.
        folder: the run's folder.
        run_id: id of the folder's run on the server; None looks it up.
        name: file name of the journal. Only the delivery of the main journal creates a run that the server lacks.
    """

    def __init__(self, uri: str, folder: Path, run_id: str | None = None, name: str = JOURNAL_FILE):
        self.journal = Journal(folder, name)
        self._creates_run = name == JOURNAL_FILE
        self.run_id = run_id
        self.uri, self._folder = uri, folder
        self._server = redacted(uri)
        self._client: MlflowClient | None = None
        self._stage: str | None = None
        self._stage_id = ""

    @property
    def num_pending(self) -> int:
        """The number of records that the server does not have yet."""
        return self.journal.num_pending(self._server)

    def send(self) -> None:
        """Send everything that is in the journal now.

        Raises:
            Exception: any error of the server's client or the file system. Records that were not sent stay pending.
        """
        client, run_id = self._connect()
        while batch := list(islice(self.journal.read(self.journal.delivered(self._server, run_id)), _RECORDS_AT_ONCE)):
            self._send(client, [record for _, record in batch])
            self.journal.set_delivered(self._server, run_id, batch[-1][0])

    def _connect(self) -> tuple[MlflowClient, str]:
        if self._client is None:
            self._client = connect(self.uri)
        if self.run_id is None:
            find = find_or_create_run if self._creates_run else find_run
            self.run_id = find(self._client, self.uri, Description.load(self._folder))
        return self._client, self.run_id

    def _send(self, client: MlflowClient, records: list[Record]) -> None:
        """Send records in order. Skip a record that MLflow will never accept, with a warning."""
        try:
            for are_metrics, group in groupby(records, lambda record: record["kind"] == "metrics"):
                if are_metrics:
                    self._send_metrics(client, group)
                else:
                    for record in group:
                        self._send_event(client, record)
        except MlflowException as error:
            if error.error_code not in REJECTED:
                raise
            self._refuse_deleted(client)
            if len(records) == 1:
                _logger.warning("MLflow refuses a record, so it is skipped: %s (%.300s)", error, records[0])
            else:
                for record in records:
                    self._send(client, [record])

    def _refuse_deleted(self, client: MlflowClient) -> None:
        assert self.run_id is not None
        if client.get_run(self.run_id).info.lifecycle_stage != "active":
            raise TrackingError(
                f"the MLflow run {self.run_id} was deleted while training wrote to it; restore it "
                f"(mlflow runs restore --run-id {self.run_id}), or the next start creates a new one"
            )

    def _send_metrics(self, client: MlflowClient, records: Iterable[Record]) -> None:
        by_run = defaultdict(list)
        for record in records:
            target = self._target(client, record)
            for key, value in metric_values(record).items():
                by_run[target].append(Metric(key, value, record["time_ms"], record["step"]))
        for run_id, metrics in by_run.items():
            for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
                client.log_batch(run_id, metrics[start : start + MAX_METRICS_PER_BATCH])

    def _target(self, client: MlflowClient, record: Record) -> str:
        """Return the id of the run that a record belongs to: its stage's run, or the whole run."""
        assert self.run_id is not None
        stage = record["stage"]
        if stage is None:
            return self.run_id
        if stage != self._stage:
            self._stage_id = find_or_create_stage(client, self.run_id, stage, record["since_ms"])
            self._stage = stage
        return self._stage_id

    def _send_event(self, client: MlflowClient, record: Record) -> None:
        assert self.run_id is not None
        if record["kind"] == "opened":
            client.update_run(self.run_id, status="RUNNING")
        elif record["kind"] == "params":
            params = [Param(key, param_text(value)) for key, value in record["params"].items()]
            client.log_batch(self._target(client, record), params=params)
        elif record["kind"] == "artifacts":
            path = self._folder / record["path"]
            if path.is_dir():
                client.log_artifacts(self.run_id, str(path), record["artifact_path"])
            elif path.is_file():
                client.log_artifact(self.run_id, str(path), record["artifact_path"])
            else:
                _logger.warning("%s no longer exists and cannot be uploaded to MLflow", path)
        elif record["kind"] == "status":
            for child in children(client, self.run_id):
                if child.info.status == "RUNNING":
                    client.set_terminated(child.info.run_id, record["status"], record["time_ms"])
            client.set_terminated(self.run_id, record["status"], record["time_ms"])
            self._stage = None
