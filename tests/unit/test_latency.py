"""Milliseconds as cost: measured once, stored to the bit, and used for all decisions."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.load import ConfigError, parse_config
from pipeline.config.schema import Config, PredictorStage
from pipeline.evaluation.report import build_report
from pipeline.models.cost import Costs, Latency, measure_costs, measure_latency
from pipeline.training.checkpoint import OtherRunError
from pipeline.training.monitoring import collapse_warning
from pipeline.training.objectives import build_objective
from pipeline.training.run import costs_of_run, refuse_unreachable
from tests.small import batch_of, small_model
from tests.unit.evaluation_cases import CLASSES, COSTS, PERFECT, evaluation_of, predictions_of

LATENCY = Latency((3.0, 2.0, 1.0), 0.1, 8, "float32", "the CPU", 2, "2.13")
# Time differs from FLOPs: the smallest resolution saves less time than FLOPs.
TIMED = replace(COSTS, latency=replace(LATENCY, backbone_milliseconds=(3.0, 2.0, 1.9)))


def config_of(folder: Path, **changed) -> Config:
    tree = {
        "name": "timed",
        "cost": "milliseconds",
        "cost_batch_size": 2,
        "data": {"dataset": "glyphs", "folder": str(folder)},
        "stages": {"predictor": {"epochs": 1, "alpha_milliseconds": 2.0}},
    }
    return parse_config({**tree, **changed})


def test_every_candidate_is_timed_and_the_model_does_not_change():
    model = small_model().train()
    model.backbone.eval()
    before, random_state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    found = measure_latency(model, batch_size=2)
    assert len(found.backbone_milliseconds) == 3
    assert min(*found.backbone_milliseconds, found.predictor_milliseconds) > 0
    assert (found.batch_size, found.precision, found.device) == (2, "float32", "the CPU")
    assert (model.training, model.backbone.training, model.predictor.training) == (True, False, True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_numbers_survive_the_disk_to_the_bit(tmp_path):
    odd = replace(LATENCY, backbone_milliseconds=(0.1 + 0.2, 1 / 3, 1e-9))
    odd.save(tmp_path / "latency.json")
    assert Latency.load(tmp_path / "latency.json") == odd


def test_costs_are_measured_once(tmp_path):
    file, model, config = tmp_path / "latency.json", small_model(), config_of(tmp_path)
    first = costs_of_run(model, config_of(tmp_path, stages={"backbone": {"epochs": 1}}), file, resumed=False)
    content = file.read_bytes()
    assert first.backbone_gflops == measure_costs(model).backbone_gflops
    assert costs_of_run(model, config_of(tmp_path, stages={"backbone": {"epochs": 1}}), file, resumed=True) == first
    LATENCY.save(file)
    assert costs_of_run(model, config, file, resumed=True).backbone == LATENCY.backbone_milliseconds
    assert content != file.read_bytes()


def test_flops_measure_nothing(tmp_path):
    config = config_of(tmp_path, cost="flops", stages={"predictor": {"epochs": 1, "alpha_gflops": 1.0}})
    assert costs_of_run(small_model(), config, tmp_path / "latency.json", resumed=True).latency is None
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_whose_costs_are_lost_or_damaged_is_refused(tmp_path):
    with pytest.raises(OtherRunError, match=r"latency\.json .*is missing"):
        costs_of_run(small_model(), config_of(tmp_path), tmp_path / "latency.json", resumed=True)
    (tmp_path / "latency.json").write_text('{"backbone_milliseconds": [1.0]}')
    with pytest.raises(ValueError, match=r"latency\.json is damaged"):
        costs_of_run(small_model(), config_of(tmp_path), tmp_path / "latency.json", resumed=True)


def test_a_target_out_of_reach_is_refused_with_what_was_measured(tmp_path):
    LATENCY.save(tmp_path / "latency.json")
    config = config_of(tmp_path, stages={"predictor": {"epochs": 1, "alpha_milliseconds": 3.5}})
    costs = costs_of_run(small_model(), config, tmp_path / "latency.json", resumed=False)
    refuse_unreachable(config_of(tmp_path), costs)
    with pytest.raises(ConfigError) as raised:
        refuse_unreachable(config, costs)
    (problem,) = raised.value.problems
    assert "stages.predictor.alpha_milliseconds is 3.5" in problem
    assert "reaches 1 to 3 ms (median of 15 rounds in batches of 8, float32, on the CPU (2 CPU threads)" in problem
    again = pickle.loads(pickle.dumps(raised.value))
    assert (str(again), again.problems) == (str(raised.value), raised.value.problems), "workers send it to the driver"


@pytest.mark.parametrize(
    ("cost", "stage", "message"),
    [
        ("milliseconds", {"alpha_gflops": 1.0}, "alpha_gflops is given, but cost is milliseconds. Give alpha_millisec"),
        ("flops", {"alpha_milliseconds": 1.0}, "alpha_milliseconds is given, but cost is flops. Give alpha_gflops"),
        ("flops", {"alpha_gflops": 1.0, "alpha_start_milliseconds": 2}, "alpha_start_milliseconds is given, but cost"),
        ("milliseconds", {}, r"alpha_gflops is missing \(alpha_milliseconds if cost is milliseconds\)"),
    ],
)
def test_a_target_in_another_unit_is_refused(tmp_path, cost, stage, message):
    with pytest.raises(ConfigError, match=rf"stages\.predictor\.{message}"):
        config_of(tmp_path, cost=cost, stages={"predictor": {"epochs": 1, **stage}})


def test_the_same_numbers_in_either_unit_give_the_same_penalty():
    results = []
    for unit in ("gflops", "milliseconds"):
        stage = PredictorStage.model_validate({"epochs": 1, "eta": 1.0, f"alpha_{unit}": 1.5})
        model, batch = small_model(), batch_of(16)
        sums = build_objective(model, stage, torch.tensor(LATENCY.backbone_milliseconds))(batch)
        results.append((sums["loss"], sums[f"{unit}_backbone"], model.predictor.fc.weight.grad))
    for by_flops, by_time in zip(*results, strict=True):
        assert torch.equal(by_flops, by_time)


def test_a_collapse_is_explained_in_the_runs_unit():
    stage = PredictorStage(epochs=1, alpha_milliseconds=2.5)
    values = {"share_48": 0.0, "share_32": 1.0, "share_24": 0.0} | {
        f"oracle_share_{side}": 1 / 3 for side in (48, 32, 24)
    }
    costs = Costs((48, 32, 24), (4.0, 2.0, 1.0), 0.1, LATENCY)
    warning = collapse_warning("predictor", stage, costs, values)
    assert warning is not None
    assert "whose 2 ms are within alpha_milliseconds (2.5)" in warning


def timed_report(costs: Costs = TIMED) -> dict:
    return build_report(
        evaluation_of(predictions_of(*PERFECT), costs), classes=CLASSES, attributes={}, name="run", context={}
    )


def test_a_report_compares_by_time_and_still_says_gflops():
    report, by_flops = timed_report(), timed_report(COSTS)
    routed = report["headline"]
    # 62 % at 1.9 ms, 10 % at 2 ms, 28 % at 3 ms, and the predictor.
    assert routed["mean_cost"] == pytest.approx(0.62 * 1.9 + 0.1 * 2 + 0.28 * 3 + 0.1)
    assert routed["mean_gflops"] == by_flops["headline"]["mean_gflops"] == by_flops["headline"]["mean_cost"]
    assert "of the time of static 96 px" in report["verdict"]
    assert "at equal time" in report["verdict"]
    line = next(row for row in report["rows"] if row["kind"] == "envelope")
    assert line["mean_cost"] == pytest.approx(routed["mean_cost"])
    assert report["comparisons"]["static-96"]["cost_ratio"] == pytest.approx(routed["mean_cost"] / 3.0)
    assert report["costs"]["unit"] == "milliseconds"
    assert report["costs"]["latency"]["batch_size"] == 8
    assert json.loads(json.dumps(report)) == report


def test_the_budget_bias_means_the_same_in_either_unit():
    """The registered model uses the bias, and knows only GFLOPs."""
    by_time, by_flops = (timed_report(costs)["budget_curve"] for costs in (TIMED, COSTS))
    assert [point["budget_bias"] for point in by_time] == [point["budget_bias"] for point in by_flops]
    assert [point["top1"] for point in by_time] == [point["top1"] for point in by_flops]
    assert [point["mean_cost"] for point in by_flops] == pytest.approx([point["mean_gflops"] for point in by_flops])
    shares = np.array([point["shares"] for point in by_time])
    np.testing.assert_allclose([point["mean_cost"] for point in by_time], shares @ TIMED.backbone + 0.1)
