"""The search space: candidates, the parameters that a preset varies, and checks of the space."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from pipeline.config.schema import Config, ModelConfig, PredictorConfig, PredictorStage
from pipeline.models.cost import count_macs
from pipeline.models.dry_run import meta_images
from pipeline.models.predictor import ARCHITECTURES, PredictorShape, build_predictor, predictor_shape

ARCHITECTURE_KEYS = ("blocks", "kernel", "stem_stride", "input_size", "width")
RECIPE_KEYS = ("alpha_gflops", "eta", "tau", "lr")
PRESETS: Mapping[str, tuple[str, ...]] = {
    "paper": (),
    "size": ARCHITECTURE_KEYS,
    "full": ARCHITECTURE_KEYS + RECIPE_KEYS,
}
"""The parameters that each preset varies."""
WIDTH_STEP = 1 / 16
"""The step between widths: 8 of the second stage's 128 channels. Channel counts are rounded to multiples of 8."""
RECIPE_FACTOR = 3.0
"""By default eta, tau and lr are searched from the configuration's value divided by this to that value times this."""
ALPHA_SHARES = (0.15, 0.85)
"""The default ends of alpha_gflops: how far from the cheapest to the most expensive resolution's cost."""


@dataclass(frozen=True)
class Candidate:
    """A predictor and how it is trained. Costs are in GFLOPs (1e9 multiply-adds)."""

    blocks: tuple[int, ...]
    kernel: int
    stem_stride: int
    input_size: int
    width: float
    alpha_gflops: float
    eta: float
    tau: float
    lr: float

    @classmethod
    def of(cls, predictor: PredictorConfig, stage: PredictorStage) -> Candidate:
        """Return the candidate that a configuration describes."""
        shape = predictor_shape(
            predictor.architecture,
            blocks=predictor.blocks,
            kernel=predictor.kernel,
            stem_stride=predictor.stem_stride,
        )
        recipe = {key: getattr(stage, key) for key in RECIPE_KEYS}
        size = {"input_size": predictor.input_size, "width": predictor.width}
        return cls(blocks=shape.blocks, kernel=shape.kernel, stem_stride=shape.stem_stride, **size, **recipe)

    @classmethod
    def parse(cls, tree: Mapping[str, Any]) -> Candidate:
        """Return the candidate that `described` turned into a JSON tree."""
        return cls(blocks=tuple(tree["blocks"]), **{key: value for key, value in tree.items() if key != "blocks"})

    def described(self) -> dict[str, Any]:
        """Return the candidate as a JSON tree."""
        return {**asdict(self), "blocks": list(self.blocks)}

    @property
    def shape(self) -> PredictorShape:
        """The predictor's shape."""
        return PredictorShape(self.blocks, self.kernel, self.stem_stride)

    @property
    def network(self) -> str:
        """The predictor described in words."""
        stem = f"{self.kernel}x{self.kernel}/{self.stem_stride}"
        return f"blocks {blocks_text(self.blocks)}, {stem}, {self.input_size} px, width {self.width:g}"

    def model(self, base: ModelConfig) -> ModelConfig:
        """Return `base` with this predictor."""
        changed = {key: getattr(self, key) for key in ARCHITECTURE_KEYS}
        return base.model_copy(update={"predictor": base.predictor.model_copy(update=changed)})

    def recipe(self) -> dict[str, float]:
        """Return the fields of a routed stage that the candidate sets."""
        return {key: getattr(self, key) for key in RECIPE_KEYS}


@dataclass(frozen=True)
class Choice:
    """A parameter with several allowed values."""

    values: tuple[Any, ...]

    def __contains__(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return ", ".join(map(str, self.values))


@dataclass(frozen=True)
class Range:
    """A parameter with a range of values, sampled uniformly in the logarithm."""

    low: float
    high: float

    def random(self, generator: np.random.Generator) -> float:
        """Draw a value from the range."""
        return self.clip(math.exp(generator.uniform(math.log(self.low), math.log(self.high))))

    def clip(self, value: float) -> float:
        """Return the nearest value in the range."""
        return min(max(value, self.low), self.high)

    def __contains__(self, value: Any) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low:.4g} to {self.high:.4g}"


@dataclass(frozen=True)
class Space:
    """The parameters that are varied, and the candidate that sets all others.

    Attributes:
        max_gflops: highest cost of a predictor, in GFLOPs.
    """

    base: Candidate
    parameters: Mapping[str, Choice | Range]
    max_gflops: float

    def candidate(self, values: Mapping[str, Any]) -> Candidate:
        """Return the candidate with these values of `parameters`, in the sampler's form (see `sampled`)."""
        changed = dict(values)
        if "blocks" in changed:
            changed["blocks"] = parse_blocks(changed["blocks"])
        if "width" in changed:
            changed["width"] = max(1, round(changed["width"] / WIDTH_STEP)) * WIDTH_STEP
        return Candidate.parse({**self.base.described(), **changed})

    def sampled(self, candidate: Candidate) -> dict[str, Any] | None:
        """Return the values that a sampler would draw for a candidate, or None if it is not in the space."""
        values = {key: getattr(candidate, key) for key in self.parameters}
        if "blocks" in values:
            values["blocks"] = blocks_text(values["blocks"])
        if isinstance(width := self.parameters.get("width"), Range):  # rounding may have moved it out of the range
            values["width"] = width.clip(values["width"])
        inside = all(value in self.parameters[key] for key, value in values.items())
        return values if inside and self.candidate(values) == candidate else None

    def __contains__(self, candidate: Candidate) -> bool:
        """Return whether a sampler may draw the candidate, and its cost is within the limit."""
        return self.sampled(candidate) is not None and self.allows(candidate)

    def random(self, generator: np.random.Generator) -> dict[str, Any]:
        """Draw uniformly random values, in the sampler's form."""
        return {
            key: parameter.random(generator)
            if isinstance(parameter, Range)
            else parameter.values[generator.integers(len(parameter.values))]
            for key, parameter in self.parameters.items()
        }

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the parameters in Optuna's form."""
        return {
            key: FloatDistribution(parameter.low, parameter.high, log=True)
            if isinstance(parameter, Range)
            else CategoricalDistribution(parameter.values)
            for key, parameter in self.parameters.items()
        }

    def allows(self, candidate: Candidate) -> bool:
        """Return whether the predictor costs no more than max_gflops."""
        return predictor_gflops(candidate) <= self.max_gflops

    def cheapest_gflops(self) -> float:
        """Return the cost of the cheapest predictor in the space, or infinity if there is none."""
        low = {key: _lowest(parameter) for key, parameter in self.parameters.items() if key in ARCHITECTURE_KEYS}
        if "stem_stride" in low:
            low["stem_stride"] = max(_choices(self.parameters["stem_stride"]))
        choices = _choices(self.parameters["blocks"]) if "blocks" in self.parameters else [None]
        costs = [predictor_gflops(self.candidate(low | ({"blocks": blocks} if blocks else {}))) for blocks in choices]
        return min(costs, default=math.inf)


def space_of(config: Config, backbone_gflops: tuple[float, ...]) -> Space:
    """Return the space of search.preset, with the defaults that depend on the backbone.

    Args:
        backbone_gflops: the backbone's cost at each of model.resolutions.
    """
    stage = config.stages.predictor
    assert stage is not None
    base, settings = Candidate.of(config.model.predictor, stage), config.search.space
    low, high = min(backbone_gflops), max(backbone_gflops)
    alphas = [low + share * (high - low) for share in ALPHA_SHARES]
    defaults: dict[str, Any] = {"alpha_gflops": alphas} | {
        key: (getattr(base, key) / RECIPE_FACTOR, getattr(base, key) * RECIPE_FACTOR) for key in ("eta", "tau", "lr")
    }
    every: dict[str, Choice | Range] = {
        "blocks": Choice(tuple(map(blocks_text, settings.blocks))),
        "kernel": Choice(settings.kernel),
        "stem_stride": Choice(settings.stem_stride),
        "input_size": Choice(settings.input_size),
        "width": Range(*settings.width),
        **{key: Range(*(getattr(settings, key) or defaults[key])) for key in RECIPE_KEYS},
    }
    names = PRESETS[config.search.preset]
    return Space(base, {name: every[name] for name in names}, settings.max_gflops or high - low)


def paper_candidates(config: Config) -> dict[int, Candidate]:
    """Return the paper's four predictors by number, with the input size, width and recipe of the configuration."""
    stage = config.stages.predictor
    assert stage is not None
    plain = {"blocks": None, "kernel": None, "stem_stride": None}
    base = config.model.predictor
    return {
        number: Candidate.of(base.model_copy(update={**plain, "architecture": number}), stage)
        for number in ARCHITECTURES
    }


def input_sizes(config: Config) -> tuple[int, ...]:
    """Return every side of a predictor's input that the search may use, in pixels, largest first."""
    searched = config.search.space.input_size if "input_size" in PRESETS[config.search.preset] else ()
    return tuple(sorted({config.model.predictor.input_size, *searched}, reverse=True))


def space_problems(config: Config, space: Space, backbone_gflops: tuple[float, ...]) -> Iterator[str]:
    """Yield every empty or contradictory part of a space, and every budget that no candidate can reach."""
    contradictions = list(_range_problems(space))
    yield from contradictions
    largest = max(config.model.resolutions)
    if too_large := [side for side in input_sizes(config) if side > largest]:
        yield (
            f"predictor inputs of {too_large} px are larger than the largest of model.resolutions, {largest}, so the "
            "predictor would see more than the backbone; lower search.space.input_size or model.predictor.input_size"
        )
    if contradictions:
        return
    try:
        cheapest = space.cheapest_gflops()
        reachable = min([cheapest, *map(predictor_gflops, paper_candidates(config).values())])
    except ValueError as error:
        yield f"search.space: {error}"
        return
    if space.parameters and cheapest > space.max_gflops:
        yield (
            f"search.space.max_gflops is {space.max_gflops:.4g}, but the cheapest predictor in it costs {cheapest:.4g} "
            "GFLOPs; raise it, or allow smaller widths, input sizes and kernels or larger strides"
        )
    yield from _budget_problems(config, min(backbone_gflops) + reachable, reachable)


def _budget_problems(config: Config, lowest: float, predictor: float) -> Iterator[str]:
    budget = config.search.budget_gflops
    if budget is not None and budget < lowest:
        yield (
            f"search.budget_gflops is {budget:g}, but no candidate costs less than {lowest:.4g} GFLOPs (every image at "
            f"the cheapest resolution, and {predictor:.2g} for the cheapest predictor); raise it"
        )
    if config.search.objective == "budget" and budget is None:
        yield "search.objective is budget, so give search.budget_gflops"


def _range_problems(space: Space) -> Iterator[str]:
    for key, parameter in space.parameters.items():
        name = f"search.space.{key}"
        if isinstance(parameter, Choice) and not parameter.values:
            yield f"{name} is empty; give at least one value"
        elif isinstance(parameter, Choice) and key == "kernel" and any(value % 2 == 0 for value in parameter.values):
            yield f"{name} is {list(parameter.values)}; kernels have odd sides"
        elif isinstance(parameter, Choice) and key == "blocks" and "" in parameter.values:
            yield f"{name} has a choice without a stage; give one to four block counts in each"
        elif isinstance(parameter, Range) and parameter.low > parameter.high:
            yield f"{name} is {parameter}; give the lower value first"
        elif isinstance(parameter, Range) and parameter.low <= 0:
            yield (
                f"{name} is {parameter}, but it is searched on a logarithmic scale; give {name} with values above 0, "
                f"or a stages.predictor.{key} above 0"
            )


def predictor_gflops(candidate: Candidate) -> float:
    """Return the cost of a candidate's predictor for one image, in GFLOPs."""
    return _counted(candidate.shape, candidate.width, candidate.input_size)


@lru_cache(maxsize=4096)
def _counted(shape: PredictorShape, width: float, input_size: int) -> float:
    # The number of resolutions changes only the last layer, by less than the channels of one pixel.
    with torch.device("meta"):
        predictor = build_predictor(shape, 1, width=width)
    return count_macs(predictor, meta_images(input_size)) / 1e9


def blocks_text(blocks: tuple[int, ...]) -> str:
    """Format block counts as samplers and tables use them, such as 1-1."""
    return "-".join(map(str, blocks))


def parse_blocks(text: str) -> tuple[int, ...]:
    """Return the block counts that `blocks_text` formatted."""
    return tuple(map(int, text.split("-")))


def _choices(parameter: Choice | Range) -> tuple[Any, ...]:
    assert isinstance(parameter, Choice)
    return parameter.values


def _lowest(parameter: Choice | Range) -> Any:
    return parameter.low if isinstance(parameter, Range) else min(parameter.values, default=None)


def canonical(value: Any) -> str:
    """Return a text that is equal for equal values, for computing a digest."""
    return json.dumps(value, sort_keys=True)
