"""Read a configuration from a YAML file and dotted overrides, and report all its problems together."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from datasets.files import is_within, value_differences
from datasets.remote import redacted
from pipeline.config.explain import explain, explain_yaml, shown
from pipeline.config.fields import sqlite_path
from pipeline.config.job_package import NOT_IN_PACKAGE, job_package
from pipeline.config.schema import Config, ModelConfig, PredictorStage, RoutedStage, Section, ServingConfig
from pipeline.config.yaml_tree import field_name, field_of, is_optional, is_text, read_yaml, section_of

PROJECT_FOLDER = Path(__file__).resolve().parents[2]
CONFIG_FOLDER = PROJECT_FOLDER / "jobs" / "configs"

# Fields that may change when a run resumes: they decide where it runs and when it stops, not what it computes.
# The last group are paths of inputs. The content of the inputs is compared instead (pipeline/config/run_folder.py).
FREE_TO_CHANGE = (
    "cluster.",
    "tracking.",
    "registry.",
    "search.",
    "policy.",
    "serving.",
    "data.num_processes",
    "loader.num_threads",
    "loader.batches_ahead",
    "training.max_loss",
    "data.folder",
    "data.uri",
    "data.source",
    "data.validation_source",
    "model.weights",
    "stages.backbone.init_from",
    "stages.predictor.init_from",
    "stages.joint.init_from",
)

AnySection = TypeVar("AnySection", bound=Section)


class ConfigError(ValueError):
    """An invalid configuration. The message lists every problem, one per line."""

    def __init__(self, problems: Sequence[str], source: str = "the configuration"):
        self.problems = list(problems)
        self.source, count = source, len(self.problems)
        listing = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{source} has {count} problem{'s' if count > 1 else ''}:\n{listing}")

    def __reduce__(self) -> tuple[Any, ...]:
        return ConfigError, (self.problems, self.source)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration and apply `key.path=value` overrides.

    The value of a text or path field is used literally; `null` clears an optional one. Other values are YAML.

    Args:
        path: a YAML file, or the name of one in jobs/configs without its suffix.
        overrides: texts such as `stages.joint.epochs=2`.

    Raises:
        ConfigError: lists every problem of the file and the overrides.
    """
    file = find_config(path)
    try:
        tree, problems = read_yaml(file.read_text(encoding="utf-8"), Config)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        problem = f"the file is not UTF-8 text (byte 0x{byte:02x} at position {error.start}). Save it as UTF-8"
        raise ConfigError([problem], str(file)) from None
    except yaml.YAMLError as error:
        raise ConfigError([explain_yaml(error)], str(file)) from None
    if not isinstance(tree, dict):
        found = "is empty" if tree is None else f"contains {shown(tree)}"
        raise ConfigError([f"the file {found}. Give keys and values, such as name: my-run"], str(file))
    for override in overrides:
        problems += _apply(tree, override)
    return parse_config(tree, source=str(file), problems=problems)


def load_serving(overrides: Sequence[str]) -> ServingConfig:
    """Read only the section `serving`, from overrides, without a configuration file.

    Raises:
        ConfigError: lists every problem of the overrides.
    """
    tree: dict[str, Any] = {}
    problems = [
        f"override {redacted(override)!r} belongs to a configuration; add --config, or give serving.KEY=VALUE"
        for override in overrides
        if not override.startswith("serving.")
    ]
    if not problems:
        problems += [problem for override in overrides for problem in _apply(tree, override)]
        try:
            found = _ServingAlone.model_validate(tree)
        except ValidationError as error:
            problems += explain(error)
    if problems:
        raise ConfigError(problems, "the command line")
    return found.serving


class _ServingAlone(Section):
    serving: ServingConfig = ServingConfig()


def parse_config(tree: dict[str, Any], source: str = "the configuration", problems: Sequence[str] = ()) -> Config:
    """Turn a mapping into a checked Config, or raise ConfigError with all its problems."""
    found = list(problems)
    config = _validated(tree, source, found)
    found.extend(_contradictions(config))
    if found:
        raise ConfigError(found, source)
    return config


def stored_config(tree: Mapping[str, Any], config: Config, source: str) -> Config:
    """Return the configuration that a run started with, for `drift`.

    Fields in FREE_TO_CHANGE come from `config`, so that a run whose stored values are refused today can still resume.
    """
    ours, stored = config.model_dump(mode="json"), copy.deepcopy(dict(tree))
    for key in FREE_TO_CHANGE:
        *parents, last = key.removesuffix(".").split(".")
        new, old = ours, stored
        for parent in parents:
            new, old = new.get(parent) or {}, old.get(parent) or {}
        if last in new:
            old[last] = new[last]
    return _validated(stored, source, [])


def _validated(tree: Mapping[str, Any], source: str, problems: Sequence[str]) -> Config:
    """Return the configuration of a mapping, or raise ConfigError with `problems` and those of its values."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([*problems, *explain(error)], source) from None


def find_config(path: str | Path) -> Path:
    """Return the YAML file that a `--config` value names: a path, or a name in jobs/configs."""
    try:
        path = Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(["its home folder is unknown. Give the whole path"], f"--config {path}") from None
    for candidate in (path, CONFIG_FOLDER / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(file.stem for file in CONFIG_FOLDER.glob("*.yaml"))
    problems = [f"no such file. Give a path, or one of {', '.join(names)}"]
    if path.is_dir():
        inside = path / "config.yaml"
        problems = [f"this is a folder. Give {inside if inside.is_file() else 'a YAML file'}"]
    if job_package(path.absolute()):
        problems.append(f"{path} {NOT_IN_PACKAGE}")
    raise ConfigError(problems, f"--config {path}")


def with_absolute_paths(section: AnySection) -> AnySection:
    """Return a copy with absolute paths, for processes with another working folder."""
    changes: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            changes[name] = with_absolute_paths(value)
        elif isinstance(value, Path):
            changes[name] = value.absolute()
    if isinstance(section, ModelConfig) and section.weights is not None and Path(section.weights).is_file():
        changes["weights"] = str(Path(section.weights).absolute())  # otherwise a name of published weights
    return section.model_copy(update=changes)


def differences(old: Config, new: Config) -> list[str]:
    """Return `key: old -> new` for every field in which two configurations differ."""
    return value_differences(old.model_dump(mode="json"), new.model_dump(mode="json"))


def drift(started_with: Config, config: Config) -> list[str]:
    """Return the `differences` that keep a run from resuming: all except those in FREE_TO_CHANGE."""
    return [line for line in differences(started_with, config) if not line.startswith(FREE_TO_CHANGE)]


def refuse_changes(changed: Sequence[str], what: str, advice: str, error: type[ValueError] = ValueError) -> None:
    """Raise `error` with `what`, one line for each of `changed`, and `advice`, unless `changed` is empty."""
    if changed:
        raise error("\n".join([f"{what}:", *(f"  - {line}" for line in changed), advice]))


def _contradictions(config: Config) -> Iterator[str]:
    """Yield problems that involve several fields. preflight checks what needs the model's FLOPs or the cluster."""
    resolutions = config.model.resolutions
    if list(resolutions) != sorted(set(resolutions), reverse=True):
        yield f"model.resolutions is {list(resolutions)}. Give different sizes, largest first"
    if not config.stages.present():
        yield "stages is empty. Give at least one of backbone, predictor, joint"
    if len(resolutions) == 1 and (config.stages.predictor or config.stages.joint):
        yield "model.resolutions has only one size, so there is nothing to predict. Remove stages.predictor and joint"
    if config.training.batch_size % config.cluster.num_workers:
        yield (
            f"training.batch_size {config.training.batch_size} does not divide evenly over "
            f"cluster.num_workers {config.cluster.num_workers}. Make it a multiple of that"
        )
    if (config.cluster.min_workers or 1) > config.cluster.num_workers:
        yield (
            f"cluster.min_workers {config.cluster.min_workers} is more than cluster.num_workers "
            f"{config.cluster.num_workers}. Lower it or raise cluster.num_workers"
        )
    for name, low_high in (("crop_scale", config.loader.crop_scale), ("crop_ratio", config.loader.crop_ratio)):
        low, high = low_high
        if not 0 < low <= high or (name == "crop_scale" and high > 1):
            yield f"loader.{name} is [{low}, {high}]. Give 0 < low <= high{' <= 1' if name == 'crop_scale' else ''}"
    if config.data.dataset == "glyphs" and config.data.glyphs.min_height >= config.data.glyphs.max_height:
        yield "data.glyphs.min_height must be smaller than data.glyphs.max_height"
    if config.data.dataset not in ("elpv", "glyphs") and config.data.source is None and not config.data.uri:
        yield f"data.source is missing. {config.data.dataset} needs the folder of its images, or data.uri"
    yield from _place_problems(config)
    shares = config.model.predictor.initial_shares
    if shares is not None and len(shares) != len(resolutions):
        yield (
            f"model.predictor.initial_shares is {list(shares)}. "
            f"Give one for each of model.resolutions {list(resolutions)}"
        )
    backbone = config.stages.backbone
    if backbone and backbone.distillation != "none" and len(resolutions) == 1:
        yield "stages.backbone.distillation needs several model.resolutions. Set it to none"
    if backbone and backbone.resolutions_per_step and backbone.distillation in ("mean", "learned"):
        yield (
            f"stages.backbone.distillation is {backbone.distillation}, whose teacher needs every resolution in every "
            "step. Set stages.backbone.resolutions_per_step=null, or distillation=largest"
        )
    if backbone and backbone.resolutions_per_step == 2 and len(resolutions) > 2:
        yield (
            "stages.backbone.resolutions_per_step is 2, so only the largest and the smallest of model.resolutions "
            f"{list(resolutions)} would train. Give at least 3, or null"
        )
    if backbone and backbone.freeze_epochs > backbone.epochs:
        yield f"stages.backbone.freeze_epochs is {backbone.freeze_epochs:g}. Give at most its epochs, {backbone.epochs}"
    predictor = config.stages.predictor
    if predictor and predictor.objective == "correctness" and config.stages.joint:
        yield (
            "stages.predictor.objective is correctness, but stages.joint trains the predictor's choices with Gumbel "
            "noise. Set stages.joint=null, or objective=gumbel"
        )
    for name, stage in config.stages.present():
        if stage.schedule == "one_cycle" and not stage.warmup_epochs:
            yield (
                f"stages.{name}.schedule is one_cycle, which needs warmup_epochs for its rise. "
                f"Give more than 0, such as {0.3 * stage.epochs:g}"
            )
        if stage.optimizer == "sgd" and stage.nesterov and not stage.momentum:
            yield f"stages.{name}.nesterov needs momentum. Set stages.{name}.momentum above 0, or nesterov=false"
        if stage.warmup_epochs >= stage.epochs:
            yield f"stages.{name}.warmup_epochs {stage.warmup_epochs:g} must be less than epochs {stage.epochs}"
        if isinstance(stage, RoutedStage):
            yield from (f"stages.{name}.{problem}" for problem in _target_problems(stage, config.cost))
        if isinstance(stage, PredictorStage) and stage.num_crops is not None and stage.num_crops > stage.epochs:
            yield f"stages.{name}.num_crops is {stage.num_crops}. Give at most its epochs, {stage.epochs}"


def _place_problems(config: Config) -> Iterator[str]:
    """Yield folders of this project that are inside the folder of the original images."""
    if config.data.dataset in ("elpv", "glyphs"):
        return
    store = sqlite_path(config.tracking.uri or "")
    places = {
        "data.folder": config.data.folder,
        "cluster.storage": config.cluster.storage,
        "search.tables": config.search.tables,
        "search.node_folder": config.search.node_folder,
        "the folder of tracking.uri": store and (PROJECT_FOLDER / store).parent,
    }
    for key in ("source", "validation_source"):
        source = getattr(config.data, key)
        for name, place in places.items():
            if source and place and is_within(Path(place), Path(source)):
                yield (
                    f"{name}, {place}, is inside data.{key} {source}, so its files could be taken for original images. "
                    "Give a folder outside it"
                )


def _target_problems(stage: RoutedStage, cost: str) -> Iterator[str]:
    """Yield targets whose unit is not the run's unit of cost."""
    unit, other = ("gflops", "milliseconds") if cost == "flops" else ("milliseconds", "gflops")
    for key in ("alpha", "alpha_start"):
        if getattr(stage, f"{key}_{other}") is not None:
            yield f"{key}_{other} is given, but cost is {cost}. Give {key}_{unit} instead, or change cost"


def _apply(tree: dict[str, Any], override: str) -> Iterator[str]:
    """Set one `key.path=value` in `tree`, and yield its problems."""
    key, equals, text = override.partition("=")
    prefix = f"override {redacted(override)!r}"
    if not equals or not all(key.split(".")) or key != "".join(key.split()):
        yield f"{prefix} does not have the form key.path=value (without spaces around the =)"
        return
    annotation, value = field_of(Config, key), text
    if is_text(annotation):
        value = None if text == "null" and is_optional(annotation) else text
    elif annotation is not None:  # an unknown key is reported later, whatever its value
        try:
            value, problems = read_yaml(text, annotation)
        except yaml.YAMLError as error:
            yield f"{prefix}: {explain_yaml(error)}"
            return
        yield from (f"{prefix}: {problem}" for problem in problems)
    node, section = tree, Config
    *parents, last = key.split(".")
    for parent in parents:
        inner = node.get(parent)
        node[parent] = dict(inner) if isinstance(inner, dict) else {}  # a copy: a YAML alias shares its section
        node, section = node[parent], section and section_of(field_of(section, parent))
    node[field_name(section, last) if section else last] = value
