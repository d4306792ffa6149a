"""The MLflow registry: put a finished run's model in, get it out by name and alias."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema
from PIL import Image

from pipeline.config import Config
from pipeline.tracking import serving
from pipeline.tracking.export import export_model
from pipeline.tracking.runs import COMMIT_TAG, Description
from pipeline.tracking.store import TrackingError, explained, redacted, sqlite_file, tracking_uri
from pipeline.tracking.tracker import replay
from pipeline.training.checkpoint import LoadedModel, load_model

REQUIREMENTS = ("mlflow", "torch", "numpy", "pandas", "pillow")
DIGEST_TAG = "content_digest"
_OUTPUT_TYPES = {"Int64": "long", "Float64": "double", "string": "string"}


@dataclass(frozen=True)
class RegisteredModel:
    """A version in the registry."""

    name: str
    version: str
    alias: str
    tags: dict[str, str]
    is_new: bool
    """False where the same model with the same report was there already"""

    @property
    def uri(self) -> str:
        return f"models:/{self.name}@{self.alias}"


def register_model(config: Config, folder: Path, model_file: Path, report_file: Path) -> RegisteredModel:
    """Put a finished run's model into the registry and set the configured alias on it.

    The version carries its accuracy, GFLOPs, data digest and commit as tags. The same model is not put in twice.

    Args:
        folder: the run's folder.
        model_file: its model.pt.
        report_file: its report.json.

    Raises:
        ValueError: the run has not finished, or its predictor was never trained.
        TrackingError: the server cannot be reached or refuses; the alias is not allowed.
    """
    missing = [path for path in (model_file, report_file) if not path.is_file()]
    if missing:
        raise ValueError(
            f"the run {config.name} has not finished: {' and '.join(str(path) for path in missing)} missing; "
            "finish it (python -m jobs.train with the same configuration), or name another run"
        )
    if len(config.model.resolutions) > 1 and not (config.stages.predictor or config.stages.joint):
        raise ValueError(
            f"the run {config.name} trained no predictor, so its model cannot choose a resolution; "
            "add stages.predictor or stages.joint to a run that starts from it (init_from)"
        )
    _check_alias(config.registry.alias)
    handle = replay(config, folder)
    if handle.run_id is None:
        raise TrackingError(
            f"MLflow at {redacted(handle.uri)} does not answer, so nothing was registered; try again later"
        )
    report = json.loads(report_file.read_text())
    tags = _tags(Description.load(folder), report, _digest(model_file, report_file))
    with explained(handle.uri):
        client = MlflowClient(handle.uri)
        return _register(client, config, load_model(model_file), handle.run_id, tags)


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
    mlflow.set_tracking_uri(uri)  # MLflow resolves models:/ addresses by this only; it holds for the whole process
    with explained(uri):
        problem = _unknown(MlflowClient(uri), model_uri)
        if problem:
            raise TrackingError(f"{problem} in {redacted(uri)}; {_ADVICE}")
        return mlflow.pyfunc.load_model(model_uri)


_ADVICE = "set MLFLOW_TRACKING_URI where another registry is meant"


def classify_files(
    model: mlflow.pyfunc.PyFuncModel, paths: Sequence[Path], at_once: int = 256
) -> Iterator[dict[str, Any]]:
    """Yield a row for each file, in order: `file` and serving.OUTPUT_COLUMNS, with None where there is no answer."""
    for start in range(0, len(paths), at_once):
        group = paths[start : start + at_once]
        contents = [_content(path) for path in group]
        frame = pd.DataFrame({serving.IMAGE_COLUMN: [item if isinstance(item, bytes) else b"" for item in contents]})
        rows = model.predict(frame).astype(object)
        for path, item, row in zip(group, contents, rows.where(rows.notna(), None).to_dict("records"), strict=True):
            yield {"file": str(path), **row, **({} if isinstance(item, bytes) else {"error": str(item)})}


def _content(path: Path) -> bytes | OSError:
    try:
        return path.read_bytes()
    except OSError as error:
        return error


def _register(
    client: MlflowClient, config: Config, loaded: LoadedModel, run_id: str, tags: dict[str, str]
) -> RegisteredModel:
    name, alias = config.registry.name, config.registry.alias
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    present = next(
        (
            found
            for found in client.search_model_versions(f"name = '{name}'")
            if found.tags.get(DIGEST_TAG) == tags[DIGEST_TAG] and found.status == "READY"
        ),
        None,
    )
    number = str(present.version if present else _create_version(client, name, loaded, run_id, tags))
    client.set_registered_model_alias(name, alias, number)
    return RegisteredModel(name, number, alias, tags, is_new=present is None)


def _create_version(client: MlflowClient, name: str, loaded: LoadedModel, run_id: str, tags: Mapping[str, str]) -> str:
    """Upload the model as one that the run has put out, and make a version of it."""
    experiment = client.get_run(run_id).info.experiment_id
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_pyfunc(loaded, folder)
        logged = client.create_logged_model(experiment, name, run_id, tags=dict(tags))
        client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    source = f"models:/{logged.model_id}"
    return client.create_model_version(name, source, run_id, tags=dict(tags), model_id=logged.model_id).version


def save_pyfunc(loaded: LoadedModel, folder: Path) -> None:
    """Write an MLflow model that needs neither this project nor pickle: programs, description and serving.py."""
    with tempfile.TemporaryDirectory() as temporary:
        programs = Path(temporary) / serving.FOLDER_ARTIFACT
        programs.mkdir()
        export_model(loaded, programs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of pandas, for how MLflow reads the example
            mlflow.pyfunc.save_model(
                folder,
                python_model=serving.__file__,
                artifacts={serving.FOLDER_ARTIFACT: str(programs)},
                signature=_signature(),
                input_example=_example(loaded.model.sides[0]),
                pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
            )


def _signature() -> ModelSignature:
    outputs = [
        ColSpec(_OUTPUT_TYPES[kind], name, required=name == "gflops") for name, kind in serving.OUTPUT_COLUMNS.items()
    ]
    return ModelSignature(Schema([ColSpec("binary", serving.IMAGE_COLUMN)]), Schema(outputs))


def _example(side: int) -> pd.DataFrame:
    """One grey JPEG."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (128, 128, 128)).save(buffer, "JPEG")
    return pd.DataFrame({serving.IMAGE_COLUMN: [buffer.getvalue()]})


def _tags(description: Description, report: Mapping[str, Any], digest: str) -> dict[str, str]:
    reached = report["headline"]
    return {
        "accuracy": f"{reached['top1']:.6f}",
        "accuracy_low": f"{reached['top1_low']:.6f}",
        "accuracy_high": f"{reached['top1_high']:.6f}",
        "gflops": f"{reached['mean_gflops']:.6g}",
        "dataset": description.dataset["name"],
        "dataset_digest": description.dataset["digest"],
        "git_commit": description.tags.get(COMMIT_TAG, "unknown"),
        DIGEST_TAG: digest,
    }


def _digest(*files: Path) -> str:
    """Of what makes a version: the model, its report, and the code that serves it."""
    parts = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (*files, Path(serving.__file__))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _check_alias(alias: str) -> None:
    if not re.fullmatch(r"[\w-]+", alias) or re.fullmatch(r"latest|[vV]\d+", alias):
        raise TrackingError(
            f"{alias!r} cannot be an alias; use letters, digits, _ and -, but neither `latest` nor v1, v2 and so on"
        )


def _unknown(client: MlflowClient, model_uri: str) -> str | None:
    """What is unknown about a models:/NAME@ALIAS or models:/NAME/VERSION address, with what there is instead."""
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/([^/@]+))", model_uri)
    if not match:
        return None
    name, alias, number = match.groups()
    known = {model.name: model for model in client.search_registered_models()}
    if name not in known:
        return f"no model is named {name!r} (there are: {', '.join(sorted(known)) or 'none'})"
    aliases = known[name].aliases
    if alias and alias not in aliases:
        return f"the model {name!r} has no alias {alias!r} (it has: {', '.join(sorted(aliases)) or 'none'})"
    numbers = sorted(int(found.version) for found in client.search_model_versions(f"name = '{name}'"))
    if number and number != "latest" and number not in map(str, numbers):
        return f"the model {name!r} has no version {number!r} (it has: {', '.join(map(str, numbers)) or 'none'})"
    return None
