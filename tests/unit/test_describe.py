"""pipeline/training/describe.py and jobs/describe.py: the costs that they print before a run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from datasets.beton import FORMAT, BetonError, Manifest, Sample, Split
from jobs import describe as job
from pipeline.config.load import ConfigError, load_config, parse_config
from pipeline.config.schema import Config
from pipeline.models.backbone import build_backbone
from pipeline.models.cost import Costs, frozen_gflops, measure_costs
from pipeline.models.drnet import build_drnet
from pipeline.models.dry_run import measure_activations
from pipeline.training.describe import describe, summarize_data
from pipeline.training.objectives import StepBatch, build_objective
from pipeline.training.run import alpha_problems
from tests.betons import write_beton
from tests.unit.pictures import jpeg

COSTS = Costs(resolutions=(96, 64, 32), backbone_gflops=(0.9, 0.4, 0.1), predictor_gflops=0.05)

JOINT = {"joint": {"epochs": 1, "alpha_gflops": 0.005}}


def config_in(folder: Path, **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "name": "trial",
        "data": {"dataset": "glyphs", "folder": str(folder), "glyphs": {"num_train": 130, "num_validation": 20}},
        "model": {
            "backbone": "small_resnet",
            "backbone_width": 0.5,
            "resolutions": [96, 64, 32],
            "predictor": {"architecture": 3, "width": 0.25, "input_size": 48},
        },
        "training": {"batch_size": 32},
        "cluster": {"num_workers": 2},
        "stages": {"backbone": {"epochs": 3}, "predictor": {"epochs": 2, "alpha_gflops": 0.005}},
    }
    return parse_config(tree | changes)


def write_manifest(folder: Path, num_train: int = 70) -> Manifest:
    splits = {
        name: Split(f"{name}.beton", count, [count // 7] * 7, 1000 * count, "0" * 64, {})
        for name, count in (("train", num_train), ("validation", 14))
    }
    manifest = Manifest(FORMAT, "glyphs", list("ABCDEFG"), {}, (0.5,) * 3, (0.2,) * 3, "0" * 64, [], {}, splits)
    (folder / "manifest.json").write_text(manifest.to_json())
    return manifest


def test_the_papers_recipe_without_its_data():
    """ResNet-50 with 100 classes costs 4.09, 2.50 and 1.08 G; predictor 1 costs 0.29 G (supplement, Table 1)."""
    description = describe(load_config("imagenet100"))
    assert [(network.side, round(network.gflops, 2)) for network in description.networks] == [
        (224, 4.09),
        (168, 2.50),
        (112, 1.08),
        (128, 0.29),
    ]
    assert description.lowest_gflops == pytest.approx(1.08 + 0.29, abs=0.01)
    assert description.highest_gflops == pytest.approx(4.09 + 0.29, abs=0.01)
    assert (description.data.num_classes, description.data.num_train, description.data.num_validation) == (
        100,
        50_000,
        5000,
    )
    assert [(stage.name, stage.steps_per_epoch, stage.total_steps) for stage in description.stages] == [
        ("backbone", 196, 70 * 196),
        ("joint", 196, 100 * 196),
    ]
    assert description.problems == []
    # torchvision's ResNet-50 with 100 classes, and two more copies of its 53,120 batch-norm parameters.
    assert description.networks[0].parameters == 23_712_932
    assert description.parameters == 23_712_932 + 2 * 53_120 + description.networks[-1].parameters


@pytest.mark.parametrize(("architecture", "gflops"), [(1, 0.29), (2, 0.17), (3, 0.04), (4, 0.09)])
def test_the_four_predictors(tmp_path: Path, architecture: int, gflops: float):
    model = {"backbone": "small_resnet", "resolutions": [64, 32], "predictor": {"architecture": architecture}}
    description = describe(config_in(tmp_path, model=model, stages={"backbone": {"epochs": 1}}))
    assert round(description.networks[-1].gflops, 2) == gflops


def test_unprepared_data_says_what_the_source_gives(tmp_path: Path):
    summary = summarize_data(config_in(tmp_path).data)
    assert not summary.prepared
    assert "jobs.prepare" in summary.note
    assert (summary.num_classes, summary.num_train, summary.num_validation) == (10, 130, 20)
    assert summary.size_bytes is None


@pytest.mark.parametrize(("images_per_class", "num_train"), [(5, 5 * 10), (13, 13 * 7 + 12 * 3), (99, 127)])
def test_unprepared_glyphs_follow_images_per_class(tmp_path: Path, images_per_class: int, num_train: int):
    """127 generated images are 13 of each of seven letters and 12 of the other three."""
    data = {"dataset": "glyphs", "folder": str(tmp_path), "images_per_class": images_per_class}
    config = config_in(tmp_path, data=data | {"glyphs": {"num_train": 127}})
    assert summarize_data(config.data).num_train == num_train


def test_an_unprepared_image_folder_is_counted(tmp_path: Path):
    for split, count in (("train", 4), ("val", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / f"{index}.jpg")
    data = {"dataset": "imagefolder", "folder": str(tmp_path / "data"), "source": str(tmp_path / "images")}
    summary = summarize_data(config_in(tmp_path, data=data).data)
    assert (summary.num_classes, summary.num_train, summary.num_validation) == (2, 8, 6)
    assert not (tmp_path / "data").exists()


def test_a_missing_source_leaves_counts_unknown(tmp_path: Path):
    data = {"dataset": "imagefolder", "folder": str(tmp_path), "source": str(tmp_path / "nowhere")}
    description = describe(config_in(tmp_path, data=data))
    assert "nowhere" in description.data.note
    assert "assume 1,000 classes" in description.data.note
    assert description.data.num_train is None
    assert description.stages[0].total_steps is None
    assert "unknown" in job.as_text(description)


def test_prepared_data_is_read_from_its_manifest(tmp_path: Path):
    manifest = write_manifest(tmp_path)
    description = describe(config_in(tmp_path))
    data = description.data
    assert data.prepared
    assert manifest.digest in data.note
    assert (data.num_classes, data.num_train, data.num_validation, data.size_bytes) == (7, 70, 14, 84_000)
    assert [(stage.steps_per_epoch, stage.total_steps) for stage in description.stages] == [(3, 9), (3, 6)]


def test_a_damaged_manifest_is_an_error(tmp_path: Path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BetonError, match="damaged"):
        summarize_data(config_in(tmp_path).data)


@pytest.mark.parametrize("alpha", [0.1, 0.4, 0.9])
def test_a_reachable_alpha_is_accepted(tmp_path: Path, alpha: float):
    stages = {"predictor": {"epochs": 1, "alpha_gflops": alpha}}
    assert alpha_problems(config_in(tmp_path, stages=stages), COSTS) == []


def test_every_unreachable_alpha_is_named_with_the_range(tmp_path: Path):
    stages = {
        "backbone": {"epochs": 1},
        "predictor": {"epochs": 1, "alpha_gflops": 0.0999},
        "joint": {"epochs": 1, "alpha_gflops": 0.901},
    }
    problems = alpha_problems(config_in(tmp_path, stages=stages), COSTS)
    assert len(problems) == 2
    assert "stages.predictor.alpha_gflops is 0.0999" in problems[0]
    assert "smallest" in problems[0]
    assert "stages.joint.alpha_gflops is 0.901" in problems[1]
    assert "largest" in problems[1]
    assert all("0.1 to 0.9 GFLOPs" in problem for problem in problems)


def test_alpha_counts_only_the_backbone(tmp_path: Path):
    """The predictor's cost does not count: every image pays it."""
    config = config_in(tmp_path, stages={"predictor": {"epochs": 1, "alpha_gflops": 0.92}})
    assert len(alpha_problems(config, COSTS)) == len(alpha_problems(config, replace(COSTS, predictor_gflops=9))) == 1


def test_memory_of_each_stage(tmp_path: Path):
    write_manifest(tmp_path)
    stages = {
        "backbone": {"epochs": 1},
        "predictor": {"epochs": 1, "alpha_gflops": 0.005, "optimizer": "adamw"},
        "joint": {"epochs": 1, "alpha_gflops": 0.005, "momentum": 0},
    }
    config = config_in(tmp_path, stages=stages)
    backbone, predictor, joint = (stage.memory for stage in describe(config).stages)
    trained = sum(4 * parameter.numel() for parameter in build_backbone("small_resnet", 7, 3, width=0.5).parameters())
    assert backbone.gradients == backbone.optimizer == trained
    assert joint.gradients == backbone.gradients + predictor.gradients
    assert predictor.optimizer == 2 * predictor.gradients
    assert joint.optimizer == 0
    assert joint.activations == backbone.activations + predictor.activations
    assert joint.images == 16 * 3 * (96**2 + 64**2 + 48**2 + 32**2)
    assert predictor.images == 16 * 3 * 48**2
    assert joint.weights == backbone.weights
    assert joint.total == joint.weights + joint.gradients + joint.activations + joint.images
    alone = config_in(tmp_path, stages=stages, cluster={"num_workers": 1})
    assert describe(alone).stages[0].memory.activations == pytest.approx(2 * backbone.activations, rel=0.01)
    stages["joint"]["ema_decay"] = 0.99
    sliced = config_in(tmp_path, stages=stages, training={"batch_size": 32, "accumulate": 3})
    first, _, last = (stage.memory for stage in describe(sliced).stages)
    assert first.activations == pytest.approx(6 / 16 * backbone.activations, rel=0.01)
    assert last.activations == first.activations + predictor.activations, "the predictor runs on the whole batch"
    assert last.weights == 2 * first.weights == 2 * joint.weights


@pytest.mark.parametrize(("resolutions_per_step", "indices"), [(None, [0, 1, 2, 3]), (3, [0, 1, 3])])
def test_one_backward_pass_keeps_the_activations_of_all_its_resolutions(
    tmp_path: Path, resolutions_per_step: int | None, indices: list[int]
):
    write_manifest(tmp_path)
    sides = (48, 40, 32, 24)
    config = config_in(
        tmp_path,
        model={"backbone": "small_resnet", "resolutions": sides, "predictor": {"width": 0.25, "input_size": 32}},
        training={"batch_size": 32, "backward": "together"},
        stages={"backbone": {"epochs": 1, "resolutions_per_step": resolutions_per_step}, **JOINT},
    )
    backbone, joint = (stage.memory.activations for stage in describe(config).stages)
    network = build_backbone("small_resnet", 7, len(sides))
    each = [measure_activations(network, sides[index], index).of_batch(16) for index in indices]
    assert backbone == sum(each)
    assert each[0] < joint < backbone


@pytest.mark.parametrize(("changed", "num_crops"), [({}, 6), ({"num_crops": 2}, 2), ({"logits": "live"}, None)])
def test_a_logit_table_has_two_bytes_for_each_logit(tmp_path: Path, changed: dict, num_crops: int | None):
    write_manifest(tmp_path)
    predictor = {"epochs": 6, "alpha_gflops": 0.005, **changed}
    description = describe(config_in(tmp_path, stages={"backbone": {"epochs": 1}, "predictor": predictor}))
    backbone, stage = description.stages
    assert backbone.table_bytes is None
    num_images = num_crops and num_crops * 70 + 14
    assert stage.table_bytes == (num_images and num_images * 3 * 7 * 2)
    assert ("the predictor stage keeps" in job.as_text(description)) == (num_images is not None)


@pytest.mark.parametrize("name", ["small_resnet", "resnet18", "mobilenet_v2"])
def test_activations_equal_those_of_a_real_forward_pass(name: str):
    backbone = build_backbone(name, 5, 2)
    kept = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*backbone.parameters(), *backbone.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        backbone.train()(torch.randn(3, 3, 64, 64).to(memory_format=torch.channels_last), 1)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert measure_activations(backbone, 64, 1).of_batch(3) == pytest.approx(real, rel=0.01)


def test_bfloat16_needs_less_memory_and_measuring_changes_nothing():
    backbone = build_backbone("small_resnet", 5, 2).eval()
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    random_state = torch.get_rng_state()
    full = measure_activations(backbone, 64, 0)
    half = measure_activations(backbone, 64, 0, precision="bfloat16")
    assert half.bytes_per_image < 0.75 * full.bytes_per_image
    assert not backbone.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())


CONFIG_FILE = """
name: trial
data: {{dataset: glyphs, folder: {folder}}}
model: {{backbone: small_resnet, resolutions: [64, 32], predictor: {{width: 0.25, input_size: 32}}}}
training: {{batch_size: 50}}
stages: {{backbone: {{epochs: 2}}, joint: {{epochs: 1, alpha_gflops: 0.005}}}}
"""


def run_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    file = tmp_path / "trial.yaml"
    file.write_text(CONFIG_FILE.format(folder=tmp_path / "data"))
    monkeypatch.setattr(sys, "argv", ["describe", "--config", str(file), *arguments])
    job.main()


def test_frozen_layers_have_no_backward_pass(tmp_path: Path):
    network = {"backbone": "timm/test_resnet", "resolutions": [64, 32], "predictor": {"width": 0.25, "input_size": 32}}
    expected = {}
    for layers in (0, 3):
        stages = {"backbone": {"epochs": 1, "freeze_layers": layers}}
        config = config_in(tmp_path, stages=stages, model=network)
        model = build_drnet(config.model, 10, (0.5,) * 3, (0.25,) * 3)
        images = {side: torch.zeros(12, side, side, 3, dtype=torch.uint8) for side in model.sides}
        assert config.stages.backbone
        objective = build_objective(model, config.stages.backbone, torch.ones(2))
        with FlopCounterMode(display=False) as counter:
            objective(StepBatch(images, torch.arange(12) % 10, torch.rand(12, 2), 12))
        real = counter.get_total_flops() / 2e9 / 12
        expected[layers] = describe(config).stages[0].training_gflops or 0.0
        # The estimate also counts the input gradient of the lowest trained layer.
        assert 130 * real <= expected[layers] <= 1.15 * 130 * real
    assert expected[3] < 0.8 * expected[0]


def test_frozen_layers_of_a_transformer_are_a_part_of_its_cost(tmp_path: Path):
    """Its outermost module has parameters of its own, the position embedding, in the first group of layers."""
    network = {"backbone": "timm/test_vit", "resolutions": [64, 32], "predictor": {"width": 0.25, "input_size": 32}}
    model = build_drnet(config_in(tmp_path, model=network).model, 10, (0.5,) * 3, (0.25,) * 3)
    costs = measure_costs(model).backbone_gflops
    for some, more, all_layers in zip(frozen_gflops(model, 1), frozen_gflops(model, 3), costs, strict=True):
        assert 0 < some < more < all_layers


def test_a_backward_pass_counts_as_two_forward_passes(tmp_path: Path):
    routed = {"epochs": 2, "alpha_gflops": 0.005}
    stages = {"backbone": {"epochs": 3}, "predictor": {**routed, "num_crops": 1}, "joint": routed}
    found = describe(config_in(tmp_path, stages=stages))
    *backbone, predictor = (network.gflops for network in found.networks)
    assert [stage.training_gflops for stage in found.stages] == pytest.approx(
        [
            130 * 3 * 3 * sum(backbone),
            130 * (3 * 2 * predictor + sum(backbone)),
            130 * 2 * (3 * predictor + sum(backbone) + 2 * 0.005),
        ]
    )


@pytest.mark.parametrize(
    ("stage", "backward"),
    [
        ({"backbone": {"epochs": 1, "distillation": "largest", "resolutions_per_step": 3}}, "apart"),
        ({"backbone": {"epochs": 1, "distillation": "mean"}}, "apart"),
        ({"backbone": {"epochs": 1, "distillation": "learned"}}, "together"),
        ({"predictor": {"epochs": 1, "alpha_gflops": 0.005, "logits": "live"}}, "apart"),
        ({"predictor": {"epochs": 1, "objective": "correctness", "logits": "live"}}, "apart"),
        (JOINT, "apart"),
        ({"joint": JOINT["joint"] | {"norm_statistics": "all"}}, "apart"),
    ],
)
def test_training_flops_are_those_of_real_steps(tmp_path: Path, stage: dict[str, dict[str, Any]], backward: str):
    sides, num_images = (48, 40, 32, 24), 12
    predictor = {"width": 0.25, "input_size": 32}
    changes = {
        "model": {"backbone": "small_resnet", "resolutions": sides, "predictor": predictor},
        "training": {"batch_size": 32, "backward": backward},
    }
    config = config_in(tmp_path, stages=stage, **changes)
    torch.manual_seed(0)
    model = build_drnet(config.model, 10, (0.5,) * 3, (0.25,) * 3)
    model.mean.requires_grad_()  # the first convolution then has a whole backward pass, as the estimate assumes
    images = {side: torch.randint(0, 256, (num_images, side, side, 3), dtype=torch.uint8) for side in model.sides}
    batch = StepBatch(images, torch.arange(num_images) % 10, torch.rand(num_images, len(sides)), num_images)
    costs_R = torch.tensor(measure_costs(model).backbone)
    ((name, settings),) = config.stages.present()
    objective = build_objective(model, settings, costs_R, backward=backward)
    with FlopCounterMode(display=False) as counter:
        sums = [objective(replace(batch, step=step)) for step in range(2)]
    if name == "joint":
        alpha = sum(each["gflops_backbone"].item() for each in sums) / len(sums) / num_images
        config = config_in(tmp_path, stages={name: stage[name] | {"alpha_gflops": alpha}}, **changes)
    real = counter.get_total_flops() / 2e9 / len(sums) / num_images
    assert describe(config).stages[0].training_gflops == pytest.approx(130 * real, rel=1e-3)


def test_weights_that_do_not_exist_are_listed_with_the_other_problems(tmp_path: Path):
    model = {"backbone": "resnet18", "weights": "IMAGENET1K_V9", "normalization": "weights", "resolutions": [64, 32]}
    weights, alpha = describe(config_in(tmp_path, model=model)).problems
    assert weights.startswith("model.weights: weights 'IMAGENET1K_V9' is neither a file nor one of torchvision's")
    assert alpha.startswith("stages.predictor.alpha_gflops is 0.005")


def test_the_job_prints_aligned_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    run_job(tmp_path, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if "GFLOPs" in line and "parameters" in line)
    rows = lines[lines.index(header) + 1 :][:3]
    assert [row.split()[0] for row in rows] == ["small_resnet", "small_resnet", "predictor"]
    assert {len(row) for row in rows} == {len(header)}
    joint = next(line for line in lines if line.strip().startswith("joint"))
    assert joint.split()[1:4] == ["1", "120", "120"]
    assert joint.split()[5] == "0.005"


def test_the_share_of_images_that_a_resolution_enlarges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The center crop of 72 pixels has 7/8 of them, 63, and that of 74 has enough for 64."""
    (tmp_path / "data").mkdir()
    write_manifest(tmp_path / "data")
    sizes = [(72, 200), (200, 74), (74, 74), (30, 30), (37, 99)]
    samples = [Sample(jpeg(*size), *size, 0) for size in sizes]
    write_beton(tmp_path / "data" / "validation.beton", samples, len(samples))
    run_job(tmp_path, monkeypatch)
    assert "than the resolution, so that they are enlarged: 60.0 % at 64 px, 20.0 % at 32 px" in capsys.readouterr().out


def test_the_job_prints_one_json_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    run_job(tmp_path, monkeypatch, "--json")
    tree = json.loads(capsys.readouterr().out)
    assert tree["data"]["num_classes"] == 10
    assert [network["side"] for network in tree["networks"]] == [64, 32, 32]
    assert tree["stages"][1]["reachable_gflops"] == [tree["networks"][0]["gflops"], tree["networks"][1]["gflops"]][::-1]
    assert tree["stages"][1]["memory"]["activations"] > 0


def test_the_job_shows_everything_and_fails_when_alpha_is_unreachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    with pytest.raises(ConfigError, match=r"stages\.joint\.alpha_gflops is 7"):
        run_job(tmp_path, monkeypatch, "stages.joint.alpha_gflops=7")
    assert "cost per image" in capsys.readouterr().out
