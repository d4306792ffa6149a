from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import ConfigError, drift, load_config, parse_config
from pipeline.models.cost import measure_costs
from pipeline.models.drnet import build_drnet
from pipeline.search.space import (
    ARCHITECTURE_KEYS,
    Choice,
    Range,
    input_sizes,
    paper_candidates,
    predictor_gflops,
    space_of,
    space_problems,
)
from tests.search_cases import BACKBONE_GFLOPS, SPACE, candidate_of, config_of


def problems_of(**search: Any) -> str:
    config = config_of(Path(), **search)
    space = space_of(config, BACKBONE_GFLOPS)
    return "\n".join(space_problems(config, space, BACKBONE_GFLOPS))


def test_presets_vary_their_parameters():
    spaces = {
        preset: space_of(config_of(Path(), preset=preset), BACKBONE_GFLOPS) for preset in ("paper", "size", "full")
    }
    assert not spaces["paper"].parameters
    assert tuple(spaces["size"].parameters) == ARCHITECTURE_KEYS
    assert spaces["size"].parameters["blocks"] == Choice(("0", "1", "1-1"))
    assert spaces["full"].parameters["lr"] == Range(0.05 / 3, 0.05 * 3)
    alpha = spaces["full"].parameters["alpha_gflops"]
    assert isinstance(alpha, Range)
    assert (alpha.low, alpha.high) == pytest.approx((0.00145, 0.00355))
    assert spaces["size"].max_gflops == pytest.approx(0.003), (
        "the difference between the cheapest and the most expensive resolution"
    )


def test_the_papers_four_use_the_configurations_size_and_recipe():
    found = paper_candidates(config_of(Path()))
    assert [(c.blocks, c.kernel, c.stem_stride) for c in found.values()] == [
        ((1, 1, 1, 1), 7, 2),
        ((1, 1), 7, 2),
        ((1, 1), 7, 4),
        ((0,), 7, 2),
    ]
    assert {(c.input_size, c.width, c.lr, c.tau) for c in found.values()} == {(24, 0.125, 0.05, 1.0)}


@pytest.mark.parametrize(("width", "drawn"), [([0.2, 1.0], 0.21), ([0.3, 0.31], 0.3)])
def test_a_width_that_rounding_moves_out_of_its_range_is_in_the_space(width: list[float], drawn: float):
    space = space_of(config_of(Path(), preset="size", space={**SPACE, "width": width}), BACKBONE_GFLOPS)
    values = {"blocks": "1-1", "kernel": 5, "stem_stride": 4, "input_size": 16}
    candidate = space.candidate(values | {"width": drawn})
    assert not width[0] <= candidate.width <= width[1]
    sampled = space.sampled(candidate)
    assert sampled is not None
    assert space.candidate(sampled) == candidate


def test_sampled_values_and_candidates_convert_into_each_other():
    space = space_of(config_of(Path(), preset="full"), BACKBONE_GFLOPS)
    values = {"blocks": "1-1", "kernel": 5, "stem_stride": 4, "input_size": 16, "width": 0.19}
    values |= {"alpha_gflops": 0.002, "eta": 0.5, "tau": 2.0, "lr": 0.1}
    candidate = space.candidate(values)
    assert (candidate.blocks, candidate.width, candidate.tau) == ((1, 1), 0.1875, 2.0)
    assert space.sampled(candidate) == values | {"width": 0.1875}
    assert space.candidate(space.sampled(candidate) or {}) == candidate
    assert space.sampled(candidate_of(kernel=7)) is None, "7 is not one of the choices"
    size = space_of(config_of(Path(), preset="size"), BACKBONE_GFLOPS)
    assert size.sampled(candidate) is None, "its recipe differs from the configuration's"


def test_a_candidates_cost_is_that_of_its_network():
    config = config_of(Path())
    for candidate in (*paper_candidates(config).values(), candidate_of(blocks=[2, 0], kernel=5, width=0.25)):
        costs = measure_costs(build_drnet(candidate.model(config.model), 3, (0.5,) * 3, (0.5,) * 3))
        assert predictor_gflops(candidate) == pytest.approx(costs.predictor_gflops, rel=1e-3)


def test_the_cheapest_of_a_space_is_the_cheapest_of_all_its_corners():
    space = space_of(config_of(Path()), BACKBONE_GFLOPS)
    costs = [
        predictor_gflops(space.candidate({"blocks": b, "kernel": k, "stem_stride": s, "input_size": i, "width": w}))
        for b in ("0", "1", "1-1")
        for k in (3, 5)
        for s in (2, 4)
        for i in (16, 24)
        for w in (0.125, 0.25)
    ]
    assert space.cheapest_gflops() == min(costs)
    assert space.allows(candidate_of())


def test_inputs_are_decoded_at_every_size_that_a_candidate_may_use():
    assert input_sizes(config_of(Path())) == (24, 16)
    assert input_sizes(config_of(Path(), preset="paper")) == (24,)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"kernel": []}, r"search.space.kernel is empty; give at least one value"),
        ({"kernel": [3, 4]}, "kernels have odd sides"),
        ({"blocks": [[1], []]}, "a choice without a stage"),
        ({"width": [0.5, 0.25]}, "search.space.width is 0.5 to 0.25; give the lower value first"),
        ({"input_size": [16, 64]}, "inputs of [64] px are larger than the largest of model.resolutions, 48"),
        ({"max_gflops": 1e-6}, "raise it, or allow smaller widths"),
    ],
)
def test_an_empty_or_contradictory_space_is_reported(changed: dict[str, Any], expected: str):
    assert expected in problems_of(space=SPACE | changed)


def test_a_value_of_0_cannot_be_searched_on_a_logarithmic_scale():
    config = config_of(Path(), preset="full")
    predictor = config.stages.predictor.model_copy(update={"eta": 0.0})
    config = config.model_copy(update={"stages": config.stages.model_copy(update={"predictor": predictor})})
    (problem,) = space_problems(config, space_of(config, BACKBONE_GFLOPS), BACKBONE_GFLOPS)
    assert problem.startswith("search.space.eta is 0 to 0, but it is searched on a logarithmic scale")
    assert problem.endswith("or a stages.predictor.eta above 0")


def test_all_problems_of_a_space_are_reported_together():
    found = problems_of(space=SPACE | {"kernel": [], "width": [0.5, 0.25]})
    assert "kernel is empty" in found
    assert "search.space.width" in found


def test_a_budget_that_no_candidate_reaches_is_reported():
    assert "budget_gflops is 0.0005, but no candidate costs less than 0.00100" in problems_of(budget_gflops=0.0005)
    assert problems_of(budget_gflops=0.003) == ""
    assert "so give search.budget_gflops" in problems_of(objective="budget")


def test_the_search_section_may_change_before_a_run_resumes(tmp_path: Path):
    assert drift(config_of(tmp_path), config_of(tmp_path, num_trials=7)) == []


def test_an_invalid_value_is_rejected_with_its_key():
    tree = config_of(Path()).model_dump(mode="json")
    tree["search"] |= {"preset": "huge", "seeds": 0}
    with pytest.raises(ConfigError, match=r"search\.preset(.|\n)*search\.seeds"):
        parse_config(tree)


@pytest.mark.parametrize("name", ["glyphs", "elpv", "imagenet100-search"])
def test_the_shipped_searches_have_no_problem(name: str):
    config = load_config(name)
    costs = measure_costs(build_drnet(config.model, 10, (0.5,) * 3, (0.5,) * 3))
    assert list(space_problems(config, space_of(config, costs.backbone_gflops), costs.backbone_gflops)) == []
    assert config.stages.joint is not None or config.search.finetuned == 0
