"""Get a model out of the MLflow registry by name and alias, and classify image files with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.tracking import serving
from pipeline.tracking.store import TrackingError, explained, redacted, sqlite_file, tracking_uri

_ADVICE = "set MLFLOW_TRACKING_URI where another registry is meant"


def open_model(model_uri: str) -> mlflow.pyfunc.PyFuncModel:
    """Load a registered model; its `predict` takes a DataFrame with a column `image` of JPEG or PNG bytes.

    Args:
        model_uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or any other address of an MLflow model.

    Raises:
        TrackingError: there is no such model; the message names those that there are.
    """
    uri = tracking_uri()
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise TrackingError(f"{file} does not exist, so no model is registered; run jobs.register, or {_ADVICE}")
    mlflow.set_tracking_uri(uri)  # MLflow resolves models:/ addresses by this alone, for the whole process
    with explained(uri):
        problem = _unknown(MlflowClient(uri), model_uri)
        if problem:
            raise TrackingError(f"{problem} in {redacted(uri)}; {_ADVICE}")
        return mlflow.pyfunc.load_model(model_uri)


def classify_files(
    model: mlflow.pyfunc.PyFuncModel, paths: Sequence[Path], at_once: int = 256
) -> Iterator[dict[str, Any]]:
    """Yield a row for each file, in order: `file` and serving.OUTPUT_COLUMNS, with None where there is no answer."""
    for start in range(0, len(paths), at_once):
        group = paths[start : start + at_once]
        contents = [_content(path) for path in group]
        frame = pd.DataFrame({serving.IMAGE_COLUMN: [item if isinstance(item, bytes) else b"" for item in contents]})
        answers = model.predict(frame)
        assert isinstance(answers, pd.DataFrame)
        for path, item, row in zip(group, contents, answers.astype(object).to_dict("records"), strict=True):
            plain = {str(key): None if pd.isna(value) else value for key, value in row.items()}
            yield {"file": str(path), **plain, **({} if isinstance(item, bytes) else {"error": str(item)})}


def _content(path: Path) -> bytes | OSError:
    try:
        return path.read_bytes()
    except OSError as error:
        return error


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
