"""Fixtures of the fault matrix: data, and an uninterrupted run to compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from datasets.prepare.prepare import prepare
from datasets.sources.glyphs import GlyphSettings
from pipeline.cluster.driver import train_run
from pipeline.config.schema import Config
from tests.chaos.runs import NUM_TRAIN, config_of
from tests.unit.tracking_fixtures import fresh_store


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare data and an MLflow store; the number of images gives the two ranks unequal parts of a batch."""
    folder = tmp_path_factory.mktemp("chaos")
    glyphs = GlyphSettings(num_train=NUM_TRAIN, num_validation=50, image_size=64)
    prepare("glyphs", folder / "data", glyphs=glyphs, num_processes=1, show_progress=False)
    fresh_store(folder, tmp_path_factory)
    return folder


@pytest.fixture(scope="session")
def undisturbed(folder: Path, ray_cluster: str) -> Config:
    config = config_of(folder, "undisturbed")
    train_run(config)
    return config
