"""What is amiss with a configuration in a Ray job's package: the folder that `ray job submit --working-dir` sends.

Every node unpacks its own copy and deletes it when the job ends. What .gitignore and .rayignore name is not in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from datasets.remote import HIDDEN, redacted
from pipeline.config.schema import REGISTERED, Config
from pipeline.config.sqlite import sqlite_path

UNPACKED_IN = "working_dir_files"
"""Ray's name of the folder that packages are unpacked in"""
NOT_IN_PACKAGE = (
    "is not in the package of this Ray job. What .gitignore and .rayignore name is not sent: take it out of them, or "
    "give an absolute path that every node has"
)


def job_package(folder: Path) -> Path | None:
    """The unpacked package that a folder lies in, or None."""
    return next((place for place in (folder, *folder.parents) if place.parent.name == UNPACKED_IN), None)


def package_problems(config: Config, package: Path, *, preparing: bool = False) -> Iterator[str]:
    """Every path of a configuration that would be lost with the package or is not in it, and passwords that would show.

    Args:
        preparing: what a preparation uses is looked at; otherwise what training and all after it use.
    """
    kept = [("data.folder", config.data.folder)]
    if not preparing:
        kept.append(("cluster.storage", Path(config.cluster.storage)))
    for key, path in kept:
        if _is_in(path, package):
            yield (
                f"{key} is {path}, in the package of this Ray job: every node has its own copy of that, and it is "
                f"deleted with the job; give an absolute path outside it, such as {key}=/shared/{path.name}"
            )
    uri = os.environ.get("MLFLOW_TRACKING_URI") or config.tracking.uri
    store = sqlite_path(uri) if uri and not preparing else None
    if store and _is_in(store, package):
        yield (
            f"the MLflow store {uri} lies in the package of this Ray job, and is deleted with it; set tracking.uri or "
            "MLFLOW_TRACKING_URI to http://HOST:PORT or sqlite:////ABSOLUTE/PATH"
        )
    for key, address in (("data.uri", config.data.uri), ("tracking.uri", config.tracking.uri)):
        if address and f":{HIDDEN}@" in redacted(address):
            yield (
                f"{key} {redacted(address)} holds a password, which whoever may look at the cluster's jobs can read in "
                "the job's command or package; leave it out, and put credentials into the environment of the nodes"
            )
    for key, path in _sources(config) if preparing else _starts(config):
        if _is_in(path, package) and not path.exists():
            yield f"{key} {path} {NOT_IN_PACKAGE}"


def _sources(config: Config) -> Iterator[tuple[str, Path]]:
    for key in ("source", "validation_source"):
        if path := getattr(config.data, key):
            yield f"data.{key}", path


def _starts(config: Config) -> Iterator[tuple[str, Path]]:
    weights = Path(config.model.weights or "")
    if weights.suffix in (".pt", ".pth", ".bin") or len(weights.parts) > 1:  # else the name of published weights
        yield "model.weights", weights
    for key, named in (("backbone", config.search.backbone), ("tables", config.search.tables)):
        if named and not str(named).startswith(REGISTERED):
            yield f"search.{key}", Path(named)
    for name, stage in config.stages.present():
        if stage.init_from:
            yield f"stages.{name}.init_from", stage.init_from


def _is_in(path: Path, package: Path) -> bool:
    return package in path.absolute().parents
