"""What the rows of the fault matrix share: data, and a run that nobody disturbs."""

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
    """Prepared data, so that the two ranks' parts of a batch differ, and an MLflow store."""
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
