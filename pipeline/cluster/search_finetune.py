"""After the trials: the best finalists are trained on with their backbone, and one is chosen and registered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.cluster.launch import train_run
from pipeline.cluster.trials import SearchSettings
from pipeline.config import Config, StagesConfig
from pipeline.models.drnet import DRNet, build_configured
from pipeline.run_folder import RunFolder
from pipeline.search.front import Summary, budget_alias, choose, spread
from pipeline.search.report import Finetuned
from pipeline.search.space import Candidate
from pipeline.tracking.registry import RegisteredModel, register_model
from pipeline.tracking.store import tracking_uri
from pipeline.training.checkpoint import load_model, save_model


def finetune(
    settings: SearchSettings, summaries: Mapping[Candidate, Summary], correct_NR: np.ndarray
) -> list[Finetuned]:
    """Train the best finalists on with their backbone, each as a run of its own, cheapest first."""
    search = settings.config.search
    finalists = [summary for summary in summaries.values() if summary.num_seeds == search.seeds and is_sound(summary)]
    wanted = spread(finalists, lambda summary: summary.point, search.finetuned)
    lowest = _lowest_accuracy(settings.config, correct_NR)
    named = choose(finalists, lambda summary: summary.point, budget_gflops=search.budget_gflops, lowest_accuracy=lowest)
    has_budget = search.budget_gflops is not None or lowest is not None
    if named is not None and has_budget and wanted and named not in wanted:
        wanted[0] = named
    return [_finetune_one(settings, summary) for summary in wanted]


def _finetune_one(settings: SearchSettings, summary: Summary) -> Finetuned:
    config, folder = settings.config, settings.folder
    record = summary.records[0]
    joint = config.stages.joint
    assert joint is not None
    start = folder.finetuned / f"{record.key}.start.pt"
    recipe = {key: value for key, value in record.candidate.recipe().items() if key != "lr"}
    run_config = config.model_copy(
        update={
            "name": f"{config.name}-{record.key[:8]}",
            "model": record.candidate.model(config.model),
            "stages": StagesConfig(joint=joint.model_copy(update={**recipe, "init_from": start})),
            "cluster": config.cluster.model_copy(update={"storage": str(folder.finetuned)}),
            # The search's own store, which may be a file in its storage.
            "tracking": config.tracking.model_copy(update={"uri": tracking_uri(config)}),
        }
    )
    if not start.exists():
        folder.finetuned.mkdir(exist_ok=True)
        _save_start(start, settings, run_config, settings.records.weights(record))
    print(f"finetuning {record.candidate.network} with its backbone", flush=True)
    try:
        result = train_run(run_config)
    except ValueError as error:
        return Finetuned(record.candidate, run_config, None, str(error))
    return Finetuned(record.candidate, run_config, result.report)


def _save_start(start: Path, settings: SearchSettings, config: Config, weights: Path) -> None:
    """A model.pt of the search's backbone and a trial's predictor."""
    loaded = load_model(settings.folder.backbone)
    predictor = build_configured(config.model.predictor, len(config.model.resolutions))
    predictor.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    size = config.model.predictor.input_size
    model = DRNet(loaded.model.backbone, predictor, config.model.resolutions, size, loaded.mean, loaded.std)
    save_model(start, model, config, classes=loaded.classes)


def _lowest_accuracy(config: Config, correct_NR: np.ndarray) -> float | None:
    """What max_accuracy_drop asks for, as a fraction of 1."""
    drop = config.search.max_accuracy_drop
    return None if drop is None else float(correct_NR.mean(axis=0).max()) - drop / 100


def choose_finetuned(config: Config, finetuned: Sequence[Finetuned], correct_NR: np.ndarray) -> Finetuned | None:
    """What the budget names among the finetuned; None without a budget."""
    budget, lowest = config.search.budget_gflops, _lowest_accuracy(config, correct_NR)
    if budget is None and lowest is None:
        return None
    return choose(
        [item for item in finetuned if item.report is not None],
        lambda item: item.point,
        budget_gflops=budget,
        lowest_accuracy=lowest,
    )


def is_sound(summary: Summary) -> bool:
    """Whether it worked with every seed that was tried."""
    return all(record.outcome == "finished" for record in summary.records)


def register_chosen(chosen: Finetuned | None) -> RegisteredModel:
    """Put what the budget chose into the registry, under an alias that names the budget.

    Raises:
        ValueError: nothing was chosen.
        TrackingError: as `register_model`.
    """
    if chosen is None:
        raise ValueError(
            "nothing that was finetuned is within the budget, so nothing was registered; raise the budget, or "
            "search.finetuned"
        )
    config = chosen.config
    alias = budget_alias(config.search)
    run = RunFolder.of(config)
    config = config.model_copy(update={"registry": config.registry.model_copy(update={"alias": alias})})
    return register_model(config, run.path, run.model, run.report_json)
