"""The logit table equals the live backbone, is repaired, is found by its key, and can be trained on."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from datasets.beton import TRAIN, VALIDATION
from datasets.loading.loader import MultiResolutionLoader
from pipeline.config.schema import Config, PredictorConfig
from pipeline.models.drnet import DRNet
from pipeline.models.predictor import ARCHITECTURES, build_predictor
from pipeline.training.logit_table import LogitTable, TableError, TableKey, UnfillableTableError, chunk_path, fill_table
from pipeline.training.loop import StageData, StageState, evaluate, open_stage_data, train, train_epoch
from pipeline.training.monitoring import DivergenceMonitor, Meter
from pipeline.training.objectives import Forward, build_objective
from pipeline.training.optim import build_optimizer
from pipeline.training.run import Progress, Run
from tests.synthetic import Recorder, manifest_of
from tests.table_runs import (
    MANIFEST,
    NUM_CLASSES,
    NUM_TRAIN,
    NUM_VALIDATION,
    config_of,
    loader_of,
    model_of,
    run_of,
    write_data,
)

CROP_EPOCHS = [2, 5]
FLOAT16 = {"rtol": 2.0**-11, "atol": 1e-5}
"""Half a unit in the last place of float16, and the difference of float32 sums in batches of other sizes."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return config_of(write_data(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def loader(config: Config) -> MultiResolutionLoader:
    return loader_of(config, TRAIN)


@pytest.fixture(scope="module")
def model(config: Config) -> DRNet:
    return model_of(config)


@pytest.fixture(scope="module")
def key(config: Config, model: DRNet) -> TableKey:
    """The key of a table with 4 files for each epoch of crops: 8 samples each, and 5 in the last."""
    return replace(TableKey.of(model, config, MANIFEST, TRAIN), chunk_samples=8)


class Backbone:
    """A frozen backbone that counts its batches, and stops like a killed process before one of them."""

    def __init__(self, model: DRNet, dies_before: int | None = None):
        self.forward, self.batches, self.dies_before = Forward(model, "float32"), 0, dies_before

    def __call__(self, images: Mapping[int, Tensor]) -> Tensor:
        if self.batches == self.dies_before:
            raise KeyboardInterrupt
        self.batches += 1
        return self.forward.frozen_backbone(images)


Fill = Callable[..., int]


@pytest.fixture
def fill(key: TableKey, loader: MultiResolutionLoader, model: DRNet, tmp_path: Path) -> Fill:
    """Fill the table in tmp_path; return the number of computed files."""

    def run(dies_before: int | None = None) -> int:
        backbone = Backbone(model, dies_before)
        fill_table(tmp_path, key, CROP_EPOCHS, loader, backbone, device=torch.device("cpu"), show=lambda text: None)
        return backbone.batches

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flip_a_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_the_table_holds_the_live_logits(fill: Fill, key: TableKey, loader, model: DRNet, tmp_path: Path) -> None:
    assert fill() == 2 * 4
    table, forward = LogitTable(tmp_path, key, CROP_EPOCHS), Forward(model, "float32")
    for crop_epoch in (*CROP_EPOCHS, *CROP_EPOCHS):  # and back again
        for batch in loader.epoch(crop_epoch):
            found_NRK = table.logits(crop_epoch, batch.indices)
            assert (found_NRK.shape, found_NRK.dtype) == ((len(batch.labels), 2, NUM_CLASSES), torch.float32)
            torch.testing.assert_close(found_NRK, forward.frozen_backbone(batch.images), **FLOAT16)
    first, last = (table.logits(crop_epoch, torch.tensor([3])) for crop_epoch in CROP_EPOCHS)
    assert not torch.allclose(first, last, rtol=1e-2), "epochs are different crops"


def test_predictor_training_mode_and_memory_format_do_not_matter_to_the_key(config: Config, key: TableKey) -> None:
    other = model_of(config).to(memory_format=torch.channels_last).train()
    torch.nn.init.ones_(other.predictor.fc.bias)
    again = TableKey.of(other, config, MANIFEST, TRAIN)
    assert replace(again, chunk_samples=8).digest == key.digest


@pytest.mark.parametrize("dies_before", [0, 1, 5])
def test_a_killed_computation_resumes_at_its_last_file(
    fill: Fill, dies_before: int, key: TableKey, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill(dies_before)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("chunk-*")}
    assert len(before) == dies_before
    at_work = chunk_path(tmp_path / key.digest, CROP_EPOCHS[dies_before // 4], chunk=dies_before % 4)
    at_work.with_name(f".{at_work.name}.partial").write_bytes(b"half a file")  # what SIGKILL leaves
    assert fill() == 8 - dies_before
    assert {path: path.stat().st_mtime_ns for path in before} == before
    resumed = contents(tmp_path)
    for path in tmp_path.rglob("chunk-*"):
        path.unlink()
    assert fill() == 8
    assert contents(tmp_path) == resumed
    assert fill() == 0


def test_an_incomplete_table_is_not_opened(fill: Fill, key: TableKey, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill(dies_before=6)
    LogitTable(tmp_path, key, CROP_EPOCHS[:1])
    with pytest.raises(TableError, match=r"epoch 5 lacks 2 of its 4 files, the first .*crops-00005/chunk-00002\.npy"):
        LogitTable(tmp_path, key, CROP_EPOCHS)


DAMAGE = {
    "a flipped bit of a logit": lambda path: flip_a_byte(path, 200),
    "of the header": lambda path: flip_a_byte(path, 10),
    "of the checksum": lambda path: flip_a_byte(path, -1),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "another file": lambda path: path.write_bytes(path.with_name("chunk-00003.npy").read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_is_detected_and_computed_again(fill: Fill, damage, key: TableKey, tmp_path: Path) -> None:
    fill()
    whole, path = contents(tmp_path), chunk_path(tmp_path / key.digest, crop_epoch=5, chunk=1)
    damage(path)
    table = LogitTable(tmp_path, key, CROP_EPOCHS)
    table.logits(2, torch.arange(NUM_TRAIN))
    table.logits(5, torch.arange(8))
    with pytest.raises(TableError, match=r"crops-00005/chunk-00001\.npy of the logit table is missing or damaged"):
        table.logits(5, torch.tensor([0, 8]))
    assert fill() == 1
    assert contents(tmp_path) == whole
    LogitTable(tmp_path, key, CROP_EPOCHS).logits(5, torch.tensor([0, 8]))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"data": "other"}, "data is '"),
        ({"seed": 1}, r"crop is \{'seed': 0, .*, expected \{'seed': 1"),
        ({"crop_scale": (0.5, 1.0)}, "crop is "),
        ({"flip": False}, "crop is "),
        ({"precision": "bfloat16"}, "precision is 'float32', expected 'bfloat16'"),
        ({"weights": 2}, "backbone is '"),
    ],
    ids=str,
)
def test_another_table_is_refused_with_the_differences(
    fill: Fill, changed: dict, named: str, config: Config, tmp_path: Path
) -> None:
    fill()
    loader = {name: changed[name] for name in ("crop_scale", "flip") if name in changed}
    training = {name: changed[name] for name in ("precision",) if name in changed}
    other = config.model_copy(
        update={
            "seed": changed.get("seed", config.seed),
            "loader": config.loader.model_copy(update=loader),
            "training": config.training.model_copy(update=training),
        }
    )
    model = model_of(config, seed=changed.get("weights", 1))
    manifest = manifest_of(NUM_TRAIN, NUM_VALIDATION, NUM_CLASSES, changed.get("data", ""))
    wanted = TableKey.of(model, other, manifest, TRAIN)
    with pytest.raises(TableError, match=named) as error:
        LogitTable(tmp_path, replace(wanted, chunk_samples=8), CROP_EPOCHS)
    assert str(error.value).count("expected") == 1


def test_the_key_depends_on_the_normalization(config: Config, key: TableKey) -> None:
    model = model_of(config)
    model.mean[0] += 0.01
    assert TableKey.of(model, config, MANIFEST, TRAIN).backbone != key.backbone


def test_an_empty_folder_and_a_wrong_table_json_differ_in_error(fill: Fill, key: TableKey, tmp_path: Path) -> None:
    with pytest.raises(TableError, match="It has no other tables"):
        LogitTable(tmp_path / "empty", key, CROP_EPOCHS)
    fill()
    path = tmp_path / key.digest / "table.json"
    path.write_text(path.read_text().replace("float32", "bfloat16"))
    with pytest.raises(TableError, match="precision is 'bfloat16', expected 'float32'"):
        LogitTable(tmp_path, key, CROP_EPOCHS)
    path.write_text("{")
    with pytest.raises(TableError, match=r"its table\.json is damaged"):
        LogitTable(tmp_path, key, CROP_EPOCHS)


@pytest.mark.parametrize(("crop_epoch", "index"), [(3, 0), (2, NUM_TRAIN), (2, -1)])
def test_a_table_reads_only_the_epochs_it_was_opened_for(
    fill: Fill, key: TableKey, crop_epoch: int, index: int, tmp_path
) -> None:
    fill()
    with pytest.raises(
        ValueError, match=rf"opened for crops of the epochs \[2, 5\] and has samples 0 to {NUM_TRAIN - 1}"
    ):
        LogitTable(tmp_path, key, CROP_EPOCHS).logits(crop_epoch, torch.tensor([index]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 65520.0])
def test_logits_beyond_float16_are_an_error_that_names_the_sample(key: TableKey, loader, tmp_path: Path, value) -> None:
    def backbone(images: Mapping[int, Tensor]) -> Tensor:
        logits_NRK = torch.zeros(len(images[48]), 2, NUM_CLASSES)
        logits_NRK[3, 1, 4] = value
        return logits_NRK

    with pytest.raises(UnfillableTableError, match=r"float16 .* for sample 3 of train at 32 px"):
        fill_table(tmp_path, key, [0], loader, backbone, device=torch.device("cpu"), show=print)


def test_a_full_disk_is_an_error_before_anything_is_computed(key: TableKey, loader, model, tmp_path: Path) -> None:
    huge, backbone = replace(key, num_classes=10**15), Backbone(model)
    with pytest.raises(UnfillableTableError, match=r"needs .* GB more .* stages\.predictor\.num_crops"):
        fill_table(tmp_path, huge, [0], loader, backbone, device=torch.device("cpu"), show=print)
    assert backbone.batches == 0


def trained(config: Config, tables: Path, **predictor) -> tuple[Run, Recorder]:
    run, recorder = run_of(config_of(config.data.folder, **predictor), tables)
    train(run)
    return run, recorder


@pytest.mark.parametrize("num_crops", [None, 2])
def test_training_on_the_table_is_live_training_up_to_rounding(config: Config, num_crops, tmp_path: Path) -> None:
    live_run, live = trained(config, tmp_path, logits="live", num_crops=num_crops)
    assert not any(tmp_path.iterdir())
    table_run, table = trained(config, tmp_path, num_crops=num_crops)
    assert table.losses == pytest.approx(live.losses, rel=1e-3)
    assert table.losses != live.losses
    for found, expected in zip(table.values, live.values, strict=True):
        timed = ("per_second", "seconds", "share")
        names = [name for name in expected if not (name.startswith("train_") and name.endswith(timed))]
        assert {name: found[name] for name in names} == pytest.approx(
            {name: expected[name] for name in names}, rel=1e-3
        )
    for (name, value), expected in zip(
        table_run.model.state_dict().items(), live_run.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-4, msg=name)
    whole = [line for line in table.messages if f"  {NUM_TRAIN} images  " in line]
    assert len(whole) == len(list(tmp_path.rglob("crops-*"))) - 1 == (num_crops or 3)


def test_epochs_take_the_crops_in_turn(config: Config, tmp_path: Path) -> None:
    run, _ = run_of(config_of(config.data.folder, num_crops=2, epochs=5), tmp_path)
    data = open_stage_data(run, run.config.stages.predictor, first_epoch=7)
    assert [data.crop_epoch(epoch) for epoch in range(7, 12)] == [7, 8, 7, 8, 7]
    for epoch in (8, 10):
        shown = {index: row for batch in run.train.epoch(8) for index, row in _rows(batch, 24)}
        assert dict(row for batch in data.epoch(epoch) for row in _rows(batch, 24)) == shown
    assert [batch.indices.tolist() for batch in data.epoch(10)] == [
        batch.indices.tolist() for batch in run.train.epoch(10)
    ]
    indices_N = torch.arange(NUM_TRAIN)
    assert torch.equal(data.logits(8, indices_N), data.logits(10, indices_N))
    assert not torch.equal(data.logits(8, indices_N), data.logits(9, indices_N))


def _rows(batch, side: int) -> list[tuple[int, bytes]]:
    return [(index, batch.images[side][n].numpy().tobytes()) for n, index in enumerate(batch.indices.tolist())]


def test_steps_and_evaluations_do_not_run_the_backbone(config: Config, tmp_path: Path) -> None:
    trained(config, tmp_path)
    run, recorder = run_of(config_of(config.data.folder), tmp_path)
    sides = set()
    run.model.backbone.register_forward_pre_hook(lambda *_: pytest.fail("the backbone ran"))
    run.model.predictor.register_forward_pre_hook(lambda _, inputs: sides.add(inputs[0].shape[2]))
    train(run)
    assert sides == {24}
    assert len(recorder.values) == 3
    assert recorder.messages == []


def test_computing_a_table_is_a_phase_of_the_goodput(config: Config, tmp_path: Path) -> None:
    live, _ = trained(config, tmp_path, logits="live")
    table, _ = trained(config, tmp_path)
    assert live.goodput.seconds["table"] == 0
    assert table.goodput.seconds["table"] > 0


@pytest.mark.parametrize("lost", ["nothing", "a file of the table", "the table"])
def test_a_resumed_stage_ends_with_the_same_bits(config: Config, lost: str, tmp_path: Path) -> None:
    expected, recorder = trained(config, tmp_path)
    files = sorted(tmp_path.rglob("crops-*/*.npy"))
    if lost == "a file of the table":
        flip_a_byte(files[1], 300)
    elif lost == "the table":
        for path in files:
            path.unlink()
    run, resumed = run_of(config_of(config.data.folder), tmp_path)
    train(run, recorder.states[0])
    assert len(resumed.messages) == {"nothing": 0, "a file of the table": 1, "the table": 4}[lost]
    assert resumed.losses == recorder.losses[4:]
    for (name, value), other in zip(run.model.state_dict().items(), expected.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_the_validation_table_has_the_center_crop(config: Config, model: DRNet, tmp_path: Path) -> None:
    run, _ = run_of(config, tmp_path)
    data = open_stage_data(run, config.stages.predictor, first_epoch=0)
    assert data.validation_table.key.crop == {"centre": 0.875, "decoded_for": 48}
    for batch in loader_of(config, VALIDATION).epoch(0):
        live_NRK = Forward(model, "float32").frozen_backbone(batch.images)
        torch.testing.assert_close(data.validation_logits(batch.indices), live_NRK, **FLOAT16)


def test_a_predictor_of_any_size_trains_on_a_copy_without_a_backbone(config: Config, tmp_path: Path) -> None:
    """A trial of a search does this: it has the keys, and a node-local copy of the tables."""
    made, _ = run_of(config, tmp_path / "shared")
    tables = open_stage_data(made, config.stages.predictor, first_epoch=0)
    keys = pickle.loads(pickle.dumps([tables.train_table.key, tables.validation_table.key]))
    shutil.copytree(tmp_path / "shared", tmp_path / "local")
    shutil.rmtree(tmp_path / "shared")

    sized = config.model.model_copy(update={"predictor": PredictorConfig(input_size=20)})
    small = config.model_copy(update={"model": sized})
    predictor = build_predictor(ARCHITECTURES[4], 2, width=0.25)
    model = DRNet(torch.nn.Identity(), predictor, [48, 32], 20, (0.5,) * 3, (0.25,) * 3)
    loaders = loader_of(small, TRAIN), loader_of(small, VALIDATION)
    local = [
        LogitTable(tmp_path / "local", key, crop_epochs)
        for key, crop_epochs in zip(keys, (range(3), range(1)), strict=True)
    ]
    data = StageData(*loaders, 0, 3, (20,), *local)
    recorder, stage = Recorder(), config.stages.predictor
    run = replace(made, config=small, model=model, train=loaders[0], validation=loaders[1], reporter=recorder)
    objective = build_objective(model, stage, torch.tensor(run.costs.backbone_gflops))
    before = copy.deepcopy(predictor.fc.weight)
    work = StageState(stage, data, objective, build_optimizer(model, stage), None, DivergenceMonitor(None), Meter())
    train_epoch(run, work, Progress("predictor", 0, 3, 0, 0, 4))
    values = evaluate(model, data.validation_epoch(), run.costs, data.validation_logits)

    assert len(recorder.losses) == 4
    assert not torch.equal(predictor.fc.weight, before)
    expected = evaluate(made.model, made.validation.epoch(0), made.costs)
    for name in ("accuracy_48", "accuracy_32"):
        assert values[name] == expected[name]


def test_a_file_can_be_read_by_numpy(fill: Fill, key: TableKey, tmp_path: Path) -> None:
    fill()
    logits_NRK = np.load(chunk_path(tmp_path / key.digest, crop_epoch=2, chunk=3))
    assert (logits_NRK.shape, logits_NRK.dtype) == ((5, 2, NUM_CLASSES), np.float16)
