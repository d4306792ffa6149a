from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pipeline.models.backbone import ResolutionBackbone, SmallResNet, build_backbone


def images(count: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def backbone() -> ResolutionBackbone:
    torch.manual_seed(0)
    return build_backbone("small_resnet", 5, 3, width=0.5)


def save_plain(path: Path, num_classes: int, seed: int = 7, name: str = "resnet18") -> dict[str, torch.Tensor]:
    """Save a state dict of torchvision's model with batch norms that differ from their defaults."""
    torch.manual_seed(seed)
    network = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    network.train()(images(2, 64))
    torch.save(network.state_dict(), path)
    return network.state_dict()


def test_every_image_size_gives_logits_of_its_own_norms(backbone: ResolutionBackbone):
    backbone.train()
    for index, side in enumerate((96, 64, 33)):
        assert backbone(images(4, side), index).shape == (4, 5)
    backbone.eval()
    outputs = [backbone(images(4, 64), index) for index in range(3)]
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_outside_the_candidates_is_refused(backbone: ResolutionBackbone, index: int):
    with pytest.raises(ValueError, match=r"not in 0\.\.2"):
        backbone(images(1, 32), index)


def test_at_is_an_independent_plain_network_with_the_same_outputs(backbone: ResolutionBackbone):
    for index, side in enumerate((96, 64, 32)):
        backbone.train()(images(4, side), index)
    backbone.eval()
    plain = backbone.at(1)
    expected = backbone(images(4, 64), 1)
    assert torch.equal(plain(images(4, 64)), expected)
    assert set(plain.state_dict()) == set(SmallResNet(5, 0.5).state_dict())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert torch.equal(backbone(images(4, 64), 1), expected)


def test_a_deep_copy_is_independent(backbone: ResolutionBackbone):
    backbone.eval()
    clone = copy.deepcopy(backbone)
    expected = backbone(images(2, 32), 2)
    assert torch.equal(clone(images(2, 32), 2), expected)
    clone(images(2, 32), 0)
    assert torch.equal(backbone.network(images(2, 32)), expected)  # candidate 2 is still active in the original


def test_state_dict_round_trip_holds_every_private_norm_once(backbone: ResolutionBackbone):
    for index in range(3):
        backbone.train()(images(4, 32, seed=index), index)
    other = build_backbone("small_resnet", 5, 3, width=0.5)
    other.load_state_dict(backbone.state_dict())
    for index in range(3):
        assert torch.equal(other.eval()(images(2, 32), index), backbone.eval()(images(2, 32), index))
    assert len(list(backbone.parameters())) == len(backbone.state_dict()) - sum(1 for _ in backbone.buffers())


def test_switching_resolution_reaches_a_compiled_network(backbone: ResolutionBackbone):
    """Compiled code must not stay with the norms that were active during tracing."""
    reference, compiled = copy.deepcopy(backbone), torch.compile(copy.deepcopy(backbone), backend="eager")
    for step, index in enumerate((0, 1, 0, 1)):
        batch = images(2, (32, 48)[index], seed=step)
        assert torch.equal(compiled(batch, index), reference(batch, index))
    for value, expected in zip(compiled.state_dict().values(), reference.state_dict().values(), strict=True):
        assert torch.equal(value, expected)


def test_width_scales_only_the_small_network():
    count = [
        sum(parameter.numel() for parameter in build_backbone("small_resnet", 5, 1, width=width).parameters())
        for width in (0.5, 1.0, 2.0)
    ]
    assert count[0] < count[1] < count[2]
    with pytest.raises(ValueError, match="fixed width"):
        build_backbone("resnet18", 5, 1, width=0.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet51", "resnet50"),
        ("small_resent", "small_resnet"),
        ("qqqq", "small_resnet, a torchvision model or timm/NAME"),
        ("resnet50d", r"Did you mean timm/resnet50d\?"),
        ("resnet50d.ra2_in1k", r"Did you mean timm/resnet50d\?"),
        ("timm/resnet5d", "Did you mean timm/resnet50d"),
        ("timm/resnet50d.ra2_in1k", r"model\.backbone=timm/resnet50d and model\.weights=ra2_in1k"),
        ("fasterrcnn_resnet50_fpn", "not a known backbone"),
        ("googlenet", "auxiliary outputs"),
        ("inception_v3", "auxiliary outputs"),
        ("squeezenet1_1", "no norm layer .* model.private_norms=none"),
        ("maxvit_t", "takes images of 224 px only"),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        build_backbone(name, 5, 2)


@pytest.mark.parametrize(
    "name",
    ["densenet121", "efficientnet_b0", "mnasnet0_5", "mobilenet_v3_small", "regnet_x_400mf", "shufflenet_v2_x0_5"],
)
def test_networks_of_every_family_run_at_two_sizes(name: str):
    backbone = build_backbone(name, 5, 2).eval()
    with torch.inference_mode():
        assert [tuple(backbone(images(1, side), index).shape) for index, side in enumerate((64, 48))] == [(1, 5)] * 2


def test_weights_file_reaches_every_private_norm(tmp_path: Path):
    state = save_plain(tmp_path / "weights.pt", num_classes=5)
    backbone = build_backbone("resnet18", 5, 3, weights=str(tmp_path / "weights.pt"))
    for index in range(3):
        loaded = backbone.at(index).state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_the_classifier_of_other_classes_is_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    state = save_plain(tmp_path / "weights.pt", num_classes=11)
    with caplog.at_level(logging.WARNING):
        network = build_backbone("resnet18", 5, 2, weights=str(tmp_path / "weights.pt")).at(1)
    assert "11 classes" in caplog.text
    assert network.fc.weight.shape == (5, 512)
    assert torch.equal(network.layer4[1].bn2.running_var, state["layer4.1.bn2.running_var"])


def test_weights_without_batch_counters_are_accepted(tmp_path: Path):
    """Files written before torch 0.4.1 lack num_batches_tracked."""
    state = save_plain(tmp_path / "weights.pt", num_classes=5)
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pt")
    network = build_backbone("resnet18", 5, 2, weights=str(tmp_path / "old.pt")).at(0)
    assert torch.equal(network.bn1.running_mean, state["bn1.running_mean"])


def averaged_and_compiled(network: nn.Module) -> dict[str, torch.Tensor]:
    return AveragedModel(torch.compile(nn.DataParallel(network), backend="eager")).state_dict()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda network: nn.DataParallel(network).state_dict(),
        lambda network: torch.compile(network, backend="eager").state_dict(),
        averaged_and_compiled,
        lambda network: {"state_dict": {f"model.{key}": value for key, value in network.state_dict().items()}},
        lambda network: {"model": network.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda network: {"model_state_dict": network.state_dict(), "optimizer_state_dict": {"lr": 0.1}},
        lambda network: {"arch": "resnet18", "state_dict_ema": network.state_dict(), "metric": 71.0},
    ],
    ids=["DataParallel", "compiled", "averaged", "model.", "model", "model_state_dict", "state_dict_ema"],
)
def test_weights_of_wrapped_models_and_training_checkpoints_load(
    tmp_path: Path, wrap: Callable[[nn.Module], dict[str, Any]]
):
    network = torchvision.models.resnet18(num_classes=5)
    torch.save(wrap(network), tmp_path / "weights.pt")
    loaded = build_backbone("resnet18", 5, 2, weights=str(tmp_path / "weights.pt")).at(1).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in network.state_dict().items())


def test_a_checkpoint_with_a_moving_average_gives_the_average(tmp_path: Path):
    """timm's `load_state_dict` prefers it too."""
    network, averaged = (torchvision.models.resnet18(num_classes=5) for _ in range(2))
    torch.save({"state_dict": network.state_dict(), "state_dict_ema": averaged.state_dict()}, tmp_path / "weights.pt")
    loaded = build_backbone("resnet18", 5, 2, weights=str(tmp_path / "weights.pt")).at(1)
    assert torch.equal(loaded.conv1.weight, averaged.conv1.weight)


def test_safetensors_load_where_the_package_is_installed(tmp_path: Path):
    state, path = SmallResNet(5, 0.5).state_dict(), tmp_path / "weights.safetensors"
    header, offset = {}, 0
    for name, value in state.items():
        size, kind = value.numel() * value.element_size(), "F32" if value.is_floating_point() else "I64"
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    data = b"".join(value.numpy().tobytes() for value in state.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    if importlib.util.find_spec("safetensors") is None:
        with pytest.raises(ValueError, match=r"need the package safetensors\. Install it"):
            build_backbone("small_resnet", 5, 2, width=0.5, weights=str(path))
        return
    loaded = build_backbone("small_resnet", 5, 2, width=0.5, weights=str(path)).at(1).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        build_backbone("small_resnet", 5, 2, width=0.5, weights=str(path))


class _NotAStateDict:
    """An object that only an unsafe load would create."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint", "cannot be read"),
        (b"", "cannot be read"),
        (_NotAStateDict(), "cannot be read"),
        ([1, 2], "not a state dict"),
        ({"epoch": 3, "lr": 0.1}, "not a state dict .* has the entries epoch, lr"),
        ({"format": 1, "state": {}, "classes": []}, "a model or checkpoint of this project.*init_from"),
        ({"format": 2, "data_epoch": 1, "model": {}}, "a model or checkpoint of this project.*init_from"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 46830571\n", "Git LFS pointer"),
        (b"\n <!DOCTYPE html>\n<html><body>Not found</body></html>", "a web page, not weights"),
        ({"conv1.weight": torch.zeros(1)}, "do not fit"),
    ],
)
def test_a_bad_weights_file_is_refused(tmp_path: Path, content: object, message: str):
    path = tmp_path / "weights.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        build_backbone("resnet18", 5, 2, weights=str(path))


def test_weights_of_another_network_are_refused_with_every_kind_of_misfit(tmp_path: Path):
    state = save_plain(tmp_path / "weights.pt", num_classes=5)
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    state["extra"] = state.pop("bn1.weight")
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"conv1\.weight is \[64, 3, 3, 3\].*bn1\.weight is missing; extra is unknown"):
        build_backbone("resnet18", 5, 2, weights=str(tmp_path / "weights.pt"))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet18", "IMAGENET1K_V7", "IMAGENET1K_V1"),
        ("resnet18", "ResNet50_Weights.IMAGENET1K_V2", "ResNet18|IMAGENET1K_V1"),
        ("resnet18", "missing.pt", "is neither a file nor one of"),
        ("small_resnet", "IMAGENET1K_V1", "no published weights"),
    ],
)
def test_unknown_weights_are_refused(name: str, weights: str, message: str):
    with pytest.raises(ValueError, match=message):
        build_backbone(name, 5, 2, weights=weights)


def test_published_weights_come_from_torchs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The cache holds a file of the published name, so that nothing is downloaded here."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    state = save_plain(cache / url.rpartition("/")[2], num_classes=1000)
    network = build_backbone("resnet18", 1000, 2, weights="IMAGENET1K_V1").at(1)
    assert torch.equal(network.fc.weight, state["fc.weight"])


def test_failed_download_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    # urlopen keeps its first opener, with the proxies of that moment, for the whole process.
    monkeypatch.setattr("urllib.request._opener", None)
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")  # the discard port: nothing listens
        monkeypatch.setenv(f"{scheme}_proxy".upper(), "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"could not be downloaded.*give its path"):
        build_backbone("resnet18", 5, 2, weights="ResNet18_Weights.IMAGENET1K_V1")
