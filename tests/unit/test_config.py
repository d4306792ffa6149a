"""pipeline/config: how a file and overrides become a configuration, and the messages about wrong ones."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from datasets.files import flattened
from pipeline.config.explain import describe_fields
from pipeline.config.load import (
    CONFIG_FOLDER,
    ConfigError,
    differences,
    find_config,
    load_config,
    parse_config,
    with_absolute_paths,
)
from pipeline.models.drnet import validation_crop

SMALLEST: dict[str, Any] = {
    "name": "run",
    "data": {"dataset": "glyphs", "folder": "data/glyphs"},
    "stages": {"backbone": {"epochs": 2}},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    return path


def problems_of(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load_config(file, overrides)
    return raised.value.problems


def changed(dotted: dict[str, Any]) -> dict[str, Any]:
    """Return SMALLEST with some dotted keys changed."""
    tree = copy.deepcopy(SMALLEST)
    for key, value in dotted.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def test_defaults_are_the_papers():
    config = parse_config(SMALLEST)

    assert config.model.backbone == "resnet50"
    assert config.model.resolutions == (224, 168, 112)
    assert config.model.predictor.input_size == 128
    assert config.training.batch_size == 256
    assert validation_crop(config) == 224 / 256
    backbone = config.stages.backbone
    assert backbone is not None
    assert (backbone.lr, backbone.momentum, backbone.weight_decay, backbone.gamma) == (0.1, 0.9, 1e-4, 0.1)


def test_the_papers_recipe_is_shipped():
    stages = load_config("imagenet100").stages

    assert [name for name, _ in stages.present()] == ["backbone", "joint"]
    assert stages.backbone is not None
    assert (stages.backbone.epochs, stages.backbone.step_epochs, stages.backbone.warmup_epochs) == (70, 20, 3)
    assert stages.joint is not None
    assert (stages.joint.epochs, stages.joint.step_epochs, stages.joint.eta) == (100, 30, 0.2)
    assert (stages.joint.predictor_lr_scale, stages.joint.norm_statistics) == (0.1, "routed")
    assert load_config("imagenet100").model.predictor.architecture == 1
    assert load_config("imagenet100-strong").model.predictor.architecture == 3


def test_stages_run_in_order_for_any_order_in_the_file():
    config = parse_config(
        changed({"stages": {"joint": {"epochs": 1, "alpha_gflops": 1}, "predictor": {"epochs": 1, "alpha_gflops": 1}}})
    )

    assert [name for name, _ in config.stages.present()] == ["predictor", "joint"]


def test_a_config_is_frozen():
    config = parse_config(SMALLEST)

    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # ty: ignore[invalid-assignment]


def test_a_config_survives_its_file():
    config = load_config("imagenet100", ["seed=3", "loader.crop_ratio=[0.9,1.1]"])

    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=7", 7),
        ("stages.backbone.lr=1e-3", 1e-3),
        ("model.resolutions=[96, 64]", (96, 64)),
        ("cluster.use_gpu=false", False),
        ("cluster.use_gpu=auto", "auto"),
        ("data.max_side=null", None),
        ("data.folder=some/where=else", Path("some/where=else")),
        ("stages.joint={epochs: 4, alpha_gflops: 2}", None),
        ("stages.joint.alpha_gflops=2", None),
        ("tracking.uri=sqlite:///there.db", "sqlite:///there.db"),
    ],
)
def test_an_override_reaches_its_field(file, override, value):
    overrides = [override] if "alpha_gflops=" not in override else [override, "stages.joint.epochs=4"]
    config = load_config(file, overrides)

    if override.startswith("stages.joint"):
        assert config.stages.joint is not None
        assert (config.stages.joint.epochs, config.stages.joint.alpha_gflops) == (4, 2)
        return
    found: Any = config
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value


def test_the_last_override_wins(file):
    assert load_config(file, ["seed=1", "seed=2"]).seed == 2


@settings(deadline=None)
@given(seed=st.integers(), lr=st.floats(min_value=1e-12, max_value=1e6), epochs=st.integers(1, 10**9))
def test_overrides_keep_numbers_exact(tmp_path_factory, seed, lr, epochs):
    file = tmp_path_factory.getbasetemp() / "numbers.yaml"
    file.write_text(yaml.safe_dump(SMALLEST))
    config = load_config(file, [f"seed={seed}", f"stages.backbone.lr={lr!r}", f"stages.backbone.epochs={epochs}"])

    assert config.stages.backbone is not None
    assert (config.seed, config.stages.backbone.lr, config.stages.backbone.epochs) == (seed, lr, epochs)


def test_every_problem_is_reported_at_once(file):
    problems = problems_of(
        file,
        "seed",
        "training.batchsize=4",
        "stages.backbone.epochs=2.5",
        "stages.backbone.lr=-1",
        "training.precision=float16",
        "stages.joint.epochs=3",
    )

    assert len(problems) == 6
    text = "\n".join(problems)
    for part in (
        "override 'seed' does not have the form key.path=value",
        "training.batchsize is not a known key. Did you mean training.batch_size",
        "stages.backbone.epochs is 2.5. Give an integer",
        "stages.backbone.lr is -1. Give more than 0",
        "training.precision is 'float16'. Give auto, float32 or bfloat16",
        "stages.joint.alpha_gflops is missing",
    ):
        assert part in text


def test_the_error_names_the_file_and_counts(file):
    with pytest.raises(ConfigError, match=r"config\.yaml has 2 problems:\n  - .*\n  - ") as raised:
        load_config(file, ["seed=x", "name=a b"])

    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.resolution=[64]", "Did you mean model.resolutions"),
        ("clip_grad_norm=1", "Did you mean stages."),
        ("stages.backbone.alpha_gflops=1", "Did you mean stages.predictor.alpha_gflops or stages.joint.alpha_gflops"),
        ("lr=1", "Did you mean stages.backbone.lr or stages.predictor.lr or"),
        ("stages.backbone.epoch=1", "Did you mean stages.backbone.epochs?"),
        ("zzz=1", "Allowed keys: cluster, cost, cost_batch_size, data, loader, model, name,"),
    ],
)
def test_an_unknown_key_lists_valid_ones(file, override, named):
    (problem,) = problems_of(file, override)

    assert f"{override.partition('=')[0]} is not a known key" in problem
    assert named in problem


@pytest.mark.parametrize(
    ("dotted", "named"),
    [
        ({"model.resolutions": [64, 96]}, "largest first"),
        ({"model.resolutions": [96, 96, 64]}, "largest first"),
        ({"model.resolutions": []}, "Give at least 1 value"),
        ({"stages": {}}, "stages is empty"),
        ({"model.resolutions": [64], "stages.joint": {"epochs": 1, "alpha_gflops": 1}}, "nothing to predict"),
        ({"training.batch_size": 255, "cluster.num_workers": 2}, "does not divide evenly"),
        ({"cluster.num_workers": 2, "cluster.min_workers": 3}, "cluster.min_workers 3 is more than"),
        ({"loader.crop_scale": [0.5, 1.5]}, "loader.crop_scale is [0.5, 1.5]"),
        ({"loader.crop_scale": [0.0, 1.0]}, "loader.crop_scale is [0.0, 1.0]"),
        ({"loader.crop_ratio": [2.0, 1.0]}, "loader.crop_ratio is [2.0, 1.0]"),
        ({"data.glyphs.min_height": 0.7, "data.glyphs.max_height": 0.7}, "min_height must be smaller"),
        ({"data.glyphs.min_height": 0}, "data.glyphs.min_height is 0. Give more than 0"),
        ({"data.dataset": "imagefolder"}, "data.source is missing"),
        ({"stages.backbone.warmup_epochs": 2}, "stages.backbone.warmup_epochs 2 must be less than epochs 2"),
        (
            {"stages.predictor": {"epochs": 2, "alpha_gflops": 1, "num_crops": 3}},
            "stages.predictor.num_crops is 3. Give at most its epochs, 2",
        ),
        ({"stages.backbone.lr": float("inf")}, "stages.backbone.lr is inf"),
        ({"stages.backbone.lr": float("nan")}, "stages.backbone.lr is nan"),
        ({"cluster.use_gpu": "maybe"}, "cluster.use_gpu is 'maybe'. Give true, false or auto"),
        ({"name": "a/../b"}, "name is 'a/../b'"),
        ({"name": None}, "name is null. Give text"),
        ({"model.predictor.architecture": 5}, "architecture is 5. Give 1, 2, 3 or 4"),
        ({"training": 5}, "training is 5. Give its keys: batch_size, accumulate,"),
        ({"model.predictor.initial_shares": [1, 1]}, "Give one for each of model.resolutions [224, 168, 112]"),
        ({"model.predictor.initial_shares": [1, 0, 1]}, "model.predictor.initial_shares.1 is 0"),
        ({"model.resolutions": [64], "stages.backbone.distillation": "mean"}, "distillation needs several"),
        (
            {"stages.backbone.resolutions_per_step": 3, "stages.backbone.distillation": "learned"},
            "teacher needs every resolution",
        ),
        (
            {"stages.backbone.resolutions_per_step": 2},
            "the smallest of model.resolutions [224, 168, 112] would train. Give at least 3, or null",
        ),
        ({"stages.backbone.nesterov": True, "stages.backbone.momentum": 0}, "backbone.nesterov needs momentum"),
        ({"stages.backbone.schedule": "one_cycle"}, "needs warmup_epochs for its rise. Give more than 0, such as 0.6"),
    ],
)
def test_a_contradiction_is_refused(dotted, named):
    with pytest.raises(ConfigError) as raised:
        parse_config(changed(dotted))

    (problem,) = raised.value.problems
    assert named in problem


def test_weights_become_absolute_only_if_they_are_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.pth").touch()
    for weights, expected in (("mine.pth", f"{tmp_path}/mine.pth"), ("IMAGENET1K_V1", "IMAGENET1K_V1")):
        assert with_absolute_paths(parse_config(changed({"model.weights": weights}))).model.weights == expected


def test_a_crop_may_be_wider_than_high():
    assert parse_config(changed({"loader.crop_ratio": [1.0, 2.0]})).loader.crop_ratio == (1.0, 2.0)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "the file is empty"),
        (b"- a\n- b\n", "the file contains [a, b]. Give keys and values"),
        (b"name: [1", "not YAML"),
        (b"\xff\xfe\x00", "not UTF-8 text (byte 0xff at position 0)"),
        (b"name: !!python/object/apply:os.getcwd []", "not YAML"),
        (b"name: a\ndata:\n\tdataset: b\n", "not YAML (line 3, column 1): found character '\\t'"),
        (b"source: /d/my: photos\n", "line 1, column 14): mapping values are not allowed here. Check the indentation"),
        (b"data: {folder: d\nname: a\n", "line 2, column 5, in the part that starts in line 1): expected ',' or '}'"),
        (b"name: 'a\n", "Close every quote"),
        (b"a: 1\n---\nb: 2\n", "found another document. Remove the lines ---"),
        (b"? [a]\n: b\n", "found unhashable key"),
        (b"name: a\x01b\n", "control character 0x1 at position 7"),
        (b"seed: " + b"9" * 5000, "a number or a tagged value that cannot be read"),
        (b"seed: !!int x", "a number or a tagged value that cannot be read"),
        (b"seed: !!bool x", "a number or a tagged value that cannot be read"),
        (b"seed: !!timestamp x", "a number or a tagged value that cannot be read"),
    ],
)
def test_a_file_that_is_not_a_configuration_is_refused(tmp_path, content, named):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)

    (problem,) = problems_of(file)
    assert named in problem


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed", "does not have the form"),
        ("=3", "does not have the form"),
        ("seed=[1", "not YAML (line 1, column 3)"),
        ("model=", "model is null. Give its keys: backbone,"),
        ("training.batch_size.more=3", "training.batch_size is a section with the keys more. Give an integer"),
    ],
)
def test_a_malformed_override_is_refused(file, override, named):
    (problem,) = problems_of(file, override)

    assert named in problem


@settings(deadline=None)
@given(
    content=st.binary(max_size=80) | st.text("abn:-{}[],&*!|>'\"%@`#?\\ \t\n0.", max_size=60).map(str.encode),
    override=st.text(max_size=40)
    | st.builds("{}={}".format, st.sampled_from([key for key, *_ in describe_fields()]), st.text(max_size=20)),
)
def test_any_file_and_any_override_is_a_configuration_or_a_config_error(tmp_path_factory, content, override):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    for text, overrides in ((content, []), (yaml.safe_dump(SMALLEST).encode(), [override])):
        file.write_bytes(text)
        with contextlib.suppress(ConfigError):
            load_config(file, overrides)


def test_a_folder_is_not_a_configuration(file, tmp_path):
    with pytest.raises(ConfigError, match=r"this is a folder\. Give .*config\.yaml"):
        find_config(tmp_path)


def test_a_union_is_explained_once(file):
    assert problems_of(file, "search.gpus_per_trial=x") == ["search.gpus_per_trial is 'x'. Give a number or auto"]
    assert problems_of(file, "search.gpus_per_trial=2") == ["search.gpus_per_trial is 2. Give at most 1 or auto"]
    assert problems_of(file, "data.max_side=x") == ["data.max_side is 'x'. Give an integer or null"]


def test_text_that_is_not_utf_8_is_refused_and_a_path_is_not(file):
    [name], [key] = problems_of(file, "tracking.experiment=caf\udce9"), problems_of(file, "caf\udce9=1")
    assert name.endswith("Give text in UTF-8")
    assert key.endswith("is not text in UTF-8")
    config = load_config(file, ["data.folder=caf\udce9"])
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_a_missing_space_after_a_colon_is_explained(file):
    assert any("Write a space after the colon" in problem for problem in problems_of(file, "stages.joint={epochs:3}"))


def test_a_config_is_found_by_path_and_by_name(file, tmp_path):
    assert find_config(file) == file
    assert find_config("imagenet100") == CONFIG_FOLDER / "imagenet100.yaml"
    with pytest.raises(ConfigError, match=r"no such file\. Give a path, or one of .*imagenet100"):
        find_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"--config ~nosuchuser/x\.yaml .*\n.*its home folder is unknown"):
        find_config("~nosuchuser/x.yaml")


def test_differences_name_key_old_and_new():
    old = parse_config(SMALLEST)
    new = parse_config(changed({"seed": 5, "stages.joint": {"epochs": 1, "alpha_gflops": 1.5}}))

    assert differences(old, old) == []
    found = differences(old, new)
    assert "seed: 0 -> 5" in found
    assert "stages.joint.alpha_gflops: None -> 1.5" in found
    assert not any(line.startswith("stages.backbone") for line in found)


def test_every_field_is_described_with_type_default_and_meaning():
    fields = {key: rest for key, *rest in describe_fields()}
    config = load_config("imagenet100", ["stages.predictor={epochs: 1, alpha_gflops: 1}"])

    assert fields.keys() == dict(flattened(config.model_dump(mode="json"))).keys()
    assert all(meaning for _, _, meaning in fields.values())
    assert fields["training.batch_size"] == ["int", "256", "Number of images in one optimizer step, over all workers."]
    assert fields["cluster.use_gpu"][:2] == ["true | false | auto", "auto"]
    assert fields["data.max_side"][:2] == ["int | null", "500"]
    assert fields["loader.crop_scale"][:2] == ["list of float", "[0.08, 1]"]
    assert fields["name"][:2] == ["str", "(required)"]


def test_flattened_keeps_empty_and_null_values():
    assert dict(flattened({"a": {"b": None, "c": {}}, "d": [1]})) == {"a.b": None, "a.c": {}, "d": [1]}
