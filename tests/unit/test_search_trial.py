"""A trial equals the predictor stage of a run, bit for bit, and finds its backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets.beton import TRAIN, VALIDATION, beton_path
from datasets.loading.decoded import DecodedCrops, Ordered, Reader
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import Config
from pipeline.models.drnet import DRNet, build_configured
from pipeline.search.source import backbone_path, backbone_problems, load_backbone, model_with_backbone
from pipeline.search.space import Candidate
from pipeline.search.trial import TrialData, build_model, run_trial, table_crops
from pipeline.training.checkpoint import TrainingState, save_model
from pipeline.training.logit_table import LogitTable, TableKey, copy_table
from pipeline.training.loop import open_stage_data, train
from pipeline.training.run import Run
from tests.synthetic import manifest_of
from tests.table_runs import MANIFEST, NUM_CLASSES, config_of, loader_of, run_of, write_data

SEED = 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the predictor stage whose tables exist."""
    folder = tmp_path_factory.mktemp("trial")
    run, _ = run_of(config_of(write_data(folder), num_crops=2), folder / "tables")
    open_stage_data(run, stage_of(run.config), 0)
    return run


def stage_of(config: Config) -> Any:
    return config.stages.predictor


def candidate_of(run: Run, **changed: Any) -> Candidate:
    described = Candidate.of(run.config.model.predictor, stage_of(run.config)).described()
    return Candidate.parse({**described, **changed})


def trial_data(run: Run, folder: Path, reader: Callable[[str], Reader] | None = None) -> TrialData:
    """Trial data on copies of the run's tables."""
    tables = {}
    for split, crop_epochs in table_crops(run.config).items():
        key = TableKey.of(run.model, run.config, MANIFEST, split)
        copy_table(run.tables, folder, key, crop_epochs)
        tables[split] = LogitTable(folder, key, crop_epochs)
    readers = {split: (reader or (lambda split: loader_of(run.config, split)))(split) for split in tables}
    return TrialData(
        config=run.config,
        context="context",
        backbone=run.model.backbone,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        manifest=MANIFEST,
        train_table=tables[TRAIN],
        validation_table=tables[VALIDATION],
        train=lambda seed: Ordered(readers[TRAIN], 8, shuffle=True, seed=seed),
        validation=Ordered(readers[VALIDATION], 8, shuffle=False, seed=0),
        device=torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def data(run: Run, tmp_path_factory: pytest.TempPathFactory) -> TrialData:
    return trial_data(run, tmp_path_factory.mktemp("copied"))


def test_a_trial_equals_the_predictor_stage_of_a_run_bit_for_bit(run: Run, data: TrialData) -> None:
    record, weights = run_trial(data, candidate_of(run), SEED)
    torch.manual_seed(SEED)
    predictor = build_configured(run.config.model.predictor, 2)
    model = DRNet(run.model.backbone, predictor, run.model.resolutions, 24, (0.5,) * 3, (0.25,) * 3)
    expected = replace(run, model=model.to(memory_format=torch.channels_last), reporter=type(run.reporter)())
    train(expected)
    assert weights is not None
    for key, value in expected.model.predictor.state_dict().items():
        assert torch.equal(weights[key], value), key
    last = expected.reporter.values[-1]
    assert (record.accuracy, record.gflops) == (last["accuracy_routed"], last["gflops_routed"])
    assert record.shares == tuple(last[f"share_{side}"] for side in (48, 32))
    assert len(record.choices) == 11
    assert record.outcome in ("finished", "collapsed")
    assert record.chosen_N.tolist().count(0) / 11 == pytest.approx(record.shares[0])


def test_decoded_crops_give_the_same_trial(run: Run, data: TrialData, tmp_path: Path) -> None:
    def decoded(split: str) -> Reader:
        beton = beton_path(run.config.data.folder, split)
        crops = DecodedCrops(tmp_path / "decoded", beton, {"split": split}, range(2), (24,))
        crops.fill(loader_of(run.config, split))
        return crops

    with_loader, weights = run_trial(data, candidate_of(run), SEED)
    with_crops, others = run_trial(trial_data(run, tmp_path / "tables", decoded), candidate_of(run), SEED)
    assert weights is not None
    assert others is not None
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    assert with_loader.choices == with_crops.choices


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_trial_uses_the_memory_layout_of_a_run(run: Run, data: TrialData, channels_last: bool) -> None:
    training = run.config.training.model_copy(update={"channels_last": channels_last})
    model, _ = build_model(data, run.config.model_copy(update={"training": training}), SEED)
    weight = next(weight for weight in model.predictor.parameters() if weight.ndim == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert model.memory_format == (torch.channels_last if channels_last else torch.contiguous_format)


def test_seeds_and_candidates_differ_and_do_not_depend_on_the_trial_before(run: Run, data: TrialData) -> None:
    first, weights = run_trial(data, candidate_of(run), SEED)
    _, other_seed = run_trial(data, candidate_of(run), SEED + 1)
    larger, _ = run_trial(data, candidate_of(run, blocks=[2, 1], lr=0.01), SEED)
    again, same = run_trial(data, candidate_of(run), SEED)
    assert weights is not None
    assert other_seed is not None
    assert same is not None
    assert any(not torch.equal(weights[key], other_seed[key]) for key in weights)
    assert all(torch.equal(weights[key], same[key]) for key in weights)
    assert first.choices == again.choices
    assert larger.predictor_gflops
    assert first.predictor_gflops
    assert larger.predictor_gflops > first.predictor_gflops
    assert len({first.key, larger.key, replace(first, seed=1).key}) == 3


def test_a_diverged_trial_is_recorded_with_its_reason(run: Run, data: TrialData) -> None:
    record, weights = run_trial(data, candidate_of(run, lr=1e30), SEED)
    assert weights is None
    assert record.outcome == "diverged"
    assert "training diverged in stage predictor, epoch 1 of 3" in (record.reason or "")
    assert record.accuracy is None
    assert not record.has_result


def test_a_collapsed_trial_is_recorded_with_its_reason(run: Run, data: TrialData) -> None:
    predictor = run.config.model.predictor.model_copy(update={"initial_shares": (99.0, 1.0)})
    model = run.config.model.model_copy(update={"predictor": predictor})
    starts_collapsed = replace(data, config=run.config.model_copy(update={"model": model}))
    record, _ = run_trial(starts_collapsed, candidate_of(run, lr=1e-9), SEED)
    assert record.outcome == "collapsed"
    assert "the predictor has collapsed: 100.0 % of the validation images go to 48 px" in (record.reason or "")
    assert record.has_result
    assert record.shares == (1.0, 0.0)


def test_every_epoch_is_evaluated_and_reported_if_asked(run: Run, data: TrialData) -> None:
    reported: list[tuple[int, float]] = []
    record, _ = run_trial(
        data, candidate_of(run), SEED, lambda done, values: reported.append((done, values["gflops_routed"]))
    )
    assert [done for done, _ in reported] == [1, 2, 3]
    assert reported[-1][1] == record.gflops


def save_trained(run: Run, path: Path) -> Path:
    classes = [str(label) for label in range(NUM_CLASSES)]
    save_model(path, run.model, run.config, classes=classes)
    return path


def test_a_backbone_comes_from_a_run_a_model_or_a_checkpoint(run: Run, tmp_path: Path) -> None:
    save_trained(run, tmp_path / "model.pt")
    state = TrainingState.finished(run.model, run.config, MANIFEST.digest)
    (tmp_path / "checkpoint").mkdir()
    state.save(tmp_path / "checkpoint" / "state.pt")
    for named in (tmp_path, tmp_path / "model.pt", tmp_path / "checkpoint", tmp_path / "checkpoint" / "state.pt"):
        search = run.config.search.model_copy(update={"backbone": str(named)})
        config = run.config.model_copy(update={"search": search})
        trained = load_backbone(backbone_path(config))
        assert list(backbone_problems(trained, config, MANIFEST)) == []
        model = model_with_backbone(trained, config, NUM_CLASSES)
        for (key, value), expected in zip(
            model.backbone.state_dict().items(), run.model.backbone.state_dict().values(), strict=True
        ):
            assert torch.equal(value, expected), key
        keys = [TableKey.of(one, config, MANIFEST, TRAIN).digest for one in (model, run.model)]
        assert keys[0] == keys[1], "so its table is found"


def test_the_backbone_of_a_run_is_the_one_from_before_its_joint_stage(run: Run, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / run.config.name)
    folder.path.mkdir()
    cluster = run.config.cluster.model_copy(update={"storage": tmp_path})
    own = run.config.model_copy(update={"cluster": cluster})
    named = own.model_copy(update={"search": own.search.model_copy(update={"backbone": str(folder.path)})})
    for expected in (folder.model, folder.backbone):  # one after the other is written
        save_trained(run, expected)
        assert [backbone_path(config) for config in (own, named)] == [expected] * 2


def test_every_mismatch_of_a_backbone_is_reported(run: Run, tmp_path: Path) -> None:
    trained = load_backbone(save_trained(run, tmp_path / "model.pt"))
    other = run.config.model_copy(
        update={"model": run.config.model.model_copy(update={"resolutions": (64, 32), "backbone_width": 1.0})}
    )
    problems = "\n".join(backbone_problems(trained, other, manifest_of(5, 5, 3)))
    assert "resolutions [48, 32], but model.resolutions is [64, 32]" in problems
    assert "backbone_width" in problems
    assert "knows 7 classes (0, 1, 2, ...), but the data" in problems
    misfit = replace(trained, state={"network.fc.bias": torch.zeros(7)})
    with pytest.raises(ValueError, match="is not a small_resnet"):
        model_with_backbone(misfit, run.config, NUM_CLASSES)
    of_state = replace(trained, classes=None, data_digest="0" * 32)
    assert "trained on other data" in "\n".join(backbone_problems(of_state, run.config, MANIFEST))


def test_without_a_trained_backbone_the_error_says_what_to_do(run: Run, tmp_path: Path) -> None:
    cluster = run.config.cluster.model_copy(update={"storage": tmp_path})
    config = run.config.model_copy(update={"cluster": cluster})
    with pytest.raises(ValueError, match=r"no trained model at .*model\.pt; train it first"):
        backbone_path(config)
    (tmp_path / "text.pt").write_text("no model")
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        load_backbone(tmp_path / "text.pt")
