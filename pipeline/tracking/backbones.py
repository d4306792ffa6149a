"""The backbone of a registered model, for a search that starts from it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import mlflow

from pipeline.search.source import TrainedBackbone, load_backbone
from pipeline.tracking.inference import find_model
from pipeline.tracking.registry import MODEL_FILE
from pipeline.tracking.store import explained


def registered_backbone(model_uri: str) -> TrainedBackbone:
    """The backbone of a registered version, as it was trained: that of its model.pt.

    Args:
        model_uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        TrackingError: there is no such version, it was not put there by jobs.register, or the server cannot be reached.
    """
    found = find_model(model_uri)
    with tempfile.TemporaryDirectory() as folder:
        with explained(found.tracking_uri):
            file = mlflow.artifacts.download_artifacts(artifact_uri=f"{found.uri}/{MODEL_FILE}", dst_path=folder)
        return replace(load_backbone(Path(file)), origin=model_uri)
