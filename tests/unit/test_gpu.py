"""Tests that need a GPU, without Ray, MLflow and FFCV: `pytest --noconftest -m gpu tests/unit/test_gpu.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.step import STAGES, naive_step, our_step, placed
from pipeline.config.schema import ModelConfig, PredictorConfig
from pipeline.models.backbone import compile_backbone
from pipeline.models.cost import measure_latency
from pipeline.serving.export import export_model
from pipeline.serving.runtime import Placement, RoutedNetwork
from pipeline.serving.runtime.programs import GraphedProgram, filled_size
from pipeline.training.checkpoint import LoadedModel
from tests.small import batch_of, small_model

STEPS = 3


def test_sizes_are_filled_up_by_an_eighth_at_most() -> None:
    sizes = {count: filled_size(count) for count in range(1, 257)}
    assert all(count <= size <= 1.125 * count for count, size in sizes.items())
    assert len(set(sizes.values())) == 48


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    config = ModelConfig(
        backbone="small_resnet", resolutions=(48, 32, 24), predictor=PredictorConfig(input_size=32, width=0.25)
    )
    export_model(LoadedModel(small_model(), config, tuple("abcde"), (0.5,) * 3, (0.25,) * 3, 0.875), folder)
    return folder


def crops(count: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return {
        side: torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
        for side in (48, 32, 24)
    }


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_answers_as_the_cpu(programs: Path, compiled: bool) -> None:
    on_cpu, on_gpu = (
        RoutedNetwork(programs, Placement("cpu")),
        RoutedNetwork(programs, Placement("cuda", compiled=compiled)),
    )
    for count in (41, 1, 300, 41):
        expected, found = on_cpu.classify(crops(count)), on_gpu.classify(crops(count))
        assert torch.equal(expected.choice_N, found.choice_N)
        torch.testing.assert_close(found.logits_NK, expected.logits_NK, rtol=1e-2, atol=1e-2)
        assert torch.equal(found.logits_NK, on_gpu.classify(crops(count)).logits_NK)


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_is_near(programs: Path) -> None:
    exact, rough = (RoutedNetwork(programs, Placement("cuda", precision)) for precision in ("float32", "bfloat16"))
    expected, found = exact.logits(0, crops(41)[48]), rough.logits(0, crops(41)[48])
    assert not torch.equal(expected, found)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


@pytest.mark.gpu
def test_images_that_fill_up_a_recording_are_not_in_the_result() -> None:
    program = GraphedProgram(lambda images: images.float().sum(dim=(1, 2)), torch.device("cuda"))
    for count in (40, 33, 9):
        images = crops(count)[24]
        assert torch.equal(program(images.pin_memory()).cpu(), images.float().sum(dim=(1, 2)))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("stage", "precision", "compiled"),
    [
        ("backbone", "float32", False),
        ("backbone", "bfloat16", False),
        ("backbone", "float32", True),
        ("joint", "float32", False),
        ("joint", "bfloat16", False),
    ],
)
def test_steps_on_a_gpu_are_those_on_a_cpu(
    stage: str, precision: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", False)
    ours, plain = small_model().to("cuda", memory_format=torch.channels_last), small_model()
    if compiled:
        compile_backbone(ours.backbone)
    our, naive = our_step(ours, STAGES[stage], precision), naive_step(plain, STAGES[stage])
    for number in range(STEPS):
        batch = batch_of(16)
        wanted_NR = torch.nn.functional.one_hot((torch.arange(16) + number) % 3, 3)
        batch = replace(batch, gumbel_NR=batch.gumbel_NR + 6.0 * wanted_NR)
        naive(batch)
        our(placed(batch, "cuda"))
    state = plain.state_dict()
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if precision == "float32" else {"rtol": 0.1, "atol": 0.05}
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value.cpu(), state[name], **tolerance, msg=name)


@pytest.mark.gpu
def test_a_gpu_is_named_and_waited_for() -> None:
    found = measure_latency(small_model().cuda(), batch_size=64, precision="bfloat16")
    assert found.device == torch.cuda.get_device_name(0)
    assert min(found.backbone_milliseconds) > 0
