"""Which parameters of a space decide accuracy and cost, with intervals over the trials."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna

from pipeline.evaluation.statistics import CONFIDENCE
from pipeline.search.records import Record
from pipeline.search.space import Range, Space

MIN_TRIALS = 10
RESAMPLES = 20
TARGETS = ("accuracy", "gflops")


def parameter_importance(records: Sequence[Record], space: Space, seed: int = 0) -> list[dict[str, Any]]:
    """Share of each parameter in the variance of accuracy and of cost, by fANOVA (Hutter et al., ICML 2014).

    Args:
        records: of one seed.

    Returns:
        For each parameter `parameter` and, for accuracy and gflops, `mean`, `low` and `high` over bootstrap resamples
        of the trials; the most important for accuracy first. Empty where there are fewer than MIN_TRIALS.
    """
    usable = [record for record in records if record.has_result and space.sampled(record.candidate) is not None]
    varied = [key for key, parameter in space.parameters.items() if _varies(parameter)]
    if len(usable) < MIN_TRIALS or not varied:
        return []
    generator = np.random.default_rng(seed)
    draws = [generator.integers(len(usable), size=len(usable)) for _ in range(RESAMPLES)]
    samples = [[_importance([usable[n] for n in draw], space, varied, target) for target in TARGETS] for draw in draws]
    low, high = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
    rows: list[dict[str, Any]] = []
    for key in varied:
        row: dict[str, Any] = {"parameter": key}
        for place, target in enumerate(TARGETS):
            values = np.array([sample[place][key] for sample in samples])
            ends = np.quantile(values, [low, high])
            row[target] = {"mean": float(values.mean()), "low": float(ends[0]), "high": float(ends[1])}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["accuracy"]["mean"])


def _varies(parameter: Any) -> bool:
    return parameter.low < parameter.high if isinstance(parameter, Range) else len(set(parameter.values)) > 1


def _importance(records: Sequence[Record], space: Space, varied: Sequence[str], target: str) -> dict[str, float]:
    every = space.distributions()
    distributions = {key: every[key] for key in varied}
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line for every study otherwise
    study = optuna.create_study()
    for record in records:
        sampled = space.sampled(record.candidate)
        assert sampled is not None
        params = {key: sampled[key] for key in varied}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=getattr(record, target)))
    if len({getattr(record, target) for record in records}) == 1:
        return dict.fromkeys(varied, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=8, max_depth=16, seed=0)
        return optuna.importance.get_param_importances(study, evaluator=evaluator, params=list(varied))
