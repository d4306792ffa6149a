"""Get a model out of the MLflow registry by name and alias, and classify image files with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.tracking import serving
from pipeline.tracking.store import TrackingError, explained, redacted, sqlite_file, tracking_uri

_ADVICE = "set MLFLOW_TRACKING_URI where another registry is meant"
MAX_FILE_BYTES = 256 * 1024**2
"""a larger file is an error rather than a process that runs out of memory"""
_READERS = 8


@dataclass(frozen=True)
class FoundModel:
    """A model that is in the registry, for whichever process is to load it."""

    tracking_uri: str
    uri: str
    """with the number of the version where an alias was given, which may move"""
    uuid: str
    """of its content"""


def find_model(model_uri: str, budget_bias: float = 0.0) -> FoundModel:
    """Look a model up, without loading it.

    Args:
        model_uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or any other address of an MLflow model.
        budget_bias: that it is to be asked with.

    Raises:
        TrackingError: there is no such model; the message names those that there are. Or it takes no budget_bias.
    """
    uri = tracking_uri()
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise TrackingError(f"{file} does not exist, so no model is registered; run jobs.register, or {_ADVICE}")
    mlflow.set_tracking_uri(uri)  # MLflow resolves models:/ addresses by this alone, for the whole process
    with explained(uri):
        client = MlflowClient(uri)
        problem = _unknown(client, model_uri)
        if problem:
            raise TrackingError(f"{problem} in {redacted(uri)}; {_ADVICE}")
        numbered = _numbered(client, model_uri)
        info = mlflow.models.get_model_info(numbered)
    params = info.signature.params if info.signature else None
    if budget_bias and serving.BUDGET_PARAM not in {param.name for param in params or []}:
        raise TrackingError(
            f"{numbered} takes no {serving.BUDGET_PARAM}; register its run again, or leave --budget-bias out"
        )
    return FoundModel(uri, numbered, info.model_uuid)


def load_model(model: FoundModel) -> mlflow.pyfunc.PyFuncModel:
    """Load what was found; its `predict` takes a DataFrame with a column `image` of JPEG or PNG bytes.

    Raises:
        TrackingError: it cannot be had any more.
    """
    mlflow.set_tracking_uri(model.tracking_uri)
    with explained(model.tracking_uri):
        return mlflow.pyfunc.load_model(model.uri)


def open_model(model_uri: str, budget_bias: float = 0.0) -> mlflow.pyfunc.PyFuncModel:
    """`find_model` and `load_model` in one."""
    return load_model(find_model(model_uri, budget_bias))


def classify_files(
    model: mlflow.pyfunc.PyFuncModel, paths: Sequence[Path], at_once: int = 256, budget_bias: float = 0.0
) -> Iterator[dict[str, Any]]:
    """Yield a row for each file, in order: `file` and serving.OUTPUT_COLUMNS, with None where there is no answer.

    The next files are read while the model is at work.
    """
    params = {serving.BUDGET_PARAM: budget_bias} if budget_bias else None
    groups = [paths[start : start + at_once] for start in range(0, len(paths), at_once)]
    with ThreadPoolExecutor(_READERS) as readers:
        ahead = [readers.map(_content, group) for group in groups[:1]]
        for position, group in enumerate(groups):
            contents = list(ahead.pop())
            ahead += [readers.map(_content, following) for following in groups[position + 1 : position + 2]]
            images = [item if isinstance(item, bytes) else b"" for item in contents]
            answers = model.predict(pd.DataFrame({serving.IMAGE_COLUMN: images}), params=params)
            assert isinstance(answers, pd.DataFrame)
            for path, item, row in zip(group, contents, answers.astype(object).to_dict("records"), strict=True):
                plain = {str(key): None if pd.isna(value) else value for key, value in row.items()}
                yield {"file": str(path), **plain, **({} if isinstance(item, bytes) else {"error": item})}


def _content(path: Path) -> bytes | str:
    """The file's bytes, or as text why there are none."""
    try:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            return f"the file has {size:,} bytes, more than {MAX_FILE_BYTES:,}"
        return path.read_bytes()
    except OSError as error:
        return str(error)


def _numbered(client: MlflowClient, model_uri: str) -> str:
    """The address with the version's number in place of an alias."""
    match = re.fullmatch(r"models:/([^/@]+)@([^/@]+)", model_uri)
    if not match:
        return model_uri
    name, alias = match.groups()
    return f"models:/{name}/{client.get_model_version_by_alias(name, alias).version}"


def _unknown(client: MlflowClient, model_uri: str) -> str | None:
    """What is unknown about a models:/NAME@ALIAS or models:/NAME/VERSION address, with what there is instead."""
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/([^/@]+))", model_uri)
    if not match:
        return None
    name, alias, number = match.groups()
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = sorted(model.name for model in client.search_registered_models())
        return f"no model is named {name!r} (there are: {', '.join(known) or 'none'})"
    if alias and alias not in aliases:
        return f"the model {name!r} has no alias {alias!r} (it has: {', '.join(sorted(aliases)) or 'none'})"
    numbers = sorted(int(found.version) for found in client.search_model_versions(f"name = '{name}'"))
    if number and number != "latest" and number not in map(str, numbers):
        return f"the model {name!r} has no version {number!r} (it has: {', '.join(map(str, numbers)) or 'none'})"
    return None
