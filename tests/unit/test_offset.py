"""The predictor's offset: what makes the choices meet alpha, and that every form of the model has it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.config.load import ConfigError, parse_config
from pipeline.config.schema import PredictorStage
from pipeline.evaluation.predictions import collect_predictions
from pipeline.models.cost import Costs
from pipeline.models.drnet import DRNet
from pipeline.models.predictor import build_predictor, predictor_shape, start_with_shares
from pipeline.serving.export import exported
from pipeline.training.checkpoint import load_model, save_model
from pipeline.training.loop import train
from pipeline.training.objectives import Forward, build_objective
from pipeline.training.run import Run
from tests.small import COSTS_R, batch_of, small_model
from tests.synthetic import NO_TABLES, Batch, Recorder, manifest_of

COSTS = Costs((48, 32, 24), (4.0, 2.0, 1.0), 0.1)
NUM_IMAGES, BATCH = 640, 64
DATA = {"dataset": "glyphs", "folder": "data"}
STAGE: dict[str, Any] = {"epochs": 1, "lr": 0.01, "optimizer": "adamw", "logits": "live"}


class ManyImages:
    """Images of noise around a brightness of their own."""

    num_samples, num_batches = NUM_IMAGES, NUM_IMAGES // BATCH

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        level = 256 * torch.rand(NUM_IMAGES, 1, 1, 3, generator=generator)
        noise = 60 * torch.randn(NUM_IMAGES, 48, 48, 3, generator=generator)
        pixels = (level + noise).clamp(0, 255).to(torch.uint8)
        self.images = {side: pixels[:, :side, :side] for side in COSTS.resolutions}
        self.labels = torch.randint(0, 5, (NUM_IMAGES,), generator=generator)

    def global_size(self, step: int) -> int:
        return BATCH

    def epoch(
        self, epoch: int, start_step: int = 0, *, crop_epoch: int | None = None, sides: Collection[int] | None = None
    ) -> Iterator[Batch]:
        return self.read(epoch, np.split(np.arange(NUM_IMAGES), self.num_batches)[start_step:], sides=sides)

    def read(
        self, crop_epoch: int, batches: Iterable[NDArray[np.int64]], *, sides: Collection[int] | None = None
    ) -> Iterator[Batch]:
        for indices_N in map(torch.from_numpy, batches):
            images = {side: self.images[side][indices_N] for side in sides or COSTS.resolutions}
            yield Batch(images, self.labels[indices_N], indices_N)


IMAGES = ManyImages()


def trained(stages: dict[str, Any]) -> tuple[Run, Recorder]:
    config = parse_config({"name": "run", "data": DATA, "training": {"batch_size": BATCH}, "stages": stages})
    recorder, manifest = Recorder(), manifest_of(NUM_IMAGES, NUM_IMAGES, 5)
    run = Run(config, small_model(), COSTS, IMAGES, IMAGES, torch.device("cpu"), recorder, manifest, NO_TABLES)
    train(run)
    return run, recorder


def scores_of(model: DRNet) -> NDArray[np.float32]:
    return collect_predictions(model, IMAGES.epoch(0)).predictor_logits_NR


def mean_cost(scores_NR: NDArray[np.float32]) -> float:
    return float(np.asarray(COSTS.backbone)[scores_NR.argmax(axis=1)].mean())


@pytest.mark.parametrize("alpha", [1.3, 3.3])
@pytest.mark.parametrize("ema_decay", [None, 0.5])
@pytest.mark.parametrize("name", ["predictor", "joint", "correctness"])
def test_choices_of_the_training_images_meet_alpha(name: str, ema_decay: float | None, alpha: float) -> None:
    stage = STAGE | {"alpha_gflops": alpha, "ema_decay": ema_decay}
    if name == "joint":
        del stage["logits"]
    elif name == "correctness":
        stage["objective"] = name
    run, recorder = trained({"joint" if name == "joint" else "predictor": stage})
    found = mean_cost(scores_of(run.model))
    if name == "correctness" and not run.model.predictor.offset_R.any():
        assert found <= alpha, "the choices that are right most often are within the budget"
    else:
        assert found == pytest.approx(alpha, rel=0.01)
    assert recorder.values[-1]["gflops_routed"] == pytest.approx(found + COSTS.predictor_gflops)
    bias = recorder.values[-1]["predictor_bias"]
    assert run.model.predictor.offset_R.tolist() == pytest.approx([bias * cost for cost in COSTS.relative])
    (state,) = recorder.states
    assert torch.equal(state.model["predictor.offset_R"], run.model.predictor.offset_R)
    if state.averaged is not None:
        assert torch.equal(state.averaged["module.predictor.offset_R"], run.model.predictor.offset_R)


def test_a_correctness_predictor_without_alpha_prefers_what_is_right_most_often() -> None:
    run, recorder = trained({"predictor": STAGE | {"objective": "correctness"}})
    assert "predictor_bias" not in recorder.values[-1]
    scores_NR = scores_of(run.model)
    assert ((scores_NR > 0) & (scores_NR < 1)).all(), "probabilities"


def test_training_works_on_outputs_without_the_offset_of_a_stage_before() -> None:
    model = small_model()
    model.predictor.offset_R.copy_(torch.tensor([3.0, 0.0, -3.0]))
    model.predictor.gives_probabilities.fill_(True)
    build_objective(model, PredictorStage(epochs=1, alpha_gflops=2.0), COSTS_R)
    assert not model.predictor.offset_R.any()
    assert not model.predictor.gives_probabilities
    build_objective(model, PredictorStage(epochs=1, objective="correctness"), COSTS_R)
    assert model.predictor.gives_probabilities


@pytest.mark.parametrize("num_slices", [1, 3])
def test_a_correctness_step_is_the_cross_entropy_against_the_probability_of_the_true_class(num_slices: int) -> None:
    """In loops; 6 of the 16 images are on other ranks."""
    model, batch = small_model(), batch_of(10)
    logits_NRK = Forward(model, "float32").frozen_backbone(batch.images)
    stage = PredictorStage(epochs=1, objective="correctness")
    seen: list[Tensor] = []
    model.predictor.fc.register_full_backward_hook(lambda _module, _inputs, outputs: seen.append(outputs[0]))
    outputs_NR = small_model().predictor.train().outputs(model.normalize(batch.images[model.predictor_size])).detach()
    images = batch.images if num_slices > 1 else {model.predictor_size: batch.images[model.predictor_size]}
    stored = None if num_slices > 1 else logits_NRK
    part = type(batch)(images, batch.labels_N, batch.gumbel_NR, 16, logits_NRK=stored, num_slices=num_slices)
    sums = build_objective(model, stage, COSTS_R)(part)

    loss, right = 0.0, 0
    for row, label in enumerate(batch.labels_N.tolist()):
        chosen = int(outputs_NR[row].argmax())
        right += int(logits_NRK[row, chosen].argmax()) == label
        for j in range(3):
            target = float(logits_NRK[row, j].softmax(0)[label])
            probability = float(outputs_NR[row, j].sigmoid())
            loss -= target * np.log(probability) + (1 - target) * np.log(1 - probability)
            assert float(seen[0][row, j]) == pytest.approx((probability - target) / 16, rel=1e-3, abs=1e-6)
    assert float(sums["loss"]) == pytest.approx(loss, rel=1e-4)
    assert float(sums["accuracy_routed"]) == right
    assert sum(float(sums[f"share_{index}"]) for index in range(3)) == 10
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


def test_correctness_learns_which_resolution_is_right() -> None:
    """Bright images are right at the largest resolution alone, dark ones at the smallest alone."""
    model, batch = small_model(), batch_of(16)
    bright_N = torch.arange(16) % 2 == 0
    images = {32: torch.where(bright_N[:, None, None, None], 200, 50).expand(-1, 32, 32, 3).to(torch.uint8)}
    right_NR = torch.stack([bright_N, torch.zeros(16, dtype=torch.bool), ~bright_N], dim=1)
    logits_NRK = 8.0 * functional.one_hot(
        torch.where(right_NR, batch.labels_N[:, None], (batch.labels_N[:, None] + 1) % 5), 5
    )
    known = type(batch)(images, batch.labels_N, batch.gumbel_NR, 16, logits_NRK=logits_NRK)
    objective = build_objective(model, PredictorStage(epochs=1, objective="correctness"), COSTS_R)
    optimizer = torch.optim.Adam(model.predictor.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        objective(known)
        optimizer.step()
    scores_NR = model.predictor.train()(model.normalize(images[32]))
    assert torch.equal(scores_NR > 0.5, right_NR)


@pytest.mark.parametrize("probabilities", [False, True])
def test_scores_are_outputs_or_their_sigmoids_plus_the_offset_in_every_form(
    probabilities: bool, tmp_path: Path
) -> None:
    model, images = small_model().eval(), batch_of(7).images
    model.predictor.offset_R.copy_(torch.tensor([-0.5, -0.25, 0.0]))
    model.predictor.gives_probabilities.fill_(probabilities)
    with torch.no_grad():
        outputs_NR = model.predictor.outputs(model.normalize(images[model.predictor_size]))
        expected_NR = (outputs_NR.sigmoid() if probabilities else outputs_NR) + torch.tensor([-0.5, -0.25, 0.0])
        assert torch.equal(model.predictor_logits(images), expected_NR)

        config = parse_config({"name": "run", "data": DATA, "stages": {"backbone": {"epochs": 1}}}).model_copy(
            update={"model": MODEL}
        )
        save_model(tmp_path / "model.pt", model, config, classes=list("abcde"))
        assert torch.equal(load_model(tmp_path / "model.pt").model.predictor_logits(images), expected_NR)

        program = exported(model, model.predictor, model.predictor_size).module()
        torch.testing.assert_close(program(images[model.predictor_size]), expected_NR, rtol=1e-4, atol=1e-5)


MODEL = parse_config(
    {
        "name": "run",
        "data": DATA,
        "model": {
            "backbone": "small_resnet",
            "backbone_width": 0.5,
            "resolutions": [48, 32, 24],
            "predictor": {"input_size": 32, "width": 0.25, "dropout": 0.0},
        },
        "stages": {"backbone": {"epochs": 1}},
    }
).model


def test_a_state_from_before_offsets_loads_without_one() -> None:
    model = small_model()
    whole = model.state_dict()
    old = {name: value for name, value in whole.items() if not name.endswith(("offset_R", "gives_probabilities"))}
    assert len(old) == len(whole) - 2
    model.predictor.offset_R.fill_(1.0)
    model.predictor.gives_probabilities.fill_(True)
    model.load_state_dict(old)
    assert not model.predictor.offset_R.any()
    assert not model.predictor.gives_probabilities
    predictor = build_predictor(predictor_shape(2), 3, width=0.25)
    prefix = "predictor."
    predictor.load_state_dict({name.removeprefix(prefix): value for name, value in old.items() if prefix in name})
    assert not predictor.offset_R.any()


def test_a_correctness_predictor_is_not_trained_on_by_the_joint_stage() -> None:
    predictor, joint = {"epochs": 1, "objective": "correctness"}, {"epochs": 1, "alpha_gflops": 2.0}
    with pytest.raises(ConfigError, match=r"objective is correctness.*stages\.joint=null"):
        parse_config({"name": "run", "data": DATA, "stages": {"predictor": predictor, "joint": joint}})
    with pytest.raises(ConfigError, match=r"stages\.predictor\.alpha_gflops is missing"):
        parse_config({"name": "run", "data": DATA, "stages": {"predictor": {"epochs": 1}}})


def test_an_alpha_that_asks_for_no_savings_leaves_the_choices_as_they_are() -> None:
    run, recorder = trained({"predictor": STAGE | {"alpha_gflops": 4.0}})
    assert not run.model.predictor.offset_R.any()
    assert "predictor_bias" not in recorder.values[-1]


def test_equal_scores_of_all_images_stay_within_alpha() -> None:
    model = small_model()
    start_with_shares(model.predictor, (1.0, 5.0, 1.0))
    config = parse_config(
        {
            "name": "run",
            "data": DATA,
            "training": {"batch_size": BATCH},
            "stages": {"predictor": STAGE | {"alpha_gflops": 3.0, "lr": 1e-12}},
        }
    )
    manifest = manifest_of(NUM_IMAGES, NUM_IMAGES, 5)
    train(Run(config, model, COSTS, IMAGES, IMAGES, torch.device("cpu"), Recorder(), manifest, NO_TABLES))
    assert mean_cost(scores_of(model)) == 2.0
