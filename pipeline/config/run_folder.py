"""Where a run keeps everything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.schema import Config


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, an absolute path. Ray Train keeps its files in it too."""

    path: Path

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        return cls(Path(config.cluster.storage).absolute() / config.name)

    @property
    def config(self) -> Path:
        """The configuration that the run began with."""
        return self.path / "config.yaml"

    @property
    def model(self) -> Path:
        """The trained model."""
        return self.path / "model.pt"

    @property
    def backbone(self) -> Path:
        """The model as it was after the backbone stage."""
        return self.path / "backbone.pt"

    @property
    def before_joint(self) -> Path:
        """The model as it was before the joint stage."""
        return self.path / "before-joint.pt"

    @property
    def tables(self) -> Path:
        """The folder of logit tables; whoever needs one that is gone computes it anew."""
        return self.path / "tables"

    @property
    def latency(self) -> Path:
        """Measured milliseconds, where they are the run's cost: measured once, so that a resume has the same."""
        return self.path / "latency.json"

    @property
    def predictions(self) -> Path:
        """All logits of the trained model for the validation images."""
        return self.path / "predictions.npz"

    @property
    def predictions_before_joint(self) -> Path:
        """The same of the model from before the joint stage, where there is such a stage."""
        return self.path / "predictions-before-joint.npz"

    @property
    def predictions_after_joint(self) -> Path:
        """The same of the model from after it."""
        return self.path / "predictions-after-joint.npz"

    @property
    def report(self) -> Path:
        """The folder of report.json, report.md, report.html and the figures."""
        return self.path / "report"

    @property
    def report_json(self) -> Path:
        return self.report / "report.json"

    @property
    def finished(self) -> Path:
        """There once everything else is."""
        return self.path / "finished.json"

    @property
    def stop(self) -> Path:
        """Empty until the driver is asked to stop (pipeline/cluster/stopping.py)."""
        return self.path / ".stop"

    @property
    def driver_lock(self) -> Path:
        """Held by the driver that is at work on the run."""
        return self.path / ".driver.lock"
