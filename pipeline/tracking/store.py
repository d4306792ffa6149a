"""The address of the MLflow server or store, and its errors explained."""

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
    """An MLflow operation failed; the message says why and what to change."""


def tracking_uri(config: Config | None = None) -> str:
    """Returns the address of the MLflow server or store.

    It is MLFLOW_TRACKING_URI, else tracking.uri, else mlflow.db in the project's folder. For a Ray job, whose project
    folder is deleted when it ends, the default lies in cluster.storage. The path of a relative SQLite file starts at
    the project's folder, so every process uses the same file.

    Raises:
        TrackingError: MLflow cannot use this kind of address.
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
    """Find the experiment or create it; returns its id.

    Raises:
        TrackingError: the experiment was deleted.
        MlflowException: the server cannot be reached, or refuses.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=_artifact_location(uri))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another run may have created it
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
    """Turn an MlflowException that is raised inside into a TrackingError."""
    try:
        yield
    except MlflowException as error:
        raise TrackingError(explanation(error, uri)) from error


def server_problem(uri: str) -> str | None:
    """Returns why the server does not answer a query and what to change, or None if it does."""
    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except MlflowException as error:
        return explanation(error, uri)
    return None


def explanation(error: Exception, uri: str) -> str:
    """Returns one line: what MLflow reported and what to do about it."""
    said = message_of(error, uri)
    said = re.sub(r'^API request to .*\(Caused by \w+\(["\']?(.*?)["\']?\)\)$', r"\1", said)
    if "Invalid Host header" in said or "status code 403" in said:
        advice = "start the server with --allowed-hosts that includes this host name"
    elif uri.startswith("http"):
        advice = "check that the server runs and that tracking.uri or MLFLOW_TRACKING_URI names it"
    else:
        advice = "check tracking.uri or MLFLOW_TRACKING_URI"
    return f"MLflow at {redacted(uri)} says: {said[:400]}. {advice[0].upper()}{advice[1:]}."


def sqlite_file(uri: str) -> Path | None:
    """Returns the absolute path of a SQLite address's file; None for other addresses."""
    prefix = "sqlite:///"
    return (PROJECT_FOLDER / uri.removeprefix(prefix)).resolve() if uri.startswith(prefix) else None


def _artifact_location(uri: str) -> str | None:
    """Returns the folder beside a SQLite file, whatever the working folder; None for servers, which have their own."""
    file = sqlite_file(uri)
    return None if file is None else (file.parent / "mlartifacts").as_uri()


def now_ms() -> int:
    return time.time_ns() // 1_000_000
