"""Put a finished run's model into the MLflow registry."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException

from pipeline.config import Config
from pipeline.evaluation.gate import Answers
from pipeline.evaluation.predictions import Predictions
from pipeline.run_folder import RunFolder
from pipeline.tracking.package import code_files, save_pyfunc
from pipeline.tracking.promotion import ANSWERS_FILE, give_first
from pipeline.tracking.runs import COMMIT_TAG, Description
from pipeline.tracking.store import TrackingError, explained, redacted
from pipeline.tracking.tracker import replay
from pipeline.training.checkpoint import load_model

DIGEST_TAG = "content_digest"
MODEL_FILE = "model.pt"
"""in a version's artifacts: the network as it was trained, for whoever goes on from it"""


@dataclass(frozen=True)
class RegisteredModel:
    """A version in the registry."""

    name: str
    version: str
    alias: str
    champion: str
    """the version that has the alias: this one, where it is the first"""
    tags: dict[str, str]
    is_new: bool
    """False where the same model with the same report was there already"""

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


def register_model(config: Config, folder: Path, model_file: Path, report_file: Path) -> RegisteredModel:
    """Put a finished run's model into the registry; where nothing has the configured alias yet, it gets it.

    The version carries its accuracy, GFLOPs, data digest and commit as tags, and as a file which validation images it
    gets right: `promotion.promote` compares by it. The same model is not put in twice.

    Args:
        folder: the run's folder.
        model_file: its model.pt.
        report_file: its report.json.

    Raises:
        ValueError: the run has not finished, its predictor was never trained, or its report is not of its predictions.
        TrackingError: the server cannot be reached or refuses; the alias is not allowed.
    """
    predictions_file = RunFolder(folder).predictions
    files = (model_file, report_file, predictions_file)
    _refuse_unfit(config, [path for path in files if not path.is_file()])
    handle = replay(config, folder)
    if handle.run_id is None:
        raise TrackingError(
            f"MLflow at {redacted(handle.uri)} does not answer, so nothing was registered; try again later"
        )
    report, description = json.loads(report_file.read_text()), Description.load(folder)
    tags = _tags(description, report, _digest(*files))
    reached = report["headline"]
    answers = Answers.of(Predictions.load(predictions_file), description.dataset["digest"], reached["mean_gflops"])
    if abs(answers.top1 - reached["top1"]) > 1e-9:
        raise ValueError(
            f"{report_file} says top-1 {reached['top1']:.6f}, but {predictions_file} {answers.top1:.6f}: they are not "
            "of one evaluation; run jobs.evaluate"
        )
    mlflow.set_tracking_uri(handle.uri)  # MLflow resolves models:/ addresses by this alone, for the whole process
    with explained(handle.uri):
        client = MlflowClient(handle.uri)
        return _register(client, config, model_file, answers, handle.run_id, tags)


def _register(
    client: MlflowClient, config: Config, model_file: Path, answers: Answers, run_id: str, tags: dict[str, str]
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
    number = str(present.version if present else _create_version(client, name, model_file, answers, run_id, tags))
    champion = give_first(client, name, alias, number)
    return RegisteredModel(name, number, alias, champion, tags, is_new=present is None)


def _create_version(
    client: MlflowClient, name: str, model_file: Path, answers: Answers, run_id: str, tags: Mapping[str, str]
) -> str:
    """Upload the model, and which images it gets right, as one that the run has put out, and make a version of it."""
    experiment = client.get_run(run_id).info.experiment_id
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_pyfunc(load_model(model_file), folder)
        shutil.copyfile(model_file, folder / MODEL_FILE)
        answers.save(folder / ANSWERS_FILE)
        logged = client.create_logged_model(experiment, name, run_id, tags=dict(tags))
        client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    source = f"models:/{logged.model_id}"
    return client.create_model_version(name, source, run_id, tags=dict(tags), model_id=logged.model_id).version


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
    """Of what makes a version: the model, its report and predictions, and the code that serves it."""
    parts = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (*files, *code_files())]
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
