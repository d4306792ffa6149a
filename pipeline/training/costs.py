"""The costs that a run trains and reports with, the same on all ranks and in every sitting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.config import Config, RoutedStage
from pipeline.config_file import ConfigError
from pipeline.models.cost import Costs, measure_costs
from pipeline.models.drnet import DRNet
from pipeline.models.latency import Latency, measure_latency
from pipeline.training import distributed
from pipeline.training.checkpoint import OtherRunError


def costs_of_run(model: DRNet, config: Config, file: Path, *, resumed: bool) -> Costs:
    """GFLOPs, and where the run's cost is milliseconds, those: measured once by rank 0 and kept in `file`.

    Every rank must call it.

    Args:
        resumed: the run has gone on for a while, so its costs are in `file`, or lost.

    Raises:
        OtherRunError: the run's costs are lost, and new ones would be others; on all ranks.
    """
    costs = measure_costs(model)
    if config.cost == "flops":
        return costs
    found = distributed.from_first_rank(_latency(model, config, file, resumed) if distributed.rank() == 0 else None)
    if isinstance(found, ValueError):
        raise found
    return replace(costs, latency=found)


def refuse_unreachable(config: Config, costs: Costs) -> None:
    """Raise ConfigError, on every rank the same, where a stage's alpha cannot be reached with the run's costs."""
    problems = alpha_problems(config, costs)
    if problems:
        raise ConfigError(problems, f"the run {config.name}")


def alpha_problems(config: Config, costs: Costs) -> list[str]:
    """Each stage whose alpha the candidates cannot reach, or at which the regulariser can never act.

    Alpha is a target of the backbone's mean cost alone, without the predictor. One in milliseconds can be judged only
    with costs that were measured.
    """
    low, high = min(costs.backbone), max(costs.backbone)
    key, unit = f"alpha_{costs.unit}", "GFLOPs" if costs.latency is None else f"ms ({costs.latency})"
    problems = []
    for name, stage in config.stages.present():
        alpha = getattr(stage, key) if isinstance(stage, RoutedStage) else None
        if alpha is None or low <= alpha <= high:
            continue
        effect = (
            "even the smallest resolution costs more"
            if alpha < low
            else "even the largest resolution costs less, so nothing would be saved"
        )
        problems.append(
            f"stages.{name}.{key} is {alpha:g}, but {effect}; {config.model.backbone} at "
            f"{list(costs.resolutions)} px reaches {low:.4g} to {high:.4g} {unit}"
        )
    return problems


def _latency(model: DRNet, config: Config, file: Path, resumed: bool) -> Latency | ValueError:
    if resumed and not file.exists():
        return OtherRunError(
            f"{file} is gone, with the milliseconds that the run was trained for so far; measured again they would be "
            "others. Put it back, or start a run with another name (name=...)"
        )
    if not file.exists():
        measure_latency(model, config.cost_batch_size, config.training.precision).save(file)
    try:
        return Latency.load(file)
    except ValueError as error:
        return error
