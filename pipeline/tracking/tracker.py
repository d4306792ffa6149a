"""One MLflow run for each training run, across restarts of both training and server.

The driver opens and closes the run; rank 0 logs in between. Every value is first written to the journal in the run's
folder and sent from there. So a slow, stopped or restarted server neither slows training nor loses a value.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from datasets.remote import redacted
from pipeline.config.schema import Config
from pipeline.tracking.journal import (
    JOURNAL_FILE,
    NODE_JOURNALS,
    Delivery,
    Journal,
    Record,
    artifacts_record,
    metric_values,
    metrics_record,
    opened_record,
    params_record,
    status_record,
)
from pipeline.tracking.runs import describe_run
from pipeline.tracking.store import TrackingError, explanation, now_ms, tracking_uri

if TYPE_CHECKING:
    from datasets.beton import Manifest

CLOSE_SECONDS = 5.0
_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 1.0, 60.0
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunHandle:
    """The tracked run, as the driver passes it to workers."""

    uri: str = field(repr=False)
    """The address of the MLflow server or store."""
    folder: Path
    """The run's folder, which contains its journal."""
    run_id: str | None
    """The run's id; None if the server did not answer. The run is created once it answers."""


def open_run(config: Config, folder: Path, manifest: Manifest) -> RunHandle:
    """Find or create the MLflow run of a run folder, and send what earlier attempts left in the journal.

    If the server does not answer, this logs one warning, and the run is created once the server answers.

    Raises:
        TrackingError: the address cannot work, or the experiment was deleted.
    """
    uri = tracking_uri(config)
    describe_run(config, folder, manifest)
    Journal(folder).append(opened_record())
    return _send_now(uri, folder, "Training continues. ")


def close_run(handle: RunHandle, status: str, artifacts: Path | None = None) -> None:
    """End the run and send all pending records. Records that cannot be sent stay in the journal. Never raises.

    Args:
        status: FINISHED, FAILED or KILLED.
        artifacts: folder to upload under its own name, if it exists.
    """
    journal = Journal(handle.folder)
    try:
        if artifacts is not None and artifacts.exists():
            path, folder = artifacts.resolve(), handle.folder.resolve()
            path = path.relative_to(folder) if path.is_relative_to(folder) else path  # the folder may be moved
            journal.append(artifacts_record(str(path), artifacts.name))
        journal.append(status_record(status))
        _send_now(handle.uri, handle.folder)
    except (TrackingError, OSError) as error:  # if a full disk ended the run, the user must see that error instead
        _logger.warning("MLflow does not have the end of the run: %s", error)


@contextmanager
def tracked_run(config: Config, folder: Path, report: Path, manifest: Manifest) -> Iterator[RunHandle]:
    """Open a run folder's MLflow run. It ends as FINISHED with the report as artifact, or as FAILED or KILLED."""
    tracking, status = open_run(config, folder, manifest), "FAILED"
    try:
        yield tracking
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        close_run(tracking, status, artifacts=report)


def replay(config: Config, folder: Path) -> RunHandle:
    """Send the records of a run folder that the server does not have yet.

    Raises:
        ValueError: the folder belongs to no tracked run.
        TrackingError: the address cannot work, or the experiment was deleted.
    """
    return _send_now(tracking_uri(config), folder)


def _send_now(uri: str, folder: Path, consequence: str = "") -> RunHandle:
    """Send what a run folder's journals contain. If that fails, log one warning, with the consequence for the user."""
    delivery = Delivery(uri, folder)
    nodes = [Delivery(uri, folder, name=path.name) for path in sorted(folder.glob(NODE_JOURNALS))]
    try:
        delivery.send()
        for node in nodes:
            node.run_id = delivery.run_id
            node.send()
    except TrackingError:
        raise
    except Exception as error:  # any error of a client or file system, because everything works without MLflow
        _logger.warning(
            "%s %s%d records wait in %s. They are sent when it answers.",
            explanation(error, uri),
            consequence,
            sum(each.num_pending for each in (delivery, *nodes)),
            folder,
        )
    return RunHandle(uri, folder, delivery.run_id)


class RunLogger:
    """Log for rank 0: to the journal immediately, and to the server from a thread. An error never ends the training.

    After a restart, values that were logged before are not logged again.

    Args:
        journal: file name of the journal. A node's own journal never gets the same step twice, so it is not checked for
            repeated values.
    """

    def __init__(self, handle: RunHandle, journal: str = JOURNAL_FILE):
        self._journal = Journal(handle.folder, journal)
        records = [record for _, record in self._journal.read()] if journal == JOURNAL_FILE else []
        self._logged = _logged_values(records)
        self._logged_params = [(each["stage"], each["params"]) for each in records if each["kind"] == "params"]
        self._since_ms = now_ms()
        self._wake, self._closing = threading.Event(), threading.Event()
        delivery = Delivery(handle.uri, handle.folder, handle.run_id, journal)
        self._thread = threading.Thread(target=self._deliver, args=(delivery,), name="mlflow-delivery", daemon=True)
        self._thread.start()

    def metrics(self, stage: str | None, values: Mapping[str, float], step: int) -> None:
        """Log the values of a step of a stage, or of the whole run if `stage` is None. NaN and infinity are allowed."""
        numbers = {key: float(value) for key, value in values.items()}
        fresh = {key: number for key, number in numbers.items() if (stage, key, step, str(number)) not in self._logged}
        if fresh:
            self._write(metrics_record(stage, fresh, step, self._since_ms))
        self._since_ms = now_ms()

    def params(self, stage: str, params: Mapping[str, object]) -> None:
        """Log the parameters of a stage. Logging them again requires the same values."""
        record = params_record(stage, params)
        if (stage, record["params"]) not in self._logged_params:
            self._write(record)

    def close(self) -> None:
        """Stop after sending for at most `CLOSE_SECONDS`. The driver sends the rest."""
        self._closing.set()
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)

    def _write(self, record: Record) -> None:
        try:
            self._journal.append(record)
        except OSError as error:
            _logger.warning("%s cannot be written, so values are lost: %s (%.300s)", self._journal.path, error, record)
        self._wake.set()

    def _deliver(self, delivery: Delivery) -> None:
        """Send when woken, and retry failures with growing delays. This is the body of the sending thread."""
        retry_seconds = _FIRST_RETRY_SECONDS
        failing = False
        while True:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing.is_set()
            try:
                delivery.send()
            except Exception as error:  # see _send_now
                if not failing:
                    _logger.warning("%s Values are kept and sent later.", explanation(error, delivery.uri))
                failing = True
                self._closing.wait(retry_seconds)
                retry_seconds = min(2 * retry_seconds, _LAST_RETRY_SECONDS)
                self._wake.set()
            else:
                if failing:
                    _logger.warning(
                        "MLflow at %s answers again; everything that was kept is sent.", redacted(delivery.uri)
                    )
                failing, retry_seconds = False, _FIRST_RETRY_SECONDS
            if closing:
                return


def _logged_values(records: Iterable[dict[str, Any]]) -> set[tuple[str | None, str, int, str]]:
    """Return (stage, key, step, value) of every value in the records. Values are text, because NaN never equals NaN."""
    return {
        (record["stage"], key, record["step"], str(value))
        for record in records
        if record["kind"] == "metrics"
        for key, value in metric_values(record).items()
    }


@contextmanager
def system_metrics(handle: RunHandle, node: str) -> Iterator[None]:
    """Record this node's CPU, memory, network and GPU use. A failure only causes a warning. A slow server causes no
    delay."""
    ended = threading.Event()
    thread = threading.Thread(target=_monitor, args=(handle, node, ended), name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(2 * CLOSE_SECONDS)


def _monitor(handle: RunHandle, node: str, ended: threading.Event) -> None:
    """Measure with MLflow's monitors, and write the values to the node's journal. This is the body of the thread.

    MLflow's own thread would stop at the first failed call.
    """
    try:
        name = NODE_JOURNALS.replace("*", node)
        first = 1 + max((record["step"] for _, record in Journal(handle.folder, name).read()), default=-1)
        with closing(RunLogger(handle, name)) as logger:
            monitor = SystemMetricsMonitor(handle.run_id, node_id=node, tracking_uri=handle.uri)
            for step in count(first):
                monitor.collect_metrics()
                if ended.wait(monitor.sampling_interval):
                    break
                values = monitor.aggregate_metrics()
                logger.metrics(None, {f"system/{node}/{key}": value for key, value in values.items()}, step)
                for part in monitor.monitors:
                    part.clear_metrics()
    except Exception as error:
        _logger.warning("system metrics of %s are no longer recorded: %s", node, error)
