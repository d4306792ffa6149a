"""Where a search keeps everything: its folder, and one file for each finished trial."""

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


logger = logging.getLogger(__name__)

FORMAT = 1
FIRST_LETTER = "a"
Outcome = Literal["finished", "collapsed", "stopped", "diverged", "failed"]


@dataclass(frozen=True)
class Record:
    """One trial: what was tried, and what came of it.

    Attributes:
        context: digest of all that the trials of a search share; trials of different contexts cannot be compared.
        seed: of weights, order and noise.
        outcome: finished; collapsed (finished, but everything goes to one resolution); stopped (by ASHA); diverged;
            failed (an error or a process that died, which the next sitting tries again).
        reason: of any outcome but finished, in words.
        accuracy: routed top-1 on the validation images, a fraction of 1; None where there is none, as the next ones.
        gflops: mean cost, predictor included, GFLOPs.
        predictor_gflops: of it the predictor's.
        shares: of the images at each resolution.
        choices: a letter an image of the validation beton, `a` for the first resolution; empty where it did not finish.
        seconds: that the trial took.
        images_per_second: of its training.
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
        """Names the trial's files."""
        return trial_key(self.context, self.candidate, self.seed)

    @property
    def has_result(self) -> bool:
        """Whether it was trained to the end."""
        return self.outcome in ("finished", "collapsed")

    @property
    def chosen_N(self) -> np.ndarray:
        """The resolution of each image, int64."""
        return (np.frombuffer(self.choices.encode(), np.uint8) - ord(FIRST_LETTER)).astype(np.int64)


def choice_letters(chosen_N: np.ndarray) -> str:
    """`Record.choices` of chosen resolutions."""
    return (chosen_N + ord(FIRST_LETTER)).astype(np.uint8).tobytes().decode()


def trial_key(context: str, candidate: Candidate, seed: int) -> str:
    """16 hexadecimal digits that name a trial."""
    return hashlib.sha256(canonical([context, candidate.described(), seed]).encode()).hexdigest()[:16]


class Records:
    """The folder of trials: KEY.json, and KEY.pt with the predictor's weights.

    Every trial writes files of its own, so processes and machines need no lock.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, context: str) -> list[Record]:
        """The trials of a context in the order of their keys."""
        found = (self._load(path) for path in sorted(self.folder.glob("*.json")))
        return [record for record in found if record is not None and record.context == context]

    def find(self, context: str, candidate: Candidate, seed: int) -> Record | None:
        """A trial that is there already."""
        path = self._path(trial_key(context, candidate, seed))
        return self._load(path) if path.exists() else None

    def write(self, record: Record, predictor: Mapping[str, Tensor] | None = None) -> None:
        """Keep a trial, the weights first: a record that is there has its weights."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if predictor is not None:
            with whole_file(self.weights(record)) as file:
                torch.save(dict(predictor), file)
        tree = {"format": FORMAT, **asdict(record), "candidate": record.candidate.described()}
        write_whole(self._path(record.key), json.dumps(tree))

    def weights(self, record: Record) -> Path:
        """The file of a trial's predictor."""
        return self.folder / f"{record.key}.pt"

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    @staticmethod
    def _load(path: Path) -> Record | None:
        try:
            tree = json.loads(path.read_text())
            if tree.pop("format") != FORMAT:
                raise ValueError("it is of another version")
            candidate, shares = Candidate.parse(tree.pop("candidate")), tuple(tree.pop("shares"))
            return Record(candidate=candidate, shares=shares, **tree)
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is no record of a trial and is left out: %s", path, error)
            return None


def by_candidate(records: Iterable[Record]) -> dict[Candidate, list[Record]]:
    """Records of each candidate, by seed."""
    found: dict[Candidate, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.seed):
        found.setdefault(record.candidate, []).append(record)
    return found


def context_digest(parts: Mapping[str, Any]) -> str:
    """`Record.context` of what trials share."""
    return hashlib.sha256(canonical(parts).encode()).hexdigest()[:16]
