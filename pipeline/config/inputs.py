"""Identify a run's inputs by content, so that data and files may move between two attempts."""

from __future__ import annotations

import json
from pathlib import Path

from datasets.beton import file_sha256
from datasets.files import write_whole
from pipeline.config.load import value_differences
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import Config


def run_inputs(config: Config, data_digest: str) -> dict[str, str]:
    """Return the digest of the prepared data and of every file that the run starts from.

    Args:
        data_digest: digest of the manifest in data.folder.
    """
    found = {"prepared data": data_digest}
    if config.model.weights:
        file = Path(config.model.weights)
        found["model.weights"] = file_sha256(file) if file.is_file() else config.model.weights
    for name, stage in config.stages.present():
        if stage.init_from:
            found[f"stages.{name}.init_from"] = file_sha256(stage.init_from)
    return found


def refuse_other_inputs(folder: RunFolder, inputs: dict[str, str]) -> None:
    """Raise ValueError if the run in `folder` started from other data or files."""
    if not folder.inputs.exists():
        return
    if changed := value_differences(json.loads(folder.inputs.read_text()), inputs):
        listing = "\n".join(f"  - {line}" for line in changed)
        raise ValueError(
            f"the run {folder.path.name} started from other data or files:\n{listing}\n"
            f"Restore them, choose another name (name=...), or remove {folder.path}."
        )


def keep_inputs(folder: RunFolder, inputs: dict[str, str]) -> None:
    """Write the inputs to the run's folder at its first start."""
    if not folder.inputs.exists():
        write_whole(folder.inputs, json.dumps(inputs, indent=1))
