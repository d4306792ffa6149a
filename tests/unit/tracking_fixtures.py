"""What the tests of pipeline/tracking share: a store of their own, a configuration, a manifest."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from datasets.beton import TRAIN, VALIDATION, Manifest, Split
from pipeline.config import Config, parse_config


@pytest.fixture
def store(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of a fresh SQLite store, also in MLFLOW_TRACKING_URI; the file is made once a session and copied."""
    template = tmp_path_factory.getbasetemp() / "mlflow-template.db"
    if not template.exists():
        MlflowClient(f"sqlite:///{template}").search_experiments()
    shutil.copy(template, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def make_config(tmp_path: Path, **sections: dict) -> Config:
    """A small configuration with all three stages; `sections` are laid over it."""
    tree = {
        "name": "small",
        "data": {"dataset": "glyphs", "folder": str(tmp_path / "data")},
        "model": {
            "backbone": "small_resnet",
            "backbone_width": 0.25,
            "resolutions": [48, 32],
            "predictor": {"input_size": 32, "width": 0.125},
        },
        "stages": {
            "backbone": {"epochs": 2},
            "predictor": {"epochs": 1, "alpha_gflops": 0.01},
            "joint": {"epochs": 1, "alpha_gflops": 0.01},
        },
    }
    return parse_config({key: tree.get(key, {}) | value for key, value in sections.items()} | _rest(tree, sections))


def _rest(tree: dict, sections: dict) -> dict:
    return {key: value for key, value in tree.items() if key not in sections}


def make_manifest() -> Manifest:
    splits = {
        name: Split(
            file=f"{name}.beton", count=count, class_counts=[count], size_bytes=1, sha256=name[0] * 64, attributes={}
        )
        for name, count in ((TRAIN, 90), (VALIDATION, 10))
    }
    return Manifest(
        format=1,
        dataset="glyphs",
        classes=["a", "b"],
        settings={},
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        source_digest="d" * 32,
        skipped=[],
        versions={},
        splits=splits,
    )
