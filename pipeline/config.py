"""The one typed configuration tree: YAML file, dotted overrides, every problem reported together.

A configuration is read once, checked as a whole and frozen. Field docstrings are the reference that `--help` and
docs/configuration.md print, so each says meaning and unit.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "jobs" / "configs"

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one problem a line."""

    def __init__(self, problems: Sequence[str], source: str = "the configuration"):
        self.problems = list(problems)
        count = len(self.problems)
        listing = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{source} has {count} problem{'s' if count > 1 else ''}:\n{listing}")


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


AnySection = TypeVar("AnySection", bound=Section)


class GlyphsConfig(Section):
    num_train: Positive = 6000
    """generated training images"""
    num_validation: Positive = 2000
    """generated validation images"""
    image_size: Positive = 128
    """side of a generated image, pixels"""
    min_height: Fraction = 0.09
    """smallest glyph height, as a fraction of the image side"""
    max_height: Fraction = 0.7
    """largest glyph height, as a fraction of the image side"""
    seed: int = 0
    """seed of the generated images; the same seed gives the same files"""


class DataConfig(Section):
    dataset: Literal["imagenet100", "imagefolder", "elpv", "glyphs"]
    """data set by its name in datasets/catalog.py"""
    folder: Path
    """where train.beton, validation.beton and manifest.json are written and read"""
    source: Path | None = None
    """where the images are: the class folders (imagefolder), the ILSVRC2012 tree or folder of tars (imagenet100)"""
    validation_source: Path | None = None
    """class folders for validation (imagefolder); left out, SOURCE/{train,val,validation} or a seeded split is used"""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """share of each class held out for validation where the data set has no validation part"""
    images_per_class: Positive | None = None
    """keep this many training images a class, chosen deterministically; null keeps all"""
    max_side: Positive | None = 500
    """images whose shorter side is longer are resized to it, pixels; null keeps every size"""
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 90
    """quality of images that have to be encoded again"""
    on_bad_image: Literal["error", "skip"] = "error"
    """error: list all unreadable images and write nothing; skip: leave them out and record them in the manifest"""
    num_processes: Positive | None = None
    """processes that prepare images; null is one for each CPU; the result does not depend on it"""
    split_seed: int = 0
    """seed of the split and of the choice of images_per_class"""
    glyphs: GlyphsConfig = GlyphsConfig()
    """settings of the generated data set"""


class LoaderConfig(Section):
    num_threads: Positive | None = None
    """decoding threads of each training worker; null is the worker's CPUs"""
    batches_ahead: Positive = 3
    """batches prepared before they are asked for"""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """range of the training crop's area, as a fraction of the image's"""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """range of the training crop's width / height"""
    flip: bool = True
    """mirror half of the training images"""
    validation_crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """side of the validation's centre crop, as a fraction of the image's shorter side (224 of 256 in the paper)"""


class PredictorConfig(Section):
    architecture: Literal[1, 2, 3, 4] = 3
    """one of the paper's four predictors (supplement, Table 1)"""
    input_size: Annotated[int, Field(ge=16)] = 128
    """side of the predictor's input, pixels"""
    width: Annotated[float, Field(gt=0)] = 1.0
    """multiplies every channel count of the predictor"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """dropout before the predictor's classifier"""


class ModelConfig(Section):
    backbone: str = "resnet50"
    """small_resnet, or any torchvision classification model with BatchNorm2d"""
    backbone_width: Annotated[float, Field(gt=0)] = 1.0
    """multiplies the channel counts of small_resnet; other backbones have one width"""
    weights: str | None = None
    """what the backbone starts from: a state-dict file or the name of a torchvision weights enum; null is random"""
    resolutions: Annotated[tuple[Annotated[int, Field(ge=16)], ...], Field(min_length=1)] = (224, 168, 112)
    """candidate resolutions, pixels, largest first"""
    predictor: PredictorConfig = PredictorConfig()
    """the resolution predictor"""


class Stage(Section):
    epochs: Positive
    """passes over the training images"""
    init_from: Path | None = None
    """start this stage from the model.pt of another run instead of from the stage before"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """optimiser"""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """peak learning rate"""
    momentum: Fraction = 0.9
    """momentum (sgd only)"""
    nesterov: bool = False
    """Nesterov momentum (sgd only)"""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """weight decay"""
    decay_norm_and_bias: bool = True
    """apply the weight decay to batch norm and bias too, as the paper does"""
    schedule: Literal["step", "cosine"] = "step"
    """step: multiply by gamma every step_epochs; cosine: to zero at the end"""
    step_epochs: Positive = 20
    """epochs between two steps (step only)"""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """factor of a step (step only)"""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0
    """epochs of linear warm-up from 0"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """label smoothing of the cross entropy"""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """largest norm of a step's gradient; null does not clip"""


class BackboneStage(Stage):
    """All resolutions of the backbone, their losses summed."""


class RoutedStage(Stage):
    alpha_gflops: Annotated[float, Field(gt=0)]
    """target of the backbone's mean cost over the chosen resolutions, GFLOPs (multiply-adds / 1e9)"""
    eta: Annotated[float, Field(ge=0)] = 0.2
    """weight of the FLOPs regulariser"""
    tau: Annotated[float, Field(gt=0)] = 1.0
    """temperature of the straight-through Gumbel-softmax"""


class PredictorStage(RoutedStage):
    """The predictor alone; the backbone is frozen."""


class JointStage(RoutedStage):
    """Predictor and backbone together."""

    predictor_lr_scale: Annotated[float, Field(gt=0)] = 0.1
    """the predictor's learning rate, as a multiple of lr"""


class StagesConfig(Section):
    backbone: BackboneStage | None = None
    """first stage; null leaves it out"""
    predictor: PredictorStage | None = None
    """second stage; null leaves it out"""
    joint: JointStage | None = None
    """third stage; null leaves it out"""

    def present(self) -> list[tuple[str, BackboneStage | PredictorStage | JointStage]]:
        """The stages that are configured, in the order in which they run."""
        named = [("backbone", self.backbone), ("predictor", self.predictor), ("joint", self.joint)]
        return [(name, stage) for name, stage in named if stage is not None]


class TrainingConfig(Section):
    batch_size: Positive = 256
    """images of one optimiser step, over all workers"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the forward passes under autocast"""
    channels_last: bool = True
    """memory format of activations and convolution weights"""
    compile: bool = False
    """torch.compile the backbone"""
    checkpoint_epochs: Positive = 1
    """epochs between two checkpoints; what is lost at most when a worker dies"""
    evaluate_epochs: Positive = 1
    """epochs between two evaluations; the last epoch of a stage is always evaluated"""


class ClusterConfig(Section):
    num_workers: Positive = 1
    """Ray Train workers"""
    use_gpu: Literal[True, False, "auto"] = "auto"
    """one GPU for each worker; auto is true where the cluster has GPUs"""
    cpus_per_worker: Positive | None = None
    """CPUs of each worker; null shares the cluster's CPUs out evenly"""
    storage: str = "runs"
    """folder, the same on every node, under which each run has its own folder with checkpoints and report"""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """how often a lost worker is replaced before the run fails; -1 is always"""


class TrackingConfig(Section):
    uri: str | None = None
    """MLflow server or store; null is sqlite:///mlflow.db in the project folder (MLFLOW_TRACKING_URI wins)"""
    experiment: str = "drnet"
    """MLflow experiment"""
    system_metrics: bool = True
    """record CPU, memory and GPU use of every node"""


class RegistryConfig(Section):
    name: str = "drnet"
    """name of the registered model"""
    alias: str = "champion"
    """alias that jobs.register sets"""


class Config(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """name of the run: its folder under cluster.storage and its MLflow run"""
    seed: int = 0
    """seed of weights, order, augmentation and Gumbel noise"""
    data: DataConfig
    loader: LoaderConfig = LoaderConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    stages: StagesConfig
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig = RegistryConfig()


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
    raise ConfigError([f"no such file; give a path, or one of {', '.join(names)}"], f"--config {path}")


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
    return section.model_copy(update=changes)


def differences(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every field in which two configurations differ."""
    before, after = dict(flattened(old.model_dump(mode="json"))), dict(flattened(new.model_dump(mode="json")))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]


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
    for name, low_high in (("crop_scale", config.loader.crop_scale), ("crop_ratio", config.loader.crop_ratio)):
        low, high = low_high
        if not 0 < low <= high or (name == "crop_scale" and high > 1):
            yield f"loader.{name} is [{low}, {high}]; give 0 < low <= high{' <= 1' if name == 'crop_scale' else ''}"
    if config.data.dataset == "glyphs" and config.data.glyphs.min_height >= config.data.glyphs.max_height:
        yield "data.glyphs.min_height must be smaller than data.glyphs.max_height"
    if config.data.dataset in ("imagefolder", "imagenet100") and config.data.source is None:
        yield f"data.source is missing; {config.data.dataset} needs the folder that holds its images"
    for name, stage in config.stages.present():
        if stage.warmup_epochs >= stage.epochs:
            yield f"stages.{name}.warmup_epochs {stage.warmup_epochs:g} must be less than epochs {stage.epochs}"


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
        return f"[{', '.join(f'{item:g}' for item in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def flattened(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every value in a tree of mappings."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flattened(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree
