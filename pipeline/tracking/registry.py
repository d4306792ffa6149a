"""Register a finished run's model in the MLflow registry, and find and load registered models."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException

from datasets.remote import redacted
from pipeline.config.schema import Config
from pipeline.evaluation.gate import ANSWERS_FILE, Answers
from pipeline.serving import pyfunc
from pipeline.serving.export import fitted_policies
from pipeline.serving.package import code_files, save_pyfunc
from pipeline.tracking.promotion import give_first
from pipeline.tracking.runs import COMMIT_TAG, Description
from pipeline.tracking.store import TrackingError, connect, explained, sqlite_file, tracking_uri
from pipeline.tracking.tracker import replay
from pipeline.training.checkpoint import load_model

DIGEST_TAG = "content_digest"
MODEL_FILE = "model.pt"
"""The artifact of a version with its trained network, from which other runs can start."""
_ADVICE = "set MLFLOW_TRACKING_URI or tracking.uri to use another registry"


@dataclass(frozen=True)
class RegisteredModel:
    """A model version in the registry."""

    name: str
    version: str
    alias: str
    champion: str
    """The version that has the alias, which is this one if it is the first."""
    tags: dict[str, str]
    is_new: bool
    """False if the same model with the same report was already registered."""

    @property
    def uri(self) -> str:
        """The version's address, `models:/NAME/VERSION`."""
        return f"models:/{self.name}/{self.version}"


def register_model(config: Config, folder: Path, model_file: Path, report_file: Path) -> RegisteredModel:
    """Register a finished run's model. It gets the configured alias if no version has it yet.

    The version has its accuracy, GFLOPs, data digest and commit as tags, and an artifact answers.npz, which records
    which validation images it classifies correctly, for `promotion.promote`. The same model is not registered twice.

    Args:
        folder: the run's folder.
        model_file: the run's model.pt.
        report_file: the run's report.json.

    Raises:
        ValueError: the run has not finished, or its report and its answers do not match.
        TrackingError: the server cannot be reached, or refuses the request.
    """
    answers_file = report_file.with_name(ANSWERS_FILE)
    files = (model_file, report_file, answers_file)
    _refuse_unfinished(config, [path for path in files if not path.is_file()])
    handle = replay(config, folder)
    if handle.run_id is None:
        raise TrackingError(
            f"MLflow at {redacted(handle.uri)} does not answer, so nothing was registered; try again when it runs"
        )
    report, description = json.loads(report_file.read_text()), Description.load(folder)
    tags = _tags(description, report, _digest(*files))
    reached = report["headline"]
    answers = replace(Answers.load(answers_file), data_digest=description.dataset["digest"])
    if abs(answers.top1 - reached["top1"]) > 1e-9:
        raise ValueError(
            f"{report_file} states top-1 {reached['top1']:.6f}, but {answers_file} gives {answers.top1:.6f}: they "
            "come from different evaluations; run jobs.evaluate"
        )
    mlflow.set_tracking_uri(handle.uri)  # MLflow resolves models:/ addresses by this alone, for the whole process
    with explained(handle.uri):
        client = connect(handle.uri)
        return _register(client, config, model_file, answers, fitted_policies(report), handle.run_id, tags)


def _register(
    client: MlflowClient,
    config: Config,
    model_file: Path,
    answers: Answers,
    policies: Mapping[str, Any],
    run_id: str,
    tags: dict[str, str],
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
    number = str(
        present.version if present else _create_version(client, name, model_file, answers, policies, run_id, tags)
    )
    champion = give_first(client, name, alias, number)
    return RegisteredModel(name, number, alias, champion, tags, is_new=present is None)


def _create_version(
    client: MlflowClient,
    name: str,
    model_file: Path,
    answers: Answers,
    policies: Mapping[str, Any],
    run_id: str,
    tags: Mapping[str, str],
) -> str:
    """Upload the model and its answers as an output of the run, and create a version from them."""
    experiment = client.get_run(run_id).info.experiment_id
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_pyfunc(load_model(model_file), folder, policies)
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
    """Return a digest of everything that makes a version: model, report, predictions and serving code."""
    parts = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (*files, *code_files())]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _refuse_unfinished(config: Config, missing: Sequence[Path]) -> None:
    if [path.name for path in missing] == [ANSWERS_FILE]:
        raise ValueError(
            f"{missing[0]} is missing: an older version wrote the report. Run jobs.evaluate, then register"
        )
    if missing:
        raise ValueError(
            f"the run {config.name} has not finished: {' and '.join(str(path) for path in missing)} missing; "
            "finish it (python -m jobs.train with the same configuration) or choose another run"
        )


@dataclass(frozen=True)
class FoundModel:
    """A model in the registry, described so that any process can load it."""

    tracking_uri: str
    uri: str
    """The model's address, with the version number in place of an alias or `latest`, because these may move."""
    uuid: str
    """The id of the model's content."""


def find_model(model_uri: str, budget_bias: float = 0.0, registry: str | None = None) -> FoundModel:
    """Look up a model without loading it.

    Args:
        model_uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or any other address of an MLflow model.
        budget_bias: the value that predictions will use.
        registry: address of the registry; None means the address that `tracking_uri()` returns.

    Raises:
        TrackingError: there is no such model (the message lists the existing ones), or it does not take a budget_bias.
    """
    uri = registry or tracking_uri()
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise TrackingError(f"{file} does not exist, so no model is registered; run jobs.register or {_ADVICE}")
    mlflow.set_tracking_uri(uri)  # MLflow resolves models:/ addresses by this alone, for the whole process
    with explained(uri):
        client = connect(uri)
        problem = _unknown(client, model_uri)
        if problem:
            raise TrackingError(f"{problem} in {redacted(uri)}; {_ADVICE}")
        numbered = _numbered(client, model_uri)
        info = mlflow.models.get_model_info(numbered)
    params = info.signature.params if info.signature else None
    if budget_bias and pyfunc.BUDGET_PARAM not in {param.name for param in params or []}:
        raise TrackingError(
            f"{numbered} does not take {pyfunc.BUDGET_PARAM}; register its run again, or leave out --budget-bias"
        )
    return FoundModel(uri, numbered, info.model_uuid)


def load_registered(model: FoundModel) -> mlflow.pyfunc.PyFuncModel:
    """Load a model. Its `predict` takes a DataFrame whose column `image` contains the bytes of image files.

    Raises:
        TrackingError: the model is no longer available.
    """
    mlflow.set_tracking_uri(model.tracking_uri)
    with explained(model.tracking_uri), tempfile.TemporaryDirectory() as copy:
        # MLflow unquotes the path of a local model once too often, so a model whose path has a percent sign is copied.
        return mlflow.pyfunc.load_model(model.uri, dst_path=copy if "%" in model.tracking_uri else None)


def download_trained(model_uri: str, folder: Path, registry: str | None = None) -> Path:
    """Download the trained network (model.pt) of a registered version into `folder`.

    Args:
        model_uri, registry: as in `find_model`.

    Raises:
        TrackingError: there is no such version, jobs.register did not create it, or the server cannot be reached.
    """
    return download(find_model(model_uri, registry=registry), MODEL_FILE, folder)


def download(model: FoundModel, artifact: str, folder: Path) -> Path:
    """Download a file of a registered version into `folder`.

    Raises:
        TrackingError: jobs.register did not create the version, or the server cannot be reached.
    """
    with explained(model.tracking_uri):
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=f"{model.uri}/{artifact}", dst_path=str(folder)))


def open_model(model_uri: str, budget_bias: float = 0.0) -> mlflow.pyfunc.PyFuncModel:
    """Find a registered model and load it."""
    return load_registered(find_model(model_uri, budget_bias))


def _numbered(client: MlflowClient, model_uri: str) -> str:
    """Return the address with the version number in place of an alias or `latest`."""
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/latest)", model_uri)
    if not match:
        return model_uri
    name, alias = match.groups()
    number = client.get_model_version_by_alias(name, alias).version if alias else _numbers(client, name)[-1]
    return f"models:/{name}/{number}"


def _numbers(client: MlflowClient, name: str) -> list[int]:
    """Return the numbers of a model's versions in ascending order."""
    return sorted(int(found.version) for found in client.search_model_versions(f"name = '{name}'"))


def _unknown(client: MlflowClient, model_uri: str) -> str | None:
    """Return what does not exist in a models:/NAME@ALIAS or models:/NAME/VERSION address, and what exists instead."""
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
        return f"no model is named {name!r} (registered: {', '.join(known) or 'none'})"
    if alias and alias not in aliases:
        return f"the model {name!r} has no alias {alias!r} (it has: {', '.join(sorted(aliases)) or 'none'})"
    numbers = _numbers(client, name)
    if number and not (numbers if number == "latest" else number in map(str, numbers)):
        return f"the model {name!r} has no version {number!r} (it has: {', '.join(map(str, numbers)) or 'none'})"
    return None
