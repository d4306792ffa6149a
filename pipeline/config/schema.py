"""The one typed configuration tree: YAML file, dotted overrides, every problem reported together.

A configuration is read once, checked as a whole and frozen. Field docstrings are the reference that `--help` and
docs/configuration.md print, so each says meaning and unit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_serializer, model_validator
from pydantic_core import PydanticCustomError

from datasets.remote import redacted

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


REGISTERED = "models:/"
"""how the address of a registered model begins"""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


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
    """data set by its name in datasets/sources/catalog.py"""
    folder: Path
    """where train.beton, validation.beton and manifest.json are written and read"""
    uri: Annotated[str | None, Field(repr=False)] = None
    """where a prepared folder lies that every node copies to data.folder once: s3://, gs://, hdfs:// or file://"""
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
    check_images: Literal["data", "header"] = "data"
    """data: decode all of every image to find damage; header: of JPEGs that are kept as they are, only header and end,
    several times faster, and damage inside is found when the image is read for training"""
    on_bad_image: Literal["error", "skip"] = "error"
    """error: list all unreadable images and write nothing; skip: leave them out and record them in the manifest"""
    num_processes: Positive | None = None
    """processes that prepare images; null is one for each CPU; the result does not depend on it"""
    split_seed: int = 0
    """seed of the split and of the choice of images_per_class"""
    glyphs: GlyphsConfig = GlyphsConfig()
    """settings of the generated data set"""

    @field_serializer("uri", when_used="json")
    def _uri_without_secrets(self, uri: str | None) -> str | None:
        """What is kept in files, tracked and compared."""
        return uri and redacted(uri)


class LoaderConfig(Section):
    num_threads: Positive | None = None
    """decoding threads of each training worker; null is the worker's CPUs"""
    batches_ahead: Positive = 3
    """batches prepared before they are asked for"""
    max_damaged: Annotated[int, Field(ge=0)] = 0
    """damaged training images that an epoch shows others in place of, on each worker; one more ends the run"""
    window_pages: Positive | None = None
    """for betons larger than memory: shuffle within windows of this many pages, 8 MB each; null shuffles all images"""
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
    """one of the paper's four predictors (supplement, Table 1), which the next three fields change"""
    blocks: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=4)] | None = None
    """residual blocks of each stage (64, 128, 256, 512 channels), 0 for one convolution; null is the architecture's"""
    kernel: Annotated[int, Field(ge=1)] | None = None
    """side of the stem's kernel, and of convolutions in place of blocks, odd; null is the architecture's, 7"""
    stem_stride: Positive | None = None
    """stride of the stem's convolution; null is the architecture's, 4 in the third and 2 in the others"""
    input_size: Annotated[int, Field(ge=16)] = 128
    """side of the predictor's input, pixels"""
    width: Annotated[float, Field(gt=0)] = 1.0
    """multiplies every channel count of the predictor"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """dropout before the predictor's classifier"""
    initial_shares: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """how often an untrained predictor draws each resolution, in relation to each other; null is about equally often"""


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
    schedule: Literal["step", "cosine", "one_cycle"] = "step"
    """step: multiply by gamma every step_epochs; cosine: to zero at the end; one_cycle: up, then down to nearly zero"""
    step_epochs: Positive = 20
    """epochs between two steps (step only)"""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """factor of a step (step only)"""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0
    """epochs of linear warm-up from 0; with one_cycle of its rise from lr / 25, some 30 % of epochs"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """label smoothing of the cross entropy"""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """largest norm of a step's gradient; null does not clip"""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """evaluate, and end the stage with, the weights' moving average that keeps this share each step; null is off"""


class BackboneStage(Stage):
    """All resolutions of the backbone, their losses summed."""

    distillation: Literal["none", "mean", "learned"] = "none"
    """each resolution also learns from the ensemble of all: the mean of their logits, or a mean with learned weights"""
    distillation_weight: Annotated[float, Field(ge=0)] = 1.0
    """weight of the distillation loss of each resolution, beside its cross entropy"""
    mixup_alpha: Annotated[float, Field(ge=0)] = 0.0
    """mixup: blend pairs of images with shares from Beta(alpha, alpha); 0 is off, with cutmix each step takes one"""
    cutmix_alpha: Annotated[float, Field(ge=0)] = 0.0
    """cutmix: paste a box of another image, its area from Beta(alpha, alpha); 0 is off"""


class RoutedStage(Stage):
    alpha_gflops: Annotated[float, Field(gt=0)] | None = None
    """target of the backbone's mean cost over the chosen resolutions, GFLOPs (multiply-adds / 1e9); for cost: flops"""
    alpha_milliseconds: Annotated[float, Field(gt=0)] | None = None
    """the same target in milliseconds an image; for cost: milliseconds"""
    eta: Annotated[float, Field(ge=0)] = 0.2
    """weight of the cost regulariser"""
    tau: Annotated[float, Field(gt=0)] = 1.0
    """temperature of the straight-through Gumbel-softmax"""
    alpha_start_gflops: Annotated[float, Field(gt=0)] | None = None
    """where alpha starts; it moves linearly to alpha_gflops in anneal_epochs; null is alpha_gflops throughout"""
    alpha_start_milliseconds: Annotated[float, Field(gt=0)] | None = None
    """the same in milliseconds, for alpha_milliseconds"""
    tau_start: Annotated[float, Field(gt=0)] | None = None
    """where tau starts; it moves linearly to tau in anneal_epochs; null is tau throughout"""
    anneal_epochs: Annotated[float, Field(gt=0)] | None = None
    """epochs in which alpha and tau arrive; null is the whole stage"""

    @model_validator(mode="after")
    def _has_a_target(self) -> Self:
        if self.needs_target and self.target is None:
            raise PydanticCustomError("no_target", "")
        return self

    @property
    def needs_target(self) -> bool:
        """Whether the stage cannot train without a target."""
        return True

    @property
    def target(self) -> float | None:
        """The target in the run's unit of cost, where there is one."""
        return self.alpha_milliseconds if self.alpha_gflops is None else self.alpha_gflops

    @property
    def alpha(self) -> float:
        """The target of a stage that has one."""
        assert self.target is not None
        return self.target

    @property
    def alpha_start(self) -> float | None:
        """Where alpha starts, in the run's unit of cost."""
        return self.alpha_start_milliseconds if self.alpha_gflops is None else self.alpha_start_gflops


class PredictorStage(RoutedStage):
    """The predictor alone; the backbone is frozen."""

    objective: Literal["gumbel", "correctness"] = "gumbel"
    """gumbel: choices with Gumbel noise, as the paper trains; correctness: how probably each resolution is right, from
    which a budget chooses afterwards: alpha is optional, eta and tau are not used, and no stages.joint may follow"""
    logits: Literal["table", "live"] = "table"
    """table: the frozen backbone's logits are computed once and kept as float16; live: it runs in every step"""
    num_crops: Positive | None = Field(None, validation_alias=AliasChoices("num_crops", "views"))
    """random crops of each image, which the epochs take in turn, so that a table costs less; null is one every epoch"""

    @property
    def needs_target(self) -> bool:
        """Whether the stage cannot train without a target."""
        return self.objective == "gumbel"


class JointStage(RoutedStage):
    """Predictor and backbone together."""

    predictor_lr_scale: Annotated[float, Field(gt=0)] = 0.1
    """the predictor's learning rate, as a multiple of lr"""
    norm_statistics: Literal["frozen", "all", "routed"] = "frozen"
    """the backbone's batch norm statistics: frozen keeps them; all updates them from every image at every resolution,
    for one more forward pass; routed updates them from the images that chose the resolution, as the paper does"""


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
    accumulate: Positive = 1
    """slices in which a worker runs its part of a batch, to hold the activations of one; batch norm sees a slice"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the forward passes under autocast"""
    channels_last: bool = True
    """memory format of activations and convolution weights"""
    compile: bool = False
    """torch.compile the backbone"""
    sync_batch_norm: bool = False
    """batch norm statistics over the images of all workers, for batches that are small on each"""
    checkpoint_epochs: Positive = 1
    """epochs between two checkpoints; the last epoch of a stage always has one"""
    checkpoint_steps: Positive | None = None
    """steps between two checkpoints within an epoch, besides those at ends of epochs; null has none"""
    evaluate_epochs: Positive = 1
    """epochs between two evaluations; the last epoch of a stage is always evaluated"""
    max_loss: Annotated[float, Field(gt=0)] | None = 1000.0
    """a step whose mean loss is larger ends the run as diverged; null allows every finite loss"""


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
    min_workers: Positive | None = None
    """go on with as few workers as this when nodes are lost, and with num_workers when there are nodes again; null is
    num_workers"""
    hang_seconds: Positive = 120
    """a worker that does not answer for so long is taken for lost and replaced, seconds"""


class TrackingConfig(Section):
    uri: Annotated[str | None, Field(repr=False)] = None
    """MLflow server or store; null is mlflow.db in the project folder, or in cluster.storage for a job of
    Ray's job server (MLFLOW_TRACKING_URI wins)"""
    experiment: str = "drnet"
    """MLflow experiment"""
    system_metrics: bool = True
    """record CPU, memory and GPU use of every node"""

    @field_serializer("uri", when_used="json")
    def _uri_without_secrets(self, uri: str | None) -> str | None:
        """What is kept in files, tracked and compared."""
        return uri and redacted(uri)


class RegistryConfig(Section):
    name: str = "drnet"
    """name of the registered model"""
    alias: str = "champion"
    """alias that jobs.register sets"""


Span = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


class SpaceConfig(Section):
    blocks: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...] = ((0,), (1,), (1, 1), (2, 2), (1, 1, 1), (1, 1, 1, 1))
    """choices of model.predictor.blocks"""
    kernel: tuple[Positive, ...] = (3, 5, 7)
    """choices of model.predictor.kernel"""
    stem_stride: tuple[Positive, ...] = (2, 4)
    """choices of model.predictor.stem_stride"""
    input_size: tuple[Annotated[int, Field(ge=16)], ...] = (64, 96, 128, 160)
    """choices of model.predictor.input_size, pixels, none above the largest of model.resolutions"""
    width: Span = (0.25, 1.0)
    """lowest and highest model.predictor.width, tried in steps of 1/16"""
    max_gflops: Annotated[float, Field(gt=0)] | None = None
    """predictors that cost more are not tried; null is what the cheapest resolution saves against the dearest"""
    alpha_gflops: Span | None = None
    """lowest and highest alpha_gflops; null is 15 to 85 % of the way from the cheapest to the dearest resolution"""
    eta: Span | None = None
    """lowest and highest eta; null is a third of stages.predictor.eta to three times it"""
    tau: Span | None = None
    """lowest and highest tau; null is a third of stages.predictor.tau to three times it"""
    lr: Span | None = None
    """lowest and highest lr; null is a third of stages.predictor.lr to three times it"""


class SearchConfig(Section):
    """What jobs.tune does: predictors are trained as stages.predictor says, the best as stages.joint does."""

    backbone: str | None = None
    """the trained backbone: a run's folder, a model.pt, a checkpoint or models:/NAME@ALIAS; null is this run's model"""
    tables: Path | None = None
    """folder with the backbone's logit tables, computed before; null computes them in the search's folder"""
    preset: Literal["paper", "size", "full"] = "size"
    """paper: the four of the paper alone; size: the predictor's family too; full: and alpha, eta, tau and lr as well"""
    space: SpaceConfig = SpaceConfig()
    """what is tried"""
    num_trials: Positive = 40
    """candidates that are tried besides the paper's four"""
    epochs: Positive | None = None
    """epochs of a trial, and at most as many num_crops; null is stages.predictor.epochs"""
    objective: Literal["front", "budget"] = "front"
    """front: accuracy and total GFLOPs (Optuna's multi-objective TPE); budget: accuracy at budget_gflops (with ASHA)"""
    budget_gflops: Annotated[float, Field(gt=0)] | None = None
    """choose the most accurate whose mean cost, predictor included, is at most this, GFLOPs"""
    max_accuracy_drop: Annotated[float, Field(ge=0)] | None = None
    """choose the cheapest that is at most so many points less accurate than the best static resolution"""
    finalists: Positive = 4
    """candidates of the front that are trained with every seed, as the paper's four are"""
    seeds: Positive = 3
    """seeds of each of them"""
    finetuned: Annotated[int, Field(ge=0)] = 2
    """finalists that are trained on with their backbone by stages.joint, and evaluated in full"""
    grace_epochs: Positive = 1
    """epochs before ASHA may stop a trial (objective=budget only)"""
    cpus_per_trial: Positive = 1
    """CPUs of each trial"""
    gpus_per_trial: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    """share of a GPU of each trial; auto is a quarter where the cluster has GPUs"""
    max_concurrent: Positive | None = None
    """trials at once; null is as many as the cluster holds"""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """how often a trial whose process died is tried again"""
    cache_gb: Annotated[float, Field(ge=0)] = 8.0
    """predictor inputs are decoded once a node where they take no more, GB; otherwise by every trial"""
    node_folder: Path | None = None
    """folder on each node's own disk for copies of the logit tables and for decoded inputs; null is the search's"""


class Config(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """name of the run: its folder under cluster.storage and its MLflow run"""
    seed: int = 0
    """seed of weights, order, augmentation and Gumbel noise"""
    cost: Literal["flops", "milliseconds"] = "flops"
    """what an image's cost is, for the stages' target and in the report: multiply-adds, or milliseconds measured once,
    before training, on the device that trains"""
    cost_batch_size: Positive = 64
    """images at once when milliseconds are measured"""
    data: DataConfig
    loader: LoaderConfig = LoaderConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    stages: StagesConfig
    search: SearchConfig = SearchConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig = RegistryConfig()
