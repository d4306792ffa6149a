"""The typed configuration of a run.

A configuration is read once, checked as a whole and frozen. `--help` and docs/configuration.md print the field
docstrings, so each field's docstring says its meaning and unit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_serializer, model_validator
from pydantic_core import PydanticCustomError

from datasets.remote import redacted
from pipeline.config.fields import (
    Fraction,
    LocalPath,
    ModelAlias,
    ModelName,
    PathOrName,
    Positive,
    PositiveFloat,
    RegularExpression,
    RunName,
    Text,
)


class Section(BaseModel):
    """A part of the configuration. It is immutable, and unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class GlyphsConfig(Section):
    """Settings of the generated images."""

    num_train: Positive = 6000
    """Number of training images to generate."""
    num_validation: Positive = 2000
    """Number of validation images to generate."""
    image_size: Positive = 128
    """Side of a generated image, in pixels."""
    min_height: Annotated[float, Field(gt=0, le=1)] = 0.09
    """Smallest glyph height, as a fraction of the image side."""
    max_height: Fraction = 0.7
    """Largest glyph height, as a fraction of the image side."""
    seed: int = 0
    """Seed of the generated images. The same seed gives the same files."""


class DataConfig(Section):
    """The data set: where its images come from, and how they are prepared."""

    dataset: Literal[
        "imagenet100",
        "imagefolder",
        "elpv",
        "glyphs",
        "torchvision/Country211",
        "torchvision/DTD",
        "torchvision/EuroSAT",
        "torchvision/FGVCAircraft",
        "torchvision/Flowers102",
        "torchvision/Food101",
        "torchvision/GTSRB",
        "torchvision/Imagenette",
        "torchvision/OxfordIIITPet",
        "torchvision/RenderedSST2",
        "torchvision/StanfordCars",
        "torchvision/SUN397",
    ]
    """Name of the data set in datasets/sources/catalog.py."""
    folder: LocalPath
    """Folder of the prepared data: train.beton, validation.beton and manifest.json."""
    uri: Annotated[Text | None, Field(repr=False)] = None
    """Address of prepared data (s3://, gs://, hdfs:// or file://). Each node downloads it to data.folder once."""
    source: LocalPath | None = None
    """Original images: a folder of class folders, or of Parquet or WebDataset shards, or a CSV file (imagefolder); the
    ILSVRC2012 tree, its tars, or shards (imagenet100); the folder that torchvision's data set takes as root."""
    validation_source: LocalPath | None = None
    """Folder of validation images, laid out as source (imagefolder, and shards of imagenet100). null uses the
    validation images of source, or else a seeded split."""
    label_column: Text | None = None
    """Column (Parquet, CSV) or key (.json of WebDataset) of the labels. null uses the
    column label or, in Parquet without it, the only column with class names."""
    group_by: RegularExpression | None = None
    """Groups of images, such as the frames of a scene, that stay together in every split: a column (Parquet, CSV), a
    key (.json), or a regular expression that is searched in the image's name. Its first group names the group of
    images; without a group in the expression, the whole match does. null splits images independently."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Fraction of each class held out for validation when the data set has no validation images."""
    images_per_class: Positive | None = None
    """Number of training images to keep in each class, chosen deterministically. null keeps all."""
    max_side: Positive | None = 500
    """Maximum length of an image's shorter side, in pixels. Larger images are shrunk to it; null keeps every size."""
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 90
    """JPEG quality of images that must be encoded again."""
    check_images: Literal["data", "header"] = "data"
    """How to look for damage. data: decode every image completely. header: check only the header and the end of JPEGs
    that are kept unchanged; several times faster, but damage inside a file is found only in training."""
    on_bad_image: Literal["error", "skip"] = "error"
    """error: list all unreadable images and write nothing. skip: leave them out and list them in the manifest."""
    num_processes: Positive | None = None
    """Number of processes that prepare images. null is one per CPU. It does not change the result."""
    split_seed: int = 0
    """Seed of the validation split and of the choice of images_per_class."""
    glyphs: GlyphsConfig = GlyphsConfig()
    """Settings of the generated data set."""

    @field_serializer("uri", when_used="json")
    def _uri_without_secrets(self, uri: str | None) -> str | None:
        """Return the address without secrets, for files, tracking and comparisons."""
        return uri and redacted(uri)


class LoaderConfig(Section):
    """How training and validation images are loaded and cropped."""

    num_threads: Positive | None = None
    """Number of decoding threads per worker. null is one for each of the worker's CPUs."""
    batches_ahead: Positive = 3
    """Number of batches to prepare ahead of training."""
    max_damaged: Annotated[int, Field(ge=0)] = 0
    """Number of damaged training images that each worker may replace by others in an epoch. One more ends the run."""
    window_pages: Positive | None = None
    """Shuffle within windows of this many pages of 8 MiB, for betons larger than memory. null shuffles all images."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of the training crop's area, as a fraction of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the training crop's width / height."""
    flip: bool = True
    """Mirror half of the training images."""
    validation_crop: Annotated[float, Field(gt=0, le=1)] | None = None
    """Side of the center crop in validation, as a fraction of the image's shorter side. null is the value that
    model.weights were evaluated with, or 0.875 without such weights (224 of 256 in the paper)."""


class PredictorConfig(Section):
    """The architecture of the resolution predictor."""

    architecture: Literal[1, 2, 3, 4] = 3
    """Number of the paper's predictor (supplement, Table 1). blocks, kernel and stem_stride change parts of it."""
    blocks: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=4)] | None = None
    """Residual blocks per stage (64, 128, 256, 512 channels); 0 is one convolution. null keeps the architecture's."""
    kernel: Annotated[int, Field(ge=1)] | None = None
    """Kernel size of the stem, and of a convolution that replaces blocks; odd. null keeps the architecture's, 7."""
    stem_stride: Positive | None = None
    """Stride of the stem's convolution. null keeps the architecture's: 4 in the third, 2 in the others."""
    input_size: Annotated[int, Field(ge=16)] = 128
    """Side of the predictor's input, in pixels."""
    width: Annotated[float, Field(gt=0)] = 1.0
    """Factor on every channel count of the predictor."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Dropout before the predictor's classifier."""
    initial_shares: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Relative frequency with which an untrained predictor draws each resolution. null makes all about equal."""


Mean = tuple[Fraction, Fraction, Fraction]
Deviation = tuple[PositiveFloat, PositiveFloat, PositiveFloat]


class ModelConfig(Section):
    """The network: backbone, candidate resolutions and predictor."""

    backbone: Text = "resnet50"
    """small_resnet, a torchvision classification model, or timm/NAME. It must take images of several sizes."""
    backbone_width: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the channel counts of small_resnet. Other backbones have a fixed width."""
    weights: PathOrName | None = None
    """Initial weights of the backbone: a state-dict file (.pth, .safetensors), pretrained (the default of timm or
    torchvision), a timm tag, the name of a torchvision weights enum, or package:NAME. null is random."""
    private_norms: Literal["auto", "batch_norm", "all", "none"] = "auto"
    """Norms with a copy for each resolution. auto: batch_norm if the backbone has any, otherwise all. none: all layers
    are shared, so running statistics mix resolutions and match none of them; for comparisons only."""
    normalization: Literal["auto", "weights", "data"] | tuple[Mean, Deviation] = "auto"
    """Mean and standard deviation that normalize the input. weights: those that model.weights were trained with. data:
    those of the training images. auto: weights if they have such values, otherwise data. Or [mean, std], with three
    values of 0 to 1 each. A stage with init_from keeps its model's values."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout before the backbone's classifier. null keeps the backbone's default."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Probability of skipping the last block of the backbone, lower in earlier blocks. null keeps the backbone's
    default."""
    resolutions: Annotated[tuple[Annotated[int, Field(ge=16)], ...], Field(min_length=1)] = (224, 168, 112)
    """Candidate resolutions in pixels, largest first."""
    predictor: PredictorConfig = PredictorConfig()
    """Settings of the resolution predictor."""


class Stage(Section):
    """Settings that all stages have."""

    epochs: Positive
    """Number of passes over the training images."""
    init_from: LocalPath | None = None
    """File model.pt of another run to start this stage from. null starts from the previous stage."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimizer of the stage."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """Peak learning rate."""
    momentum: Fraction = 0.9
    """Momentum (sgd only)."""
    nesterov: bool = False
    """Use Nesterov momentum (sgd only)."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Weight decay."""
    decay_norm_and_bias: bool = True
    """Apply weight decay to batch norm and bias too, as the paper does."""
    schedule: Literal["step", "cosine", "one_cycle"] = "step"
    """step: multiply by gamma every step_epochs. cosine: fall to zero. one_cycle: rise, then fall nearly to zero."""
    step_epochs: Positive = 20
    """Epochs between two steps (step only)."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor of each step (step only)."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0
    """Epochs of linear warm-up from 0. For one_cycle, epochs of the rise from lr / 25, usually 30 % of epochs."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of the cross entropy."""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of a step's gradient. null does not clip."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of a moving average of the weights, which is evaluated and becomes the stage's result. null is
    off."""


class LayerRates(Section):
    """Learning rates of a backbone's layers relative to each other."""

    head_lr_scale: PositiveFloat = 1.0
    """Learning rate of the backbone's classifier, as a multiple of lr. A value above 1 lets a new classifier learn
    faster."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor between the learning rates of a group of layers and of the group below it. timm defines the groups."""


class BackboneStage(LayerRates, Stage):
    """Train the backbone at all resolutions, with the sum of their losses."""

    freeze_epochs: Annotated[float, Field(ge=0)] = 0
    """Epochs at the start of the stage that train only the classifier; batch norms keep their statistics."""
    freeze_layers: Annotated[int, Field(ge=0)] = 0
    """Number of timm's layer groups, starting at the input, with fixed weights. Batch norms still update statistics."""
    resolutions_per_step: Annotated[int, Field(ge=2)] | None = None
    """Number of resolutions that a step trains: the largest, the smallest, and the others in turn. null trains all."""
    distillation: Literal["none", "largest", "mean", "learned"] = "none"
    """largest: also train the smaller resolutions on the answers of the largest. mean, learned: also train all
    resolutions on the mean of all logits, with equal or with learned weights."""
    distillation_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of each resolution's distillation loss, relative to its cross entropy."""
    mixup_alpha: Annotated[float, Field(ge=0)] = 0.0
    """mixup: blend pairs of images by a share from Beta(alpha, alpha). 0 is off. With cutmix, each step picks one."""
    cutmix_alpha: Annotated[float, Field(ge=0)] = 0.0
    """cutmix: paste a box from another image, its area from Beta(alpha, alpha). 0 is off."""


class RoutedStage(Stage):
    """Settings of the stages that train a predictor."""

    alpha_gflops: Annotated[float, Field(gt=0)] | None = None
    """Target for the backbone's mean cost at the chosen resolutions, in GFLOPs (multiply-adds / 1e9). It is used with
    cost=flops."""
    alpha_milliseconds: Annotated[float, Field(gt=0)] | None = None
    """Target for the backbone's mean cost at the chosen resolutions, in milliseconds per image. It is used with
    cost=milliseconds."""
    eta: Annotated[float, Field(ge=0)] = 0.2
    """Weight of the cost regularizer."""
    tau: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the straight-through Gumbel-softmax."""
    alpha_start_gflops: Annotated[float, Field(gt=0)] | None = None
    """First value of alpha, which moves linearly to alpha_gflops in anneal_epochs. null is alpha_gflops throughout."""
    alpha_start_milliseconds: Annotated[float, Field(gt=0)] | None = None
    """First value of alpha in milliseconds, which moves linearly to alpha_milliseconds in anneal_epochs. null is
    alpha_milliseconds throughout."""
    tau_start: Annotated[float, Field(gt=0)] | None = None
    """First value of tau, which moves linearly to tau in anneal_epochs. null is tau throughout."""
    anneal_epochs: Annotated[float, Field(gt=0)] | None = None
    """Epochs until alpha and tau reach their final values. null is the whole stage."""

    @model_validator(mode="after")
    def _has_a_target(self) -> Self:
        if self.needs_target and self.target is None:
            raise PydanticCustomError("no_target", "")
        return self

    @property
    def needs_target(self) -> bool:
        """Return whether the stage cannot train without a target."""
        return True

    @property
    def target(self) -> float | None:
        """The target in the run's unit of cost, or None."""
        return self.alpha_milliseconds if self.alpha_gflops is None else self.alpha_gflops

    @property
    def alpha(self) -> float:
        """The target of a stage that has one."""
        assert self.target is not None
        return self.target

    @property
    def alpha_start(self) -> float | None:
        """The first value of alpha, in the run's unit of cost."""
        return self.alpha_start_milliseconds if self.alpha_gflops is None else self.alpha_start_gflops


class PredictorStage(RoutedStage):
    """Train only the predictor; the backbone is frozen."""

    objective: Literal["gumbel", "correctness"] = "gumbel"
    """gumbel: learn choices with Gumbel noise, as in the paper. correctness: learn how likely each resolution is
    correct; a budget then chooses after training. alpha is optional, eta and tau are not used, and stages.joint must be
    null."""
    logits: Literal["table", "live"] = "table"
    """table: compute the frozen backbone's logits once and store them as float16. live: run the backbone every step."""
    num_crops: Positive | None = Field(None, validation_alias=AliasChoices("num_crops", "views"))
    """Number of random crops of each image, used by the epochs in turn; fewer make a smaller table. null is epochs."""

    @property
    def needs_target(self) -> bool:
        """Return whether the stage cannot train without a target."""
        return self.objective == "gumbel"


class JointStage(LayerRates, RoutedStage):
    """Train predictor and backbone together."""

    predictor_lr_scale: Annotated[float, Field(gt=0)] = 0.1
    """Learning rate of the predictor, as a multiple of lr."""
    norm_statistics: Literal["frozen", "all", "routed"] = "frozen"
    """Batch norm statistics of the backbone. frozen keeps them. all updates them from every image at every resolution,
    for one more forward pass. routed updates them from the images that chose the resolution, as in the paper."""


class StagesConfig(Section):
    """The stages to train, in this order."""

    backbone: BackboneStage | None = None
    """First stage. null leaves it out."""
    predictor: PredictorStage | None = None
    """Second stage. null leaves it out."""
    joint: JointStage | None = None
    """Third stage. null leaves it out."""

    def present(self) -> list[tuple[str, BackboneStage | PredictorStage | JointStage]]:
        """Return the configured stages in the order in which they run."""
        named = [("backbone", self.backbone), ("predictor", self.predictor), ("joint", self.joint)]
        return [(name, stage) for name, stage in named if stage is not None]


class TrainingConfig(Section):
    """Settings of the training loop that are the same in all stages."""

    batch_size: Positive = 256
    """Number of images in one optimizer step, over all workers."""
    accumulate: Positive = 1
    """Number of slices in which a worker runs its part of a batch, to save memory. Batch norm sees one slice."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Precision of the forward passes. bfloat16 uses autocast. auto is bfloat16 if every worker's device (a GPU, or the
    CPU without one) computes bfloat16 natively. The choice is made once and stored in the run's precision.json."""
    channels_last: bool = True
    """Store activations and convolution weights in the channels_last memory format."""
    compile: bool = False
    """Compile the backbone with torch.compile."""
    backward: Literal["apart", "together"] = "apart"
    """Backward passes of the backbone stage. apart: one for each resolution, which keeps the activations of one at a
    time. together: one for all, which overlaps more of the communication but keeps the activations of all."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the gradients that workers send. bfloat16 halves the bytes; sums over workers are float32."""
    sync_batch_norm: bool = False
    """Compute batch-norm statistics over the images of all workers, for small batches on each."""
    checkpoint_epochs: Positive = 1
    """Epochs between two checkpoints. The last epoch of a stage always has one."""
    checkpoint_steps: Positive | None = None
    """Steps between two checkpoints within an epoch, in addition to those between epochs. null writes none."""
    evaluate_epochs: Positive = 1
    """Epochs between two evaluations. The last epoch of a stage is always evaluated."""
    max_loss: Annotated[float, Field(gt=0)] | None = 1000.0
    """Largest allowed mean loss of a step; a larger one ends the run as diverged. null allows every finite loss."""


class ClusterConfig(Section):
    """The Ray workers, their resources and the storage that they share."""

    num_workers: Positive = 1
    """Number of Ray Train workers."""
    use_gpu: Literal[True, False, "auto"] = "auto"
    """Give each worker one GPU. auto means true if any node has a GPU; then every worker needs one."""
    cpus_per_worker: Positive | None = None
    """CPUs for each worker. null divides the cluster's CPUs evenly."""
    storage: LocalPath = Path("runs")
    """Folder that contains the folder of each run, with its checkpoints and report. All nodes must share it."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """How many times failed workers are restarted before the run fails. -1 is no limit."""
    min_workers: Positive | None = None
    """Smallest number of workers to continue with when nodes are lost. When nodes return, num_workers run again. null
    is num_workers."""
    hang_seconds: Positive = 120
    """Seconds without an answer after which a worker counts as lost and is replaced."""


class TrackingConfig(Section):
    """Where MLflow records the run."""

    uri: Annotated[Text | None, Field(repr=False)] = None
    """Address of the MLflow server or store. null is mlflow.db in the project folder, or in cluster.storage for a Ray
    job. The variable MLFLOW_TRACKING_URI overrides it."""
    experiment: Annotated[str, Field(min_length=1, max_length=500)] = "drnet"
    """Name of the MLflow experiment."""
    system_metrics: bool = True
    """Record the CPU, memory and GPU use of every node."""

    @field_serializer("uri", when_used="json")
    def _uri_without_secrets(self, uri: str | None) -> str | None:
        """Return the address without secrets, for files, tracking and comparisons."""
        return uri and redacted(uri)


class RegistryConfig(Section):
    """The registered model of the run, and its alias."""

    name: ModelName = "drnet"
    """Name of the registered model."""
    alias: ModelAlias = "champion"
    """Alias that jobs.register sets."""


class ServingConfig(Section):
    """Settings of jobs.serve, which runs a registered model on Ray Serve."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on. Any address other than loopback requires a token."""
    port: Annotated[int, Field(gt=0, lt=65536)] = 8000
    """Port to listen on."""
    split: Literal["auto", "together", "by_resolution"] = "auto"
    """together: each replica runs all programs. by_resolution: each resolution has its own deployment, which scales
    independently. auto: by_resolution if there are enough GPUs for a replica of each resolution, otherwise together."""
    min_replicas: Positive = 1
    """Smallest number of replicas of each deployment."""
    max_replicas: Positive | None = None
    """Largest number of replicas of each deployment. null is min_replicas."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 8.0
    """Mean number of requests in progress per replica above which replicas are added."""
    scale_up_seconds: Annotated[float, Field(ge=0)] = 5.0
    """Seconds of higher load before a replica is added."""
    scale_down_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Seconds of lower load before a replica is removed."""
    cpus_per_replica: Annotated[float, Field(ge=0)] = 1.0
    """CPUs that a replica reserves. It computes with as many threads, at least one."""
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that a replica reserves: 0, a fraction of one, or a whole number. With by_resolution the router reserves
    none."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of convolutions and matrix products."""
    max_batch_size: Positive | None = None
    """Largest number of calls in a batch of a resolution's deployment. null is the number of images that run fastest
    together. Only by_resolution uses it."""
    batch_wait_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that a batch waits for more images. Only by_resolution uses it."""
    max_queued_requests: Positive = 256
    """Number of requests that may wait for a replica. Further ones are answered with status 503 and Retry-After."""
    max_body_mb: Annotated[float, Field(gt=0)] = 32.0
    """Largest request body in MB (1e6 bytes). A larger one is answered with status 413."""
    follow_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Seconds between two checks of the alias, with --follow-alias."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} is less than min_replicas {self.min_replicas}. Raise it"
            )
        if self.gpus_per_replica > 1 and self.gpus_per_replica % 1:
            raise ValueError(
                f"gpus_per_replica is {self.gpus_per_replica:g}. Give a fraction of one, or a whole number"
            )
        return self


Span = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


class SpaceConfig(Section):
    """Ranges and choices of the predictor search."""

    blocks: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...] = ((0,), (1,), (1, 1), (2, 2), (1, 1, 1), (1, 1, 1, 1))
    """Choices of model.predictor.blocks."""
    kernel: tuple[Positive, ...] = (3, 5, 7)
    """Choices of model.predictor.kernel."""
    stem_stride: tuple[Positive, ...] = (2, 4)
    """Choices of model.predictor.stem_stride."""
    input_size: tuple[Annotated[int, Field(ge=16)], ...] = (64, 96, 128, 160)
    """Choices of model.predictor.input_size, in pixels; none above the largest of model.resolutions."""
    width: Span = (0.25, 1.0)
    """Lowest and highest model.predictor.width, in steps of 1/16."""
    max_gflops: Annotated[float, Field(gt=0)] | None = None
    """Largest cost of a predictor to try, in GFLOPs. null is the largest resolution's cost minus the smallest's."""
    alpha_gflops: Span | None = None
    """Lowest and highest alpha_gflops. null is 15 % to 85 % of the way from the smallest to the largest resolution's
    cost."""
    eta: Span | None = None
    """Lowest and highest eta. null is a third of stages.predictor.eta to three times it."""
    tau: Span | None = None
    """Lowest and highest tau. null is a third of stages.predictor.tau to three times it."""
    lr: Span | None = None
    """Lowest and highest lr. null is a third of stages.predictor.lr to three times it."""


class SearchConfig(Section):
    """Settings of jobs.tune, which trains predictors as in stages.predictor and the best of them as in stages.joint."""

    backbone: PathOrName | None = None
    """Trained backbone: a run's folder, a model.pt, a checkpoint or models:/NAME@ALIAS. null is this run's model."""
    tables: LocalPath | None = None
    """Folder of logit tables that were computed earlier for the backbone. null computes them in the search's folder."""
    preset: Literal["paper", "size", "full"] = "size"
    """paper: only the paper's four predictors. size: also other sizes. full: also other alpha, eta, tau and lr."""
    space: SpaceConfig = SpaceConfig()
    """Ranges and choices of the search."""
    num_trials: Positive = 40
    """Number of candidates to try in addition to the paper's four."""
    epochs: Positive | None = None
    """Epochs of a trial, which uses at most this many crops of each image. null is stages.predictor.epochs."""
    objective: Literal["front", "budget"] = "front"
    """front: accuracy and total GFLOPs (Optuna's multi-objective TPE). budget: accuracy at budget_gflops (ASHA)."""
    budget_gflops: Annotated[float, Field(gt=0)] | None = None
    """Largest mean cost of a model in GFLOPs, including the predictor. The most accurate model within it is chosen."""
    max_accuracy_drop: Annotated[float, Field(ge=0)] | None = None
    """Choose the cheapest model that is at most this many points less accurate than the best static resolution."""
    finalists: Positive = 4
    """Number of candidates on the Pareto front to train with every seed, like the paper's four."""
    seeds: Positive = 3
    """Number of seeds for each finalist."""
    finetuned: Annotated[int, Field(ge=0)] = 2
    """Number of finalists to finetune together with their backbone as in stages.joint, and to evaluate fully."""
    grace_epochs: Positive = 1
    """Epochs before ASHA may stop a trial (objective=budget only)."""
    cpus_per_trial: Positive = 1
    """CPUs for each trial."""
    gpus_per_trial: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    """Fraction of a GPU for each trial. auto is a quarter when the cluster has GPUs."""
    max_concurrent: Positive | None = None
    """Number of trials at the same time. null is as many as the cluster has room for."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Number of times to retry a trial whose process died."""
    cache_gb: Annotated[float, Field(ge=0)] = 8.0
    """Largest size in GB of predictor inputs that a node decodes once and keeps. Above it, each trial decodes them."""
    node_folder: LocalPath | None = None
    """Folder on each node's own disk for copies of logit tables and for decoded inputs. null is the search's folder."""


class PolicyConfig(Section):
    """How a policy is chosen, and on which images."""

    max_accuracy_drop: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    """Largest loss of accuracy compared with the best static resolution, in points, by a one-sided 95 % bound. The
    cheapest policy within it is chosen. null sets no limit."""
    budget_gflops: Annotated[float, Field(gt=0)] | None = None
    """Highest mean cost per image in GFLOPs, for cost=flops. null sets no limit."""
    budget_milliseconds: Annotated[float, Field(gt=0)] | None = None
    """Highest mean cost per image in milliseconds, for cost=milliseconds. null sets no limit."""
    select_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the validation images on which policies are fitted and chosen. The report uses the others."""
    cross_fit_below: Annotated[int, Field(ge=0)] = 1000
    """With fewer validation images, cross-fitting is used: each fold's policies are fitted on the other folds."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Number of folds for cross-fitting."""
    select_by: Literal["accuracy", "balanced_accuracy"] = "accuracy"
    """Accuracy by which policies, and the model from before or after the joint stage, are chosen, and which the verdict
    compares. balanced_accuracy is the mean over the classes."""


class Config(Section):
    """The configuration of a run."""

    name: RunName
    """Name of the run, of its folder in cluster.storage and of its MLflow run."""
    seed: int = 0
    """Seed of the weights, order, augmentation and Gumbel noise."""
    cost: Literal["flops", "milliseconds"] = "flops"
    """Unit of an image's cost, for the stages' target and the report: multiply-adds, or milliseconds that are measured
    once on the training device before training."""
    cost_batch_size: Positive = 64
    """Batch size at which milliseconds are measured."""
    data: DataConfig
    loader: LoaderConfig = LoaderConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    stages: StagesConfig
    policy: PolicyConfig = PolicyConfig()
    search: SearchConfig = SearchConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig = RegistryConfig()
    serving: ServingConfig = ServingConfig()
