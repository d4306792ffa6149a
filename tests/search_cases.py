"""A configuration, candidates, and records without training, for the tests of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.load import parse_config
from pipeline.config.schema import Config
from pipeline.search.records import Record, choice_letters
from pipeline.search.space import Candidate, paper_candidates
from tests.small import tree_of

BACKBONE_GFLOPS = (0.004, 0.001)
SPACE = {
    "blocks": [[0], [1], [1, 1]],
    "kernel": [3, 5],
    "stem_stride": [2, 4],
    "input_size": [16, 24],
    "width": [0.125, 0.25],
}
STAGE = {"epochs": 2, "alpha_gflops": 0.0012, "eta": 1.0, "lr": 0.05}


def config_of(folder: Path, **search: Any) -> Config:
    """Return a search for small predictors of a backbone at 48 and 32 px."""
    return parse_config(
        tree_of(
            folder,
            model={"predictor": {"input_size": 24, "width": 0.125, "dropout": 0.0}},
            training={"batch_size": 20},
            stages={"predictor": STAGE, "joint": STAGE | {"epochs": 1, "lr": 0.001}},
            search={"space": SPACE, "num_trials": 3, "seeds": 2, "finalists": 1, "finetuned": 1, **search},
            cluster={"num_workers": 1, "cpus_per_worker": 1, "storage": str(folder / "runs")},
            tracking={"uri": f"sqlite:///{folder / 'mlflow.db'}", "system_metrics": False},
        )
    )


def candidate_of(**changed: Any) -> Candidate:
    """Return the paper's third predictor with changes."""
    return Candidate.parse({**paper_candidates(config_of(Path()))[3].described(), **changed})


def correct_of(num_images: int = 200) -> np.ndarray:
    """Return whether two resolutions are correct, bool (N, 2): for 90 % and 70 % of the images."""
    generator = np.random.default_rng(0)
    return np.stack([generator.random(num_images) < 0.9, generator.random(num_images) < 0.7], axis=1)


def record_of(candidate: Candidate, share: float = 0.5, seed: int = 0, **changed: Any) -> Record:
    """Return a record that sends a share of 200 images to the first resolution."""
    correct_NR, generator = correct_of(), np.random.default_rng([seed, round(1000 * share)])
    chosen_N = (generator.random(len(correct_NR)) >= share).astype(np.int64)
    shares = tuple((np.bincount(chosen_N, minlength=2) / len(chosen_N)).tolist())
    values: dict[str, Any] = {
        "accuracy": float(correct_NR[np.arange(len(chosen_N)), chosen_N].mean()),
        "gflops": float(np.dot(shares, BACKBONE_GFLOPS)) + 0.0001,
        "predictor_gflops": 0.0001,
        "shares": shares,
        "choices": choice_letters(chosen_N),
        "seconds": 3.0,
        "epochs": 2,
    }
    return Record("context", candidate, seed, **{"outcome": "finished", **values, **changed})
