"""The names of the files in a run's folder, and the run's inputs, which one of these files lists.

Inputs are identified by content, so that data and files may move between two attempts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from datasets.beton import file_sha256
from datasets.files import value_differences, write_whole
from pipeline.config.load import refuse_changes
from pipeline.config.schema import Config


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, as an absolute path. Ray Train stores its files there too."""

    path: Path

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        """Return the folder of a configuration's run."""
        return cls(config.cluster.storage.absolute() / config.name)

    @property
    def config(self) -> Path:
        """The configuration of the run's latest start. Only the fields in FREE_TO_CHANGE can differ from the first."""
        return self.path / "config.yaml"

    @property
    def inputs(self) -> Path:
        """The digests of the data and files that the run started from, as `run_inputs` returns them."""
        return self.path / "inputs.json"

    @property
    def model(self) -> Path:
        """The trained model."""
        return self.path / "model.pt"

    @property
    def backbone(self) -> Path:
        """The model after the backbone stage."""
        return self.path / "backbone.pt"

    @property
    def before_joint(self) -> Path:
        """The model before the joint stage."""
        return self.path / "before-joint.pt"

    @property
    def tables(self) -> Path:
        """The folder of logit tables. A missing table is computed again."""
        return self.path / "tables"

    @property
    def latency(self) -> Path:
        """The milliseconds of a run with cost=milliseconds, measured once so that a resumed run has the same."""
        return self.path / "latency.json"

    @property
    def precision(self) -> Path:
        """The choice of a run with training.precision=auto, made once so that a resumed run computes the same."""
        return self.path / "precision.json"

    @property
    def predictions(self) -> Path:
        """The logits of all validation images."""
        return self.path / "predictions.npz"

    @property
    def predictions_before_joint(self) -> Path:
        """The logits of the model before the joint stage, if there is one."""
        return self.path / "predictions-before-joint.npz"

    @property
    def predictions_after_joint(self) -> Path:
        """The logits of the model after the joint stage."""
        return self.path / "predictions-after-joint.npz"

    @property
    def report(self) -> Path:
        """The folder of report.json, report.md, report.html and the figures."""
        return self.path / "report"

    @property
    def report_json(self) -> Path:
        """The report's data."""
        return self.report / "report.json"

    @property
    def finished(self) -> Path:
        """A file that exists once the run has finished."""
        return self.path / "finished.json"

    @property
    def stop(self) -> Path:
        """A file that is empty until a stop is requested (pipeline/cluster/signals.py)."""
        return self.path / ".stop"

    @property
    def driver_lock(self) -> Path:
        """The lock of the driver that is working on the run."""
        return self.path / ".driver.lock"


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
    refuse_changes(
        value_differences(json.loads(folder.inputs.read_text()), inputs),
        f"the run {folder.path.name} started from other data or files",
        f"Restore them, choose another name (name=...), or remove {folder.path}.",
    )


def keep_inputs(folder: RunFolder, inputs: dict[str, str]) -> None:
    """Write the inputs to the run's folder at its first start."""
    if not folder.inputs.exists():
        write_whole(folder.inputs, json.dumps(inputs, indent=1))
