"""Put a finished run's model into the MLflow registry."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
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
from mlflow.types import ColSpec, Schema, TensorSpec
from PIL import Image

from pipeline.config import Config
from pipeline.tracking import serving
from pipeline.tracking.export import export_model
from pipeline.tracking.runs import COMMIT_TAG, Description
from pipeline.tracking.store import TrackingError, explained, redacted
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
    _refuse_unfit(config, [path for path in (model_file, report_file) if not path.is_file()])
    handle = replay(config, folder)
    if handle.run_id is None:
        raise TrackingError(
            f"MLflow at {redacted(handle.uri)} does not answer, so nothing was registered; try again later"
        )
    report = json.loads(report_file.read_text())
    tags = _tags(Description.load(folder), report, _digest(model_file, report_file))
    mlflow.set_tracking_uri(handle.uri)  # MLflow resolves models:/ addresses by this alone, for the whole process
    with explained(handle.uri):
        client = MlflowClient(handle.uri)
        return _register(client, config, load_model(model_file), handle.run_id, tags)


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
    outputs: list[ColSpec | TensorSpec] = [
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


def _refuse_unfit(config: Config, missing: Sequence[Path]) -> None:
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
    alias = config.registry.alias
    if not re.fullmatch(r"[\w-]+", alias) or re.fullmatch(r"latest|[vV]\d+", alias):
        raise TrackingError(
            f"{alias!r} cannot be an alias; use letters, digits, _ and -, but neither `latest` nor v1, v2 and so on"
        )
