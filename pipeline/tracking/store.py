"""Which MLflow server or store is meant, and its answers in words that help."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from datasets.remote import message_of, redacted
from pipeline.config.job_package import job_package
from pipeline.config.schema import Config

PROJECT_FOLDER = Path(__file__).resolve().parents[2]
SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")
REJECTED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


class TrackingError(ValueError):
    """MLflow cannot do what was asked: what it said, and what to change."""


def tracking_uri(config: Config | None = None) -> str:
    """The address of the MLflow server or store: MLFLOW_TRACKING_URI, else the configuration, else mlflow.db in the
    project's folder or, for a Ray job, whose project folder is deleted with it, in cluster.storage.

    A relative SQLite file is taken from the project's folder, so that every process means the same one.

    Raises:
        TrackingError: MLflow has no such kind of store.
    """
    configured = config.tracking.uri if config else None
    uri = os.environ.get("MLFLOW_TRACKING_URI") or configured or _default_store(config)
    scheme = re.split(r"[+:]", uri, maxsplit=1)[0]
    if scheme not in SCHEMES:
        raise TrackingError(
            f"tracking address {redacted(uri)!r} is of no kind that MLflow can use; give http://HOST:PORT, "
            "sqlite:///FILE or postgresql://... in tracking.uri or MLFLOW_TRACKING_URI"
        )
    file = sqlite_file(uri)
    return uri if file is None else f"sqlite:///{file}"


def _default_store(config: Config | None) -> str:
    if config and job_package(PROJECT_FOLDER):
        return f"sqlite:///{Path(config.cluster.storage).absolute() / 'mlflow.db'}"
    return "sqlite:///mlflow.db"


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """Find the experiment or make it.

    Raises:
        TrackingError: it was deleted.
        MlflowException: the server cannot be reached, or refuses.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=_artifact_location(uri))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another run may have made it meanwhile
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"the MLflow experiment {name!r} was deleted in {redacted(uri)}; "
            f"restore it (mlflow experiments restore -x {experiment.experiment_id}) or set tracking.experiment"
        )
    return experiment.experiment_id


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn what MLflow raises inside into a TrackingError."""
    try:
        yield
    except MlflowException as error:
        raise TrackingError(explanation(error, uri)) from error


def server_problem(uri: str) -> str | None:
    """Why the server does not answer a question, and what to change; None where it does."""
    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except MlflowException as error:
        return explanation(error, uri)
    return None


def explanation(error: Exception, uri: str) -> str:
    """One line: what MLflow said, and what to do about it."""
    said = message_of(error, uri)
    said = re.sub(r'^API request to .*\(Caused by \w+\(["\']?(.*?)["\']?\)\)$', r"\1", said)
    if "Invalid Host header" in said or "status code 403" in said:
        advice = "start the server with --allowed-hosts naming the host that is used here"
    elif uri.startswith("http"):
        advice = "check that the server runs and that tracking.uri or MLFLOW_TRACKING_URI names it"
    else:
        advice = "check tracking.uri or MLFLOW_TRACKING_URI"
    return f"MLflow at {redacted(uri)} says: {said[:400]}. {advice[0].upper()}{advice[1:]}."


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite address, absolute; None for other addresses."""
    prefix = "sqlite:///"
    return (PROJECT_FOLDER / uri.removeprefix(prefix)).resolve() if uri.startswith(prefix) else None


def _artifact_location(uri: str) -> str | None:
    """Beside a SQLite file, whatever the working folder; servers know their own place."""
    file = sqlite_file(uri)
    return None if file is None else (file.parent / "mlartifacts").as_uri()


def now_ms() -> int:
    return time.time_ns() // 1_000_000
