"""Check the address of the MLflow server or store, connect to it, and explain its errors."""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import sqlalchemy
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from datasets.remote import message_of, redacted
from pipeline.config.fields import sqlite_address, sqlite_path
from pipeline.config.job_package import job_package
from pipeline.config.schema import Config

PROJECT_FOLDER = Path(__file__).resolve().parents[2]
DRIVERS = {
    "psycopg": "pip install 'psycopg[binary]'",
    "psycopg2": "pip install psycopg2-binary, or use postgresql://... with psycopg 3",
    "MySQLdb": "pip install mysqlclient, or pip install pymysql and use mysql+pymysql://...",
    "pymysql": "pip install pymysql",
    "pyodbc": "pip install pyodbc and install Microsoft's ODBC driver",
    "pymssql": "pip install pymssql",
}
"""Maps a module that SQLAlchemy imports for a kind of database to how to install it."""
DATABASES = ("postgresql", "mysql", "mssql")
SCHEMES = ("sqlite", *DATABASES, "http", "https", "databricks")
CONNECT_SECONDS = 10
"""How long to wait for a database to answer."""
REJECTED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
"""MLflow's error codes for a record that it will never accept."""
_FORMS = "give http://HOST:PORT, sqlite:///FILE or postgresql://... in tracking.uri or MLFLOW_TRACKING_URI"


class TrackingError(ValueError):
    """An MLflow operation failed. The message says why and what to change."""


def tracking_uri(config: Config | None = None) -> str:
    """Return the address of the MLflow server or store, after checks that need no connection.

    It is MLFLOW_TRACKING_URI or, if that is not set, tracking.uri, or by default mlflow.db in the project's folder. For
    a Ray job, whose project folder is deleted when the job ends, the default is in cluster.storage. A relative SQLite
    path starts at the project's folder, so every process uses the same file.

    Raises:
        TrackingError: MLflow cannot use the address: an unsupported kind or form, a missing driver, or a file that is
            not a store.
    """
    configured = config.tracking.uri if config else None
    uri = os.environ.get("MLFLOW_TRACKING_URI") or configured or _default_store(config)
    file = sqlite_file(uri)
    if file is not None:
        _, mark, query = uri.partition("?")
        uri = f"{sqlite_address(file)}{mark}{query}"
    if problem := _address_problem(uri, file):
        raise TrackingError(f"the tracking address {redacted(uri)!r} cannot be used: {problem}")
    return uri


def _default_store(config: Config | None) -> str:
    folder = Path(config.cluster.storage).absolute() if config and job_package(PROJECT_FOLDER) else PROJECT_FOLDER
    return sqlite_address(folder / "mlflow.db")


def _address_problem(uri: str, file: Path | None) -> str | None:
    """Return why MLflow cannot use an address and what to do, or None. This does not connect to anything."""
    kind, _, driver = uri.partition(":")[0].partition("+")
    if kind not in SCHEMES:
        return f"MLflow does not support this kind; {_FORMS}"
    if kind == "sqlite":
        if driver not in ("", "pysqlite"):
            return "MLflow uses Python's own sqlite3; give sqlite:///FILE"
        return "a SQLite address has three slashes: sqlite:///FILE" if file is None else _file_problem(file)
    if kind in DATABASES:
        return _driver_problem(uri)
    if kind == "databricks":
        return _databricks_problem(uri)
    try:
        url = urlsplit(uri)
        complete = bool(url.hostname) and url.port != 0
    except ValueError:
        complete = False
    return None if complete else "it names no host and port; give http://HOST:PORT"


def _file_problem(file: Path) -> str | None:
    """Return why a file cannot be a SQLite store, or None. A file that does not exist yet can be one."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return f"the path {redacted(ascii(str(file)))} is not UTF-8; choose another folder"
    if file.name in ("", ":memory:") or file == PROJECT_FOLDER:
        return "it names no file, so nothing would be stored; give sqlite:///FILE"
    if file.is_dir():
        return f"{file} is a folder; give a file in it, such as {sqlite_address(file / 'mlflow.db')}"
    if not file.exists():
        parent = next(folder for folder in file.parents if folder.exists())
        allowed = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
        return None if allowed else f"{parent} is not a folder that this user may write; choose another file"
    if not os.access(file, os.R_OK | os.W_OK):
        return f"this user may not read and write {file}; change its permissions, or choose another file"
    try:
        # Do not open it as a file: closing it would release the locks of other SQLite connections in this process.
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=0)) as connection:
            connection.execute("PRAGMA schema_version")
    except sqlite3.Error as error:
        if error.sqlite_errorcode not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return f"{file} cannot be used as a SQLite database ({error}); give another file, which is created"
    return None


def _driver_problem(uri: str) -> str | None:
    try:
        _engine(uri).dispose()
    except ImportError as error:
        return f"the Python module {error.name} is missing on this machine; install it: {_install(error.name)}"
    except (SQLAlchemyError, ValueError, TypeError) as error:
        return f"{message_of(error, uri)}; {_FORMS}"
    return None


def _install(module: str | None) -> str:
    return DRIVERS.get(module or "", f"pip install {module}")


def _databricks_problem(uri: str) -> str | None:
    from mlflow.utils.databricks_utils import get_databricks_host_creds

    try:
        get_databricks_host_creds(uri)
    except Exception as error:  # MLflow raises its own errors, Databricks' SDK others
        return f"{message_of(error, uri)[:300]}; configure the Databricks CLI, or {_FORMS}"
    return None


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """Find or create the experiment, and return its id.

    Raises:
        TrackingError: the experiment was deleted.
        MlflowException: the server cannot be reached, or refuses the request.
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
    """Turn an error of MLflow or its database, raised in the `with` block, into a TrackingError."""
    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        raise TrackingError(explanation(error, uri)) from error


def connect(uri: str) -> MlflowClient:
    """Return a client of a server or store.

    A database is read once first, because MLflow itself would retry for minutes. The folder of a SQLite file is
    created.

    Raises:
        TrackingError: the address is not a database that MLflow can use, so a later attempt would fail too.
        Exception: any other error of the database's driver, of MLflow, or of the file system.
    """
    if (file := sqlite_file(uri)) is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    if file is not None or uri.startswith(DATABASES):
        engine = _engine(uri)
        try:
            sqlalchemy.inspect(engine).get_table_names()
        except OperationalError:
            raise
        except SQLAlchemyError as error:
            raise TrackingError(explanation(error, uri)) from error
        finally:
            engine.dispose()
    return MlflowClient(uri)


def _engine(uri: str) -> sqlalchemy.Engine:
    url = sqlalchemy.make_url(uri)
    if uri.startswith(("postgresql", "mysql")) and "connect_timeout" not in url.query:
        url = url.update_query_dict({"connect_timeout": str(CONNECT_SECONDS)})
    return sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)


def server_problem(uri: str) -> str | None:
    """Return why the server or store does not answer a query and what to change, or None if it answers."""
    file = sqlite_file(uri)
    if problem := _address_problem(uri, file):
        return f"the tracking address {redacted(uri)!r} cannot be used: {problem}"
    if file is not None and not file.exists():
        return None  # the first run creates it; a query would create it now
    try:
        connect(uri).search_experiments(max_results=1)
    except Exception as error:  # each kind of store raises its own errors
        return explanation(error, uri)
    return None


def explanation(error: Exception, uri: str) -> str:
    """Return one line: what MLflow reported and what to do about it."""
    if isinstance(error, TrackingError):
        return f"{error}."
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
    """Return the absolute path of a SQLite address's file, or None for other addresses."""
    path = sqlite_path(uri)
    return None if path is None else (PROJECT_FOLDER / path).resolve()


def _artifact_location(uri: str) -> str | None:
    """Return the artifact folder next to a SQLite file, or None for a server, which has its own."""
    file = sqlite_file(uri)
    return None if file is None else (file.parent / "mlartifacts").as_uri()


def now_ms() -> int:
    """Return the current time in milliseconds since 1970, as MLflow stores it."""
    return time.time_ns() // 1_000_000
