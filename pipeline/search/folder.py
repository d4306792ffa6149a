"""Where a search keeps everything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config
from pipeline.run_folder import RunFolder


@dataclass(frozen=True)
class SearchFolder:
    """The folder of one search, an absolute path."""

    path: Path

    @classmethod
    def of(cls, config: Config) -> SearchFolder:
        return cls(RunFolder.of(config).path / "search")

    @property
    def backbone(self) -> Path:
        """A model.pt with the backbone that the trials are for."""
        return self.path / "backbone.pt"

    @property
    def tables(self) -> Path:
        """The folder of logit tables."""
        return self.path / "tables"

    @property
    def fill(self) -> Path:
        """Ray Train's own files while the tables are computed; nothing is read from them again."""
        return self.path / "fill"

    @property
    def trials(self) -> Path:
        """Records and predictors of the trials."""
        return self.path / "trials"

    @property
    def finetuned(self) -> Path:
        """The folder of the finalists' joint runs."""
        return self.path / "finetuned"

    @property
    def tune(self) -> Path:
        """Ray Tune's own files; nothing is read from them again."""
        return self.path / "tune"

    @property
    def report(self) -> Path:
        """The folder of report.json, report.md and the figures."""
        return self.path / "report"

    @property
    def lock(self) -> Path:
        """Held by the driver that is at work on the search."""
        return self.path / ".driver.lock"
