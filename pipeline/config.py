"""The one typed configuration tree: YAML file, dotted overrides, every problem reported together.

A configuration is read once, checked as a whole and frozen. Field docstrings are the reference that `--help` and
docs/configuration.md print, so each says meaning and unit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


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
