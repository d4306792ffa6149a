"""Find the paths of a configuration that cannot work in a Ray job's package (`ray job submit --working-dir`).

Every node unpacks its own copy of the package and deletes it when the job ends. Files that match .gitignore or
.rayignore are not in the package.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from datasets.remote import HIDDEN, redacted
from pipeline.config.fields import REGISTERED, sqlite_path
from pipeline.config.schema import Config

UNPACKED_IN = "working_dir_files"
"""Ray's name for the folder that it unpacks packages in."""
NOT_IN_PACKAGE = (
    "is not in the package of this Ray job, which leaves out the files that .gitignore and .rayignore match. Remove "
    "the pattern from these files, or give an absolute path that exists on every node"
)


def job_package(folder: Path) -> Path | None:
    """Return the unpacked package that contains `folder`, or None."""
    return next((place for place in (folder, *folder.parents) if place.parent.name == UNPACKED_IN), None)


def package_problems(config: Config, package: Path, *, preparing: bool = False) -> Iterator[str]:
    """Yield every path that would be lost with the package or is missing from it, and every exposed password.

    Args:
        preparing: whether to check what jobs.prepare uses; otherwise check what training and later jobs use.
    """
    kept = [("data.folder", config.data.folder)]
    if not preparing:
        kept.append(("cluster.storage", config.cluster.storage))
    for key, path in kept:
        if _is_in(path, package):
            yield (
                f"{key} is {path}, in the package of this Ray job. Every node has its own copy, which is deleted when "
                f"the job ends. Give an absolute path outside it, such as {key}=/shared/{path.name}"
            )
    uri = os.environ.get("MLFLOW_TRACKING_URI") or config.tracking.uri
    store = sqlite_path(uri) if uri and not preparing else None
    if store and _is_in(store, package):
        yield (
            f"the MLflow store {uri} is in the package of this Ray job, which is deleted when the job ends. Set "
            "tracking.uri or MLFLOW_TRACKING_URI to http://HOST:PORT or sqlite:////ABSOLUTE/PATH"
        )
    for key, address in (("data.uri", config.data.uri), ("tracking.uri", config.tracking.uri)):
        if address and f":{HIDDEN}@" in redacted(address):
            yield (
                f"{key} {redacted(address)} contains a password. Everyone who can see the cluster's jobs can read it "
                "in the job's command or package. Leave it out and put credentials into the environment of the nodes"
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
    if (
        weights.suffix in (".pt", ".pth", ".bin", ".safetensors") or len(weights.parts) > 1
    ):  # otherwise a name of published weights
        yield "model.weights", weights
    for key, named in (("backbone", config.search.backbone), ("tables", config.search.tables)):
        if named and not str(named).startswith(REGISTERED):
            yield f"search.{key}", Path(named)
    for name, stage in config.stages.present():
        if stage.init_from:
            yield f"stages.{name}.init_from", stage.init_from


def _is_in(path: Path, package: Path) -> bool:
    return package in path.absolute().parents
