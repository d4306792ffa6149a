"""The loop's own decisions: moving average, divergence, goodput, what is reported when."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pipeline.cluster.progress import describe
from pipeline.training import monitoring
from pipeline.training.checkpoint import save_model
from pipeline.training.logit_table import backbone_digest
from pipeline.training.loop import checkpoint, clip, evaluate, prepare_stage, train
from pipeline.training.monitoring import DivergedError, DivergenceMonitor, Meter
from pipeline.training.objectives import Ensemble
from pipeline.training.optim import MovingAverage
from pipeline.training.run import (
    AFTER_BACKBONE,
    BEFORE_JOINT,
    CHECKPOINT,
    COMPILE,
    DATA_WAIT,
    EVALUATE,
    PHASES,
    SET_UP,
    STEP,
    TABLE,
    Goodput,
    Progress,
    Run,
)
from tests.small import small_model
from tests.synthetic import NO_TABLES, Recorder, config_of, run_of

BACKBONE = {"epochs": 2, "lr": 0.05}


def trained(recorder: Recorder, tables: Path = NO_TABLES, **changed: object) -> Run:
    run = run_of(config_of(**changed), recorder, tables)
    train(run)
    return run


def only_backbone(**changed: object) -> dict[str, object]:
    return {"backbone": {**BACKBONE, **changed}, "predictor": None, "joint": None}


# Moving average


def test_the_average_is_that_of_the_formula_for_weights_and_statistics() -> None:
    model, decay = small_model(), 0.7
    averaged = MovingAverage(model, decay)
    expected: dict[str, torch.Tensor] = {}
    for step in range(4):
        torch.manual_seed(step)
        with torch.no_grad():
            for value in model.state_dict().values():
                value.copy_(torch.randn(value.shape) if value.is_floating_point() else value + 3)
        for name, value in model.state_dict().items():
            before = expected.get(name, value.double())
            expected[name] = decay * before + (1 - decay) * value.double() if value.is_floating_point() else value
        averaged.update_parameters(model)
    for name, value in averaged.module.state_dict().items():
        torch.testing.assert_close(value, expected[name].to(value.dtype), rtol=1e-4, atol=1e-6, msg=name)
    counts = [name for name in expected if name.endswith("num_batches_tracked")]
    assert counts
    assert all(expected[name] == 12 for name in counts)


def test_the_average_is_saved_evaluated_and_the_stages_result() -> None:
    recorder = Recorder()
    run = trained(recorder, stages=only_backbone(ema_decay=0.6), training={"checkpoint_steps": 1, "batch_size": 8})
    within = [state for state in recorder.states if state.step]
    assert [(state.data_epoch, state.step) for state in within] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    name = "backbone.network.stem.0.weight"
    first, second = within[0], within[1]
    assert torch.equal(first.averaged[f"module.{name}"], first.model[name])
    expected = 0.6 * first.model[name] + 0.4 * second.model[name]
    torch.testing.assert_close(second.averaged[f"module.{name}"], expected, rtol=1e-5, atol=1e-7)

    end_of_first, end = (state for state in recorder.states if not state.step)
    model = run_of(run.config, Recorder()).model
    model.load_state_dict({key[len("module.") :]: value for key, value in end_of_first.averaged.items() if "." in key})
    values = dict(recorder.epochs[0][1])
    found = evaluate(model, run.validation.epoch(0), run.costs)
    assert found.items() <= values.items()
    assert not torch.equal(end_of_first.model[name], model.state_dict()[name])
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, end.averaged[f"module.{key}"]), key
        assert torch.equal(value, end.model[key]), key


def test_the_next_stage_starts_from_the_average(tmp_path: Path) -> None:
    recorder = Recorder()
    routed = {"epochs": 1, "lr": 0.05, "alpha_gflops": 0.0006}
    stages = {"backbone": {**BACKBONE, "ema_decay": 0.6}, "predictor": routed, "joint": None}
    run = trained(recorder, tmp_path, stages=stages)
    (result,) = (state for state in recorder.states if (state.stage, state.data_epoch) == ("backbone", 2))
    for name, value in run.model.backbone.state_dict().items():
        assert torch.equal(value, result.averaged[f"module.backbone.{name}"]), name
    keys = [json.loads(path.read_text()) for path in tmp_path.glob("*/table.json")]
    assert [key["backbone"] for key in keys] == [backbone_digest(run.model)] * 2, "its logit tables are of the average"


def test_the_model_is_kept_after_the_backbone_stage_and_before_the_joint_stage() -> None:
    undisturbed = Recorder()
    trained(undisturbed)
    ends = {state.stage: state.model for state in undisturbed.states if not state.step}
    assert [name for name, _ in undisturbed.kept] == [AFTER_BACKBONE, BEFORE_JOINT]
    for (_, model), stage in zip(undisturbed.kept, ("backbone", "predictor"), strict=True):
        assert all(torch.equal(value, ends[stage][name]) for name, value in model.items())

    for state in undisturbed.states:  # a resumed run keeps what the first one may not have kept
        resumed, moment = Recorder(), (state.data_epoch, state.step)
        train(run_of(config_of(), resumed), state)
        expected = [AFTER_BACKBONE] * (moment <= (2, 0)) + [BEFORE_JOINT] * (moment <= (3, 0))
        assert [name for name, _ in resumed.kept] == expected, state.name


def test_the_model_kept_before_the_joint_stage_is_the_one_that_the_stage_starts_from(tmp_path: Path) -> None:
    start = run_of(config_of(), Recorder())
    torch.nn.init.ones_(start.model.predictor.fc.bias)
    save_model(tmp_path / "start.pt", start.model, start.config, classes=start.manifest.classes)
    joint = {"epochs": 1, "lr": 0.05, "alpha_gflops": 0.0006, "init_from": str(tmp_path / "start.pt")}
    recorder = Recorder()
    trained(recorder, stages={"backbone": None, "predictor": None, "joint": joint})
    ((name, model),) = recorder.kept
    assert name == BEFORE_JOINT
    assert all(torch.equal(value, model[key]) for key, value in start.model.state_dict().items())


def test_batches_are_trained_on_in_the_configured_slices() -> None:
    run, seen = run_of(config_of(stages=only_backbone(), training={"accumulate": 4}), Recorder()), []
    run.model.backbone.register_forward_pre_hook(
        lambda _, inputs: seen.append(len(inputs[0])) if torch.is_grad_enabled() else None
    )
    train(run)
    assert max(seen) == 2
    assert sum(seen) == 22 * 2 * 2, "every image, in both epochs, at both resolutions"


@pytest.mark.parametrize(("max_norm", "expected"), [(None, [3.0, 4.0]), (1.0, [0.6, 0.8]), (7.0, [3.0, 4.0])])
def test_the_norm_over_all_gradients_is_clipped(max_norm: float | None, expected: list[float]) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for parameter, gradient in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([gradient])
    assert clip(parameters, max_norm) == 5.0, "as it was before"
    assert [parameter.grad.item() for parameter in parameters if parameter.grad is not None] == pytest.approx(expected)


# Divergence


def test_a_loss_that_is_not_finite_stops_the_run_and_is_explained() -> None:
    recorder = Recorder()
    with pytest.raises(DivergedError) as caught:
        trained(recorder, stages=only_backbone(lr=1e25), training={"checkpoint_steps": 1, "batch_size": 8})
    message = str(caught.value)
    assert "stage backbone, epoch 1 of 2, step 2 of 3: loss nan, gradient norm nan" in message
    batch = list(run_of(config_of(), recorder).train.epoch(0))[1]
    assert str(sorted(batch.indices.tolist())) in message
    assert "The last checkpoint before it: checkpoint_0000_000001_backbone" in message
    for advice in ("stages.backbone.lr", "warmup_epochs", "clip_grad_norm", "precision", "max_loss"):
        assert advice in message
    assert [state.name for state in recorder.states] == ["checkpoint_0000_000001_backbone"]
    assert not recorder.epochs


def test_weights_that_are_not_finite_reach_no_checkpoint() -> None:
    recorder = Recorder()
    with pytest.raises(DivergedError, match=r"step 1 of 3: weights or batch-norm statistics .* before it: none"):
        trained(recorder, stages=only_backbone(lr=1e300), training={"checkpoint_steps": 1, "batch_size": 8})
    assert recorder.states == []


def test_weights_that_are_not_finite_after_an_epoch_are_not_evaluated() -> None:
    with pytest.raises(DivergedError, match="step 1 of 1: weights or batch-norm statistics after it are not finite"):
        trained(Recorder(), stages=only_backbone(lr=1e300), training={"checkpoint_steps": None, "batch_size": 22})


def test_what_a_stage_trains_beside_the_model_is_checked_too() -> None:
    recorder = Recorder()
    run = run_of(config_of(stages=only_backbone(distillation="learned")), recorder)
    work = prepare_stage(run, run.config.stages.backbone, 0, DivergenceMonitor(None), None)
    assert isinstance(work.objective.own, Ensemble)
    with torch.no_grad():
        work.objective.own.scores_R[1] = math.nan
    with pytest.raises(DivergedError, match="weights or batch-norm statistics after it are not finite"):
        checkpoint(run, work, Progress("backbone", 0, 2, 0, 1, 3), {})
    assert recorder.states == []


def test_an_exploding_loss_stops_the_run_unless_it_is_allowed() -> None:
    recorder = Recorder()
    with pytest.raises(DivergedError, match=r"step 3 of 3: loss \d+, above training.max_loss 1000\. Its images"):
        trained(recorder, stages=only_backbone(lr=30.0))
    assert [state.name for state in recorder.states] == ["checkpoint_0000_000002_backbone"]
    recorder = Recorder()
    trained(recorder, stages=only_backbone(lr=30.0), training={"max_loss": None})
    assert len(recorder.steps) == 6


def test_without_checkpoints_a_bad_step_is_found_within_check_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitoring, "CHECK_STEPS", 4)
    recorder = Recorder()
    with pytest.raises(DivergedError, match="step 2 of 6: loss nan"):
        trained(recorder, stages=only_backbone(lr=1e25), training={"checkpoint_steps": None, "batch_size": 4})
    assert [progress.step for progress, _ in recorder.steps] == [1, 2, 3]


# Meter and goodput


def test_a_meter_continues_from_its_state() -> None:
    steps = [({"loss": torch.tensor(0.1 * step), "right": torch.tensor(float(step))}, step) for step in range(1, 6)]
    whole, half = Meter(), Meter()
    for meter in (whole, half):
        for sums, count in steps[:2]:
            meter.update(sums, count)
        meter.fold()
    resumed = Meter(json.loads(json.dumps(half.state_dict())))
    for meter in (whole, resumed):
        for sums, count in steps[2:]:
            meter.update(sums, count)
    assert resumed.means() == whole.means() == {"loss": pytest.approx(0.1), "right": 1.0}


def test_phases_add_up_to_the_whole() -> None:
    goodput = Goodput(now=iter([0.0, 2.0, 5.0, 6.0, 10.0, 16.0, 16.0]).__next__)
    goodput.enter(COMPILE)
    goodput.enter(STEP)
    with goodput.inside(CHECKPOINT):
        pass
    expected = {SET_UP: 2.0, COMPILE: 3.0, STEP: 1.0 + 6.0, CHECKPOINT: 4.0} | dict.fromkeys(
        [TABLE, DATA_WAIT, EVALUATE], 0.0
    )
    assert goodput.seconds == expected
    metrics = goodput.metrics()
    assert metrics["goodput_checkpoint_seconds"] == 4.0
    assert metrics["goodput_checkpoint_share"] == 0.25
    assert sum(metrics[f"goodput_{phase}_share"] for phase in PHASES) == pytest.approx(1.0)


def test_a_run_spends_time_in_every_phase_and_its_epochs_say_so(tmp_path: Path) -> None:
    recorder = Recorder()
    predictor = {"epochs": 1, "lr": 0.05, "alpha_gflops": 0.0006, "logits": "table"}
    run = trained(recorder, tmp_path, stages={"predictor": predictor})
    assert all(seconds > 0 for seconds in run.goodput.seconds.values())
    epochs = [values for _, values in recorder.epochs]
    seconds = run.goodput.seconds
    spent = sum(seconds[phase] for phase in (COMPILE, DATA_WAIT, STEP))
    assert math.fsum(values["train_epoch_seconds"] for values in epochs) <= spent
    for values in epochs:
        assert values["train_images_per_second"] == pytest.approx(22 / values["train_epoch_seconds"])
        assert 0 < values["train_data_wait_share"] < 1


def test_the_goodput_is_printed_as_a_table() -> None:
    lines = describe({"goodput": {"set_up": 10.0, "data_wait": 30.0}}).splitlines()
    assert lines == [
        "where the time went:",
        "set up           10.0 s   25.0 %",
        "data wait        30.0 s   75.0 %",
        "total            40.0 s",
    ]
