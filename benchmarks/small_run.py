"""A small training run on generated letters for the cluster benches, and a token for their clusters."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from datasets.prepare.prepare import prepare
from datasets.sources.glyphs import GlyphSettings
from pipeline.config.load import parse_config
from pipeline.config.schema import Config


def prepare_letters(folder: Path, num_train: int) -> Path:
    """Prepare generated letters in `folder`."""
    glyphs = GlyphSettings(num_train=num_train, num_validation=64, image_size=128)
    prepare("glyphs", folder, glyphs=glyphs, num_processes=1, show_progress=False)
    return folder


def small_config(data: Path, storage: Path, name: str, epochs: int, **training: Any) -> Config:
    """Return a configuration with two workers of one CPU and only the backbone stage.

    A step takes long compared with its communication.
    """
    return parse_config(
        {
            "name": name,
            "data": {"dataset": "glyphs", "folder": str(data)},
            "model": {
                "backbone": "small_resnet",
                "resolutions": [96, 48],
                "predictor": {"input_size": 32, "width": 0.25},
            },
            "training": {"batch_size": 64, "evaluate_epochs": epochs, **training},
            "stages": {"backbone": {"epochs": epochs, "lr": 0.02}},
            "cluster": {"num_workers": 2, "cpus_per_worker": 1, "use_gpu": False, "storage": str(storage)},
            "tracking": {"uri": f"sqlite:///{storage / 'mlflow.db'}", "system_metrics": False},
        }
    )


def use_token() -> None:
    """Make the clusters of this process require a secret token."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
