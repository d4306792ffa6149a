"""The files of a search, and one record for each finished trial."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datasets.files import whole_file, write_whole
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import Config
from pipeline.search.space import Candidate, canonical

logger = logging.getLogger(__name__)
FORMAT = 1
FIRST_LETTER = "a"
Outcome = Literal["finished", "collapsed", "stopped", "diverged", "failed"]


@dataclass(frozen=True)
class SearchFolder:
    """The folder of one search, as an absolute path."""

    path: Path

    @classmethod
    def of(cls, config: Config) -> SearchFolder:
        """Return the folder of a configuration's search."""
        return cls(RunFolder.of(config).path / "search")

    @property
    def backbone(self) -> Path:
        """A model.pt with the backbone that all trials share."""
        return self.path / "backbone.pt"

    @property
    def tables(self) -> Path:
        """The folder of logit tables."""
        return self.path / "tables"

    @property
    def fill(self) -> Path:
        """The folder of Ray Train's own files while the tables are computed. They are not read again."""
        return self.path / "fill"

    @property
    def trials(self) -> Path:
        """The folder with the records and predictors of the trials."""
        return self.path / "trials"

    @property
    def finetuned(self) -> Path:
        """The folder of the finalists' joint runs."""
        return self.path / "finetuned"

    @property
    def tune(self) -> Path:
        """The folder of Ray Tune's own files. They are not read again."""
        return self.path / "tune"

    @property
    def report(self) -> Path:
        """The folder of report.json, report.md and the figures."""
        return self.path / "report"

    @property
    def lock(self) -> Path:
        """The lock that the driver of the search holds."""
        return self.path / ".driver.lock"


@dataclass(frozen=True)
class Record:
    """One trial: its candidate, its seed, and its result.

    Attributes:
        context: digest of everything that the trials of a search share; only trials of one context are comparable.
        seed: seed of weights, order and noise.
        outcome: finished; collapsed (finished, but every image goes to one resolution); stopped (by ASHA); diverged; or
            failed (by an error or the death of its process; a restart tries it again).
        reason: why the outcome is not `finished`.
        accuracy: routed top-1 on the validation images, as a fraction of 1; None without a result.
        gflops: mean cost in GFLOPs, including the predictor; None without a result.
        predictor_gflops: the predictor's part of `gflops`.
        shares: share of the images at each resolution.
        choices: one letter for each image of the validation beton, `a` for the first resolution; empty if unfinished.
        seconds: duration of the trial.
        images_per_second: training speed.
        epochs: number of epochs that were trained.
    """

    context: str
    candidate: Candidate
    seed: int
    outcome: Outcome
    reason: str | None = None
    accuracy: float | None = None
    gflops: float | None = None
    predictor_gflops: float | None = None
    shares: tuple[float, ...] = ()
    choices: str = ""
    seconds: float = 0.0
    images_per_second: float = 0.0
    epochs: int = 0

    @property
    def key(self) -> str:
        """The name of the trial's files."""
        return trial_key(self.context, self.candidate, self.seed)

    @property
    def has_result(self) -> bool:
        """Whether the trial was trained to its last epoch."""
        return self.outcome in ("finished", "collapsed")

    @property
    def chosen_N(self) -> np.ndarray:
        """The index of the resolution of each image, int64."""
        return (np.frombuffer(self.choices.encode(), np.uint8) - ord(FIRST_LETTER)).astype(np.int64)


class Records:
    """The folder of trials: KEY.json with the record, and KEY.pt with the predictor's weights.

    No two trials write the same file, so processes and machines need no lock.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, context: str) -> list[Record]:
        """Read the trials of a context, in the order of their keys."""
        found = (self._load(path) for path in sorted(self.folder.glob("*.json")))
        return [record for record in found if record is not None and record.context == context]

    def find(self, context: str, candidate: Candidate, seed: int) -> Record | None:
        """Read the record of one trial, or return None if there is none."""
        path = self._path(trial_key(context, candidate, seed))
        return self._load(path) if path.exists() else None

    def write(self, record: Record, predictor: Mapping[str, Tensor] | None = None) -> None:
        """Write a trial. Weights are written before the record, so a finished trial's record never lacks them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if predictor is not None:
            with whole_file(self.weights(record)) as file:
                torch.save(dict(predictor), file)
        tree = {"format": FORMAT, **asdict(record), "candidate": record.candidate.described()}
        write_whole(self._path(record.key), json.dumps(tree))

    def remove(self, context: str, candidate: Candidate, seed: int) -> None:
        """Remove the record of one trial, if there is one."""
        self._path(trial_key(context, candidate, seed)).unlink(missing_ok=True)

    def weights(self, record: Record) -> Path:
        """Return the path of a trial's predictor."""
        return self.folder / f"{record.key}.pt"

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    @staticmethod
    def _load(path: Path) -> Record | None:
        try:
            tree = json.loads(path.read_text())
            if tree.pop("format") != FORMAT:
                raise ValueError("it has another format")
            candidate, shares = Candidate.parse(tree.pop("candidate")), tuple(tree.pop("shares"))
            return Record(candidate=candidate, shares=shares, **tree)
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is not a record of a trial and is skipped: %s", path, error)
            return None


def by_candidate(records: Iterable[Record]) -> dict[Candidate, list[Record]]:
    """Group records by candidate, in the order of their seeds."""
    found: dict[Candidate, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.seed):
        found.setdefault(record.candidate, []).append(record)
    return found


def choice_letters(chosen_N: np.ndarray) -> str:
    """Encode chosen resolutions as `Record.choices`."""
    return (chosen_N + ord(FIRST_LETTER)).astype(np.uint8).tobytes().decode()


def trial_key(context: str, candidate: Candidate, seed: int) -> str:
    """Return the name of a trial: 16 hexadecimal digits."""
    return hashlib.sha256(canonical([context, candidate.described(), seed]).encode()).hexdigest()[:16]


def context_digest(parts: Mapping[str, Any]) -> str:
    """Return the digest of what trials share, for `Record.context`."""
    return hashlib.sha256(canonical(parts).encode()).hexdigest()[:16]
