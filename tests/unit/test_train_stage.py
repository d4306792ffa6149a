"""The loop around the objectives, on batches in memory: annealing, warnings, resuming."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.load import parse_config
from pipeline.models.cost import Costs
from pipeline.models.drnet import DRNet
from pipeline.models.predictor import start_with_shares
from pipeline.training.loop import StageData, evaluate, place, train
from pipeline.training.objectives import build_objective
from pipeline.training.optim import build_optimizer, learning_rate
from pipeline.training.run import Progress, Run
from tests.small import COSTS_R, batch_of, small_model
from tests.synthetic import NO_TABLES, Recorder, manifest_of

COSTS = Costs((48, 32, 24), (4.0, 2.0, 1.0), 0.1)
CPU = torch.device("cpu")


@dataclass
class LoadedBatch:
    images: Mapping[int, Tensor]
    labels: Tensor
    indices: Tensor


class Batches:
    """Two batches of 8 images, in the same order every epoch."""

    num_samples, num_batches = 16, 2

    def global_size(self, step: int) -> int:
        return 8

    def epoch(
        self, epoch: int, start_step: int = 0, *, crop_epoch: int | None = None, sides: Collection[int] | None = None
    ) -> Iterator[LoadedBatch]:
        return self.read(0, [np.arange(8 * step, 8 * step + 8) for step in range(start_step, 2)])

    def read(
        self, crop_epoch: int, batches: Iterable[NDArray[np.int64]], *, sides: Collection[int] | None = None
    ) -> Iterator[LoadedBatch]:
        whole = batch_of(16)
        for indices_N in map(torch.from_numpy, batches):
            images = {side: images[indices_N] for side, images in whole.images.items()}
            yield LoadedBatch(images, whole.labels_N[indices_N], indices_N)


MANIFEST = manifest_of(num_train=16, num_validation=16, num_classes=5)


def run_of(stages: dict[str, Any], folder: Path = NO_TABLES, model: DRNet | None = None) -> tuple[Run, Recorder]:
    config = parse_config({"name": "run", "data": {"dataset": "glyphs", "folder": "data"}, "stages": stages})
    model, recorder = model or small_model(), Recorder()
    return Run(config, model, COSTS, Batches(), Batches(), CPU, recorder, MANIFEST, folder), recorder


def test_a_stage_with_an_ensemble_and_mixing_resumes_to_the_bit() -> None:
    stage = {"epochs": 2, "lr": 0.05, "distillation": "learned", "mixup_alpha": 0.4, "cutmix_alpha": 0.4}
    undisturbed, kept = run_of({"backbone": stage})
    train(undisturbed)
    resumed, seen = run_of({"backbone": stage})
    train(resumed, kept.states[0])
    (second,), first = seen.states, kept.states[-1]
    assert second.name == first.name
    assert first.objective["scores_R"].abs().max() > 0
    for kind in ("model", "objective"):
        assert all(torch.equal(value, getattr(second, kind)[name]) for name, value in getattr(first, kind).items())


def test_the_stage_after_one_with_an_ensemble_starts_from_its_checkpoint_and_table(tmp_path: Path) -> None:
    stages = {
        "backbone": {"epochs": 1, "lr": 0.05, "distillation": "learned"},
        "predictor": {"epochs": 1, "lr": 0.05, "alpha_gflops": 2.0},
    }
    undisturbed, kept = run_of(stages, tmp_path)
    train(undisturbed)
    resumed, seen = run_of(stages, tmp_path)
    train(resumed, kept.states[0])
    lines = [[text for text in recorder.messages if text.startswith("logit table")] for recorder in (kept, seen)]
    assert [len(found) for found in lines] == [2, 0], "the tables of both splits are computed once"
    for name, value in undisturbed.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_each_step_uses_the_annealed_alpha_and_tau() -> None:
    annealed = {"epochs": 1, "lr": 0.05, "alpha_gflops": 1.0, "alpha_start_gflops": 3.0, "tau": 1.0, "tau_start": 5.0}
    annealed["logits"] = "live"
    run, _ = run_of({"predictor": annealed})
    model = copy.deepcopy(run.model)
    train(run)

    stage = run.config.stages.predictor
    assert stage is not None
    optimizer, batches = None, Batches()
    data = StageData(batches, batches, 0, 1)
    for step, (tau, alpha) in enumerate([(5.0, 3.0), (3.0, 2.0)]):  # the second step is at half of the stage
        held = {"tau": tau, "tau_start": None, "alpha_gflops": alpha, "alpha_start_gflops": None}
        objective = build_objective(model, stage.model_copy(update=held), COSTS_R)
        optimizer = optimizer or build_optimizer(model, stage)
        batch = place(list(batches.epoch(0))[step], run, data, Progress("predictor", 0, 1, 0, step, 2))
        torch.manual_seed(0)  # nothing random is left: the small predictor has no dropout
        optimizer.param_groups[0]["lr"] = learning_rate(stage, step / 2)
        assert batch.epoch == step / 2
        objective(replace(batch, epoch=0.0))
        optimizer.step()
        optimizer.zero_grad()
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], msg=name)


def test_a_collapse_is_reported_and_recorded() -> None:
    model = small_model()
    start_with_shares(model.predictor, (1e-9, 1.0, 1e-9))
    predictor = {"epochs": 1, "lr": 1e-9, "alpha_gflops": 3.0, "logits": "live"}
    run, recorder = run_of({"backbone": {"epochs": 1, "lr": 1e-9}, "predictor": predictor}, model=model)
    train(run)
    (message,) = recorder.messages
    assert "100.0 % of the validation images go to 32 px" in message
    of_backbone, of_predictor = recorder.values
    assert "collapsed" not in of_backbone
    assert of_predictor["collapsed"] == 1.0

    start_with_shares(model.predictor, (1.0, 1.0, 1.0))
    with torch.no_grad():
        model.predictor.fc.weight.normal_(0, 5)
    train(run)
    assert len(recorder.messages) == 1
    assert recorder.values[-1]["collapsed"] == 0.0


def test_evaluation_counts_shares_of_predictor_and_oracle() -> None:
    model, batch = small_model().eval(), batch_of(16)
    values = evaluate(model, Batches().epoch(0), COSTS)
    with torch.no_grad():
        answers = [model.static_logits(batch.images, index).argmax(1).tolist() for index in range(3)]
        chosen = model.predictor_logits(batch.images).argmax(1).tolist()
    counts: dict[str, float] = {}
    for row, label in enumerate(batch.labels_N.tolist()):
        right = [answers[index][row] == label for index in range(3)]
        oracle = max((index for index in range(3) if right[index]), default=2)  # the last is the cheapest
        keys = [f"accuracy_{COSTS.resolutions[index]}" for index in range(3) if right[index]]
        keys += [f"share_{COSTS.resolutions[chosen[row]]}", f"oracle_share_{COSTS.resolutions[oracle]}"]
        for key in keys + ["accuracy_routed"] * right[chosen[row]]:
            counts[key] = counts.get(key, 0.0) + 1 / 16
    expected = {f"{kind}_{side}": 0.0 for kind in ("accuracy", "share", "oracle_share") for side in COSTS.resolutions}
    cost = float(np.mean([COSTS.backbone_gflops[index] for index in chosen])) + 0.1
    expected |= {"accuracy_routed": 0.0, "gflops_routed": cost} | counts
    assert values == pytest.approx(expected)
