"""Reading a configuration: YAML file, dotted overrides, every problem reported together; and what is said about it."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import ValidationError

from pipeline.config.job_package import NOT_IN_PACKAGE, job_package
from pipeline.config.schema import Config, ModelConfig, PredictorStage, RoutedStage, Section

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "jobs" / "configs"

# Fields that may change between the sittings of one run: where it runs and when it gives up, not what it computes.
FREE_TO_CHANGE = (
    "cluster.",
    "tracking.",
    "registry.",
    "search.",
    "data.num_processes",
    "loader.num_threads",
    "loader.batches_ahead",
    "training.max_loss",
)

AnySection = TypeVar("AnySection", bound=Section)


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one problem a line."""

    def __init__(self, problems: Sequence[str], source: str = "the configuration"):
        self.problems = list(problems)
        self.source, count = source, len(self.problems)
        listing = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{source} has {count} problem{'s' if count > 1 else ''}:\n{listing}")

    def __reduce__(self) -> tuple[Any, ...]:
        return ConfigError, (self.problems, self.source)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration and apply `key.path=value` overrides (values are YAML).

    Args:
        path: a YAML file, or the name of one in jobs/configs without its ending.
        overrides: such as `stages.joint.epochs=2`.

    Raises:
        ConfigError: with every problem of the file and the overrides together.
    """
    file = find_config(path)
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"not YAML: {error}"], str(file)) from None
    if not isinstance(tree, dict):
        raise ConfigError([f"the file holds {type(tree).__name__}, not a mapping of keys to values"], str(file))
    problems = [problem for override in overrides for problem in _apply(tree, override)]
    return parse_config(tree, source=str(file), problems=problems)


def parse_config(tree: dict[str, Any], source: str = "the configuration", problems: Sequence[str] = ()) -> Config:
    """Turn a mapping into a checked Config; raises ConfigError with every problem together."""
    found = list(problems)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        found.extend(_explain(item) for item in error.errors())
        raise ConfigError(found, source) from None
    found.extend(_contradictions(config))
    if found:
        raise ConfigError(found, source)
    return config


def find_config(path: str | Path) -> Path:
    """The YAML file that a `--config` value names: a path, or a name in jobs/configs."""
    for candidate in (Path(path), CONFIG_FOLDER / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(file.stem for file in CONFIG_FOLDER.glob("*.yaml"))
    problems = [f"no such file; give a path, or one of {', '.join(names)}"]
    if job_package(Path(path).absolute()):
        problems.append(f"a file {NOT_IN_PACKAGE}")
    raise ConfigError(problems, f"--config {path}")


def describe_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted key, type, default, meaning) of every field, for --help and the reference."""
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from describe_fields(inner, f"{prefix}{name}.")
            continue
        default = "(required)" if field.is_required() else _plain(field.get_default())
        yield f"{prefix}{name}", _type_name(field.annotation), default, field.description or ""


def with_absolute_paths(section: AnySection) -> AnySection:
    """The same configuration for processes with other working folders: every path made absolute from this one."""
    changes: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            changes[name] = with_absolute_paths(value)
        elif isinstance(value, Path):
            changes[name] = value.absolute()
    if isinstance(section, ModelConfig) and section.weights is not None and Path(section.weights).is_file():
        changes["weights"] = str(Path(section.weights).absolute())  # else it is the name of published ones
    return section.model_copy(update=changes)


def differences(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every field in which two configurations differ."""
    before, after = dict(flattened(old.model_dump(mode="json"))), dict(flattened(new.model_dump(mode="json")))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]


def drift(began_with: Config, config: Config) -> list[str]:
    """`differences` that a run must not have between two sittings: all but those in fields that are FREE_TO_CHANGE."""
    return [line for line in differences(began_with, config) if not line.startswith(FREE_TO_CHANGE)]


def _contradictions(config: Config) -> Iterator[str]:
    """Problems that involve several fields. What needs the model's FLOPs or the cluster is checked by preflight."""
    resolutions = config.model.resolutions
    if list(resolutions) != sorted(set(resolutions), reverse=True):
        yield f"model.resolutions is {list(resolutions)}; give different sizes, largest first"
    if not config.stages.present():
        yield "stages names no stage; give at least one of backbone, predictor, joint"
    if len(resolutions) == 1 and (config.stages.predictor or config.stages.joint):
        yield "model.resolutions has one size, so there is nothing to predict; leave out stages.predictor and joint"
    if config.training.batch_size % config.cluster.num_workers:
        yield (
            f"training.batch_size {config.training.batch_size} cannot be shared out evenly over "
            f"cluster.num_workers {config.cluster.num_workers}; make it a multiple"
        )
    if (config.cluster.min_workers or 1) > config.cluster.num_workers:
        yield (
            f"cluster.min_workers {config.cluster.min_workers} is more than cluster.num_workers "
            f"{config.cluster.num_workers}; give at most as many"
        )
    for name, low_high in (("crop_scale", config.loader.crop_scale), ("crop_ratio", config.loader.crop_ratio)):
        low, high = low_high
        if not 0 < low <= high or (name == "crop_scale" and high > 1):
            yield f"loader.{name} is [{low}, {high}]; give 0 < low <= high{' <= 1' if name == 'crop_scale' else ''}"
    if config.data.dataset == "glyphs" and config.data.glyphs.min_height >= config.data.glyphs.max_height:
        yield "data.glyphs.min_height must be smaller than data.glyphs.max_height"
    if config.data.dataset in ("imagefolder", "imagenet100") and config.data.source is None and not config.data.uri:
        yield f"data.source is missing; {config.data.dataset} needs the folder that holds its images, or a data.uri"
    shares = config.model.predictor.initial_shares
    if shares is not None and len(shares) != len(resolutions):
        yield (
            f"model.predictor.initial_shares is {list(shares)}; "
            f"give one for each of model.resolutions {list(resolutions)}"
        )
    backbone = config.stages.backbone
    if backbone and backbone.distillation != "none" and len(resolutions) == 1:
        yield "stages.backbone.distillation needs several model.resolutions to learn from; set it to none"
    predictor = config.stages.predictor
    if predictor and predictor.objective == "correctness" and config.stages.joint:
        yield (
            "stages.predictor.objective is correctness, but stages.joint trains the predictor's choices with Gumbel "
            "noise; set stages.joint=null, or objective=gumbel"
        )
    for name, stage in config.stages.present():
        if stage.schedule == "one_cycle" and not stage.warmup_epochs:
            yield (
                f"stages.{name}.schedule is one_cycle, which rises for warmup_epochs; "
                f"give more than 0, such as {0.3 * stage.epochs:g}"
            )
        if stage.optimizer == "sgd" and stage.nesterov and not stage.momentum:
            yield f"stages.{name}.nesterov needs a momentum; set stages.{name}.momentum above 0, or nesterov=false"
        if stage.warmup_epochs >= stage.epochs:
            yield f"stages.{name}.warmup_epochs {stage.warmup_epochs:g} must be less than epochs {stage.epochs}"
        if isinstance(stage, RoutedStage):
            yield from (f"stages.{name}.{problem}" for problem in _target_problems(stage, config.cost))
        if isinstance(stage, PredictorStage) and stage.num_crops is not None and stage.num_crops > stage.epochs:
            yield f"stages.{name}.num_crops is {stage.num_crops}; give at most its epochs, {stage.epochs}"


def _target_problems(stage: RoutedStage, cost: str) -> Iterator[str]:
    """Targets in another unit than the run's cost."""
    unit, other = ("gflops", "milliseconds") if cost == "flops" else ("milliseconds", "gflops")
    for key in ("alpha", "alpha_start"):
        if getattr(stage, f"{key}_{other}") is not None:
            yield f"{key}_{other} is given, but cost is {cost}; give {key}_{unit} instead, or change cost"


def _apply(tree: dict[str, Any], override: str) -> Iterator[str]:
    """Set one `key.path=value` in `tree`; yields what is wrong with it."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        yield f"override {override!r} is not of the form key.path=value"
        return
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        yield f"override {override!r}: the value is not YAML"
        return
    *parents, last = key.strip().split(".")
    node = tree
    for parent in parents:
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
        node = node[parent]
    node[last] = value


def _explain(item: Any) -> str:
    """One pydantic error in the words of our users: what was given, what is allowed."""
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        valid = [name for name, *_ in describe_fields()]
        sections = sorted({name.rsplit(".", depth)[0] for name in valid for depth in range(1, 1 + name.count("."))})
        near = difflib.get_close_matches(key, valid + sections, n=3, cutoff=0.5)
        section = key[: key.rfind(".") + 1]
        siblings = sorted({name[len(section) :].split(".")[0] for name in valid if name.startswith(section)})
        hint = f"did you mean {' or '.join(near)}?" if near else f"allowed there: {', '.join(siblings)}"
        return f"{key} is not a known key; {hint}"
    if item["type"] == "missing":
        return f"{key} is missing"
    if item["type"] == "no_target":
        return f"{key}.alpha_gflops is missing (alpha_milliseconds where cost is milliseconds)"
    return f"{key} is {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _section_of(annotation: Any) -> type[Section] | None:
    """The Section class in `annotation`, also when it is optional."""
    choices = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    for choice in (annotation, *choices):
        if isinstance(choice, type) and issubclass(choice, Section):
            return choice
    return None


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_name(args[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join("null" if arg is type(None) else _type_name(arg) for arg in args)
    if origin is Literal:
        return " | ".join(_plain(arg) for arg in args)
    if origin is tuple:
        return f"list of {_type_name(args[0])}"
    return getattr(annotation, "__name__", str(annotation)).replace("Path", "path")


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def flattened(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every value in a tree of mappings."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flattened(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree
