"""Describe the one MLflow run that belongs to a run folder, and find or create it on a server."""

from __future__ import annotations

import json
import subprocess
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

from datasets.files import flattened, valid_text, write_whole
from datasets.remote import redacted
from pipeline.config.schema import Config
from pipeline.tracking.store import PROJECT_FOLDER, TrackingError, experiment_id, now_ms

if TYPE_CHECKING:
    from datasets.beton import Manifest

DESCRIPTION_FILE = "tracking.json"
KEY_TAG, STAGE_TAG, DESCRIBED_TAG = "drnet.run_key", "drnet.stage", "drnet.described"
PARENT_TAG, COMMIT_TAG, DIRTY_TAG = "mlflow.parentRunId", "mlflow.source.git.commit", "drnet.git_dirty"
_PAGE = 1000
"""The number of runs that one request returns."""


@dataclass(frozen=True)
class Description:
    """The content of an MLflow run. It is stored in the run's folder, because the server may be down at the start."""

    key: str
    """The key that identifies the run on every server and across restarts."""
    started_ms: int
    name: str
    experiment: str
    tags: dict[str, str]
    params: dict[str, str]
    dataset: dict[str, str]
    config: str
    """The configuration as YAML."""

    @classmethod
    def load(cls, folder: Path) -> Description:
        """Read the description in a run's folder. Raise ValueError if the folder belongs to no tracked run."""
        path = folder / DESCRIPTION_FILE
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist; train the run first (python -m jobs.train)") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, and the next start writes a new one") from None

    def save(self, folder: Path) -> None:
        """Write the description to the run's folder, atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / DESCRIPTION_FILE, json.dumps(asdict(self), indent=1))


def describe_run(config: Config, folder: Path, manifest: Manifest) -> Description:
    """Write the run's current description to tracking.json. Its key and first start time stay the same."""
    before = Description.load(folder) if (folder / DESCRIPTION_FILE).exists() else None
    tree = config.model_dump(mode="json")
    description = Description(
        key=before.key if before else uuid.uuid4().hex,
        started_ms=before.started_ms if before else now_ms(),
        name=config.name,
        experiment=config.tracking.experiment,
        tags={"drnet.run_folder": param_text(folder), **git_tags(PROJECT_FOLDER)},
        params={key: param_text(value) for key, value in flattened(tree)},
        dataset=_dataset(config, manifest),
        config=yaml.safe_dump(tree, sort_keys=False),
    )
    description.save(folder)
    return description


def find_or_create_run(client: MlflowClient, uri: str, description: Description) -> str:
    """Return the run's id. Create the run if it does not exist, and complete one that was only partly described.

    Raises:
        TrackingError: the experiment was deleted.
        MlflowException: the server cannot be reached, or refuses the request.
    """
    experiment = experiment_id(client, uri, description.experiment)
    tagged = f"tags.`{KEY_TAG}` = '{description.key}'"
    run = _one_run(client, experiment, tagged)
    if run is None:
        tags = {KEY_TAG: description.key, **description.tags}
        client.create_run(experiment, description.started_ms, tags, description.name)
        run = _one_run(client, experiment, tagged)
        assert run is not None
    run_id = run.info.run_id
    if DESCRIBED_TAG not in run.data.tags:
        params = [Param(key, value) for key, value in description.params.items()]
        for start in range(0, len(params), MAX_PARAMS_TAGS_PER_BATCH):
            client.log_batch(run_id, params=params[start : start + MAX_PARAMS_TAGS_PER_BATCH])
        context = InputTag("mlflow.data.context", "training")
        client.log_inputs(run_id, [DatasetInput(Dataset(**description.dataset), [context])])
        client.log_text(run_id, description.config, "config.yaml")
        client.set_tag(run_id, DESCRIBED_TAG, "true")
    else:
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in description.tags.items()])
    return run_id


def find_run(client: MlflowClient, uri: str, description: Description) -> str:
    """Return the id of the run if it is fully described. (`find_or_create_run` could delete any other as a duplicate.)

    Raises:
        TrackingError: the run does not exist yet, or the experiment was deleted.
        MlflowException: the server cannot be reached, or refuses the request.
    """
    experiment = experiment_id(client, uri, description.experiment)
    described = f"tags.`{KEY_TAG}` = '{description.key}' and tags.`{DESCRIBED_TAG}` = 'true'"
    run = _one_run(client, experiment, described)
    if run is None:
        raise TrackingError(f"the run {description.name} does not exist in {redacted(uri)} yet")
    return run.info.run_id


def _one_run(client: MlflowClient, experiment: str, condition: str) -> Any:
    """Return the run that a condition selects, or None. If there are several, delete all but one.

    If the response to a creation is lost, MLflow's client retries and creates a second run. A fully described run is
    kept, because other processes may already write to it.
    """
    found = sorted(
        client.search_runs([experiment], condition),
        key=lambda run: (DESCRIBED_TAG not in run.data.tags, run.info.start_time, run.info.run_id),
    )
    for other in found[1:]:
        client.delete_run(other.info.run_id)
    return found[0] if found else None


def find_or_create_stage(client: MlflowClient, run_id: str, stage: str, started_ms: int) -> str:
    """Return the id of a stage's child run and set it to RUNNING. End the run's other children.

    Raises:
        MlflowException: the server cannot be reached, or refuses the request.
    """
    parent = client.get_run(run_id)
    stage_id = None
    for child in children(client, run_id):
        if child.data.tags.get(STAGE_TAG) == stage:
            stage_id = child.info.run_id
            if child.info.status != "RUNNING":
                client.update_run(stage_id, status="RUNNING")
        elif child.info.status == "RUNNING":
            client.set_terminated(child.info.run_id, "FINISHED", started_ms)
    if stage_id is None:
        tags = {PARENT_TAG: run_id, STAGE_TAG: stage}
        name, experiment = f"{parent.info.run_name} {stage}", parent.info.experiment_id
        client.create_run(experiment, started_ms, tags, name)
        run = _one_run(client, experiment, f"tags.`{PARENT_TAG}` = '{run_id}' and tags.`{STAGE_TAG}` = '{stage}'")
        stage_id = run.info.run_id
    return stage_id


def children(client: MlflowClient, run_id: str) -> list[Any]:
    """Return the child runs, one for each stage."""
    experiment = client.get_run(run_id).info.experiment_id
    found, token = [], None
    while True:
        page = client.search_runs(
            [experiment], f"tags.`{PARENT_TAG}` = '{run_id}'", max_results=_PAGE, page_token=token
        )
        found += page
        if not (token := page.token):
            return found


def git_tags(folder: Path) -> dict[str, str]:
    """Return the source's commit and whether there are uncommitted changes; empty outside a git repository or without
    git."""
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20
            ).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {COMMIT_TAG: commit, DIRTY_TAG: str(bool(status)).lower()}


def _dataset(config: Config, manifest: Manifest) -> dict[str, str]:
    """Return the manifest as the fields of an MLflow dataset."""
    profile = {
        "classes": len(manifest.classes),
        "images": {name: split.count for name, split in manifest.splits.items()},
        "sha256": {name: split.sha256 for name, split in manifest.splits.items()},
        "source_digest": manifest.source_digest,
        "skipped": len(manifest.skipped),
    }
    return {
        "name": manifest.dataset,
        "digest": manifest.digest,
        "source_type": "local",
        "source": json.dumps({"uri": str(config.data.folder.resolve())}),
        "profile": json.dumps(profile),
    }


def param_text(value: Any) -> str:
    """Return a value as text, cut to the length that MLflow accepts. Bytes of names that are not UTF-8 are escaped."""
    text = valid_text(str(value))
    return text if len(text) <= MAX_PARAM_VAL_LENGTH else text[: MAX_PARAM_VAL_LENGTH - 1] + "…"
