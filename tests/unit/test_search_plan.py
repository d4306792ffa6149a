"""The order of a search's trials, without Ray's cluster, and the checks before the first trial."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from datasets.beton import VALIDATION, load_manifest
from datasets.prepare.prepare import prepare
from datasets.sources.glyphs import GlyphSettings
from pipeline.cluster.preflight import Capacity
from pipeline.config.load import ConfigError
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import Config
from pipeline.evaluation.predictions import collect_predictions
from pipeline.models.drnet import build_drnet
from pipeline.search import driver
from pipeline.search.checks import (
    check_search,
    describe_search,
    search_work,
    trial_resources,
    trials_at_once,
    trials_fitting,
)
from pipeline.search.driver import finetune, finetuned_config, start_file
from pipeline.search.front import summarize
from pipeline.search.records import Record, SearchFolder
from pipeline.search.space import Candidate, input_sizes, paper_candidates, predictor_gflops, space_of
from pipeline.search.trial import EPOCH, SCORE, SearchSettings, table_crops, trial_data, tune_trial
from pipeline.search.tuner import PatientASHA, TrialSearcher, records_in
from pipeline.training.assembly import open_loader
from pipeline.training.checkpoint import load_model, save_model
from pipeline.training.logit_table import TableKey, fill_table
from pipeline.training.objectives import Forward
from tests.search_cases import BACKBONE_GFLOPS, SPACE, config_of, correct_of, record_of


def settings_of(folder: Path, **search: Any) -> SearchSettings:
    config = config_of(folder, **search)
    return SearchSettings(config, SearchFolder.of(config), "digest", "context", cpus=1)


def test_asha_ignores_a_trial_without_a_score() -> None:
    scheduler = PatientASHA(epochs=3, grace_epochs=1)
    drawn = SimpleNamespace(trial_id="a", config={"to_the_end": False}, status=Trial.RUNNING)
    scheduler.on_trial_add(None, drawn)
    diverged = {EPOCH: 2, SCORE: None}
    assert scheduler.on_trial_result(None, drawn, diverged) == TrialScheduler.CONTINUE
    scheduler.on_trial_complete(None, drawn, diverged)


def test_asha_stops_the_worse_trial_but_not_after_its_last_epoch() -> None:
    for epoch, expected in ((1, TrialScheduler.STOP), (4, TrialScheduler.CONTINUE)):
        scheduler = PatientASHA(epochs=4, grace_epochs=1)
        trials = [SimpleNamespace(trial_id=name, config={"to_the_end": False}, status=Trial.RUNNING) for name in "ab"]
        for trial in trials:
            scheduler.on_trial_add(None, trial)
        scheduler.on_trial_result(None, trials[0], {EPOCH: epoch, SCORE: 0.9})
        scheduler.on_trial_complete(None, trials[0], {EPOCH: epoch, SCORE: 0.9})
        assert scheduler.on_trial_result(None, trials[1], {EPOCH: epoch, SCORE: 0.1}) == expected


def searcher_of(settings: SearchSettings, ended: list[Record] | None = None, num_drawn: int = 3) -> TrialSearcher:
    config = settings.config
    fixed = list(paper_candidates(config).values())

    def finalists(records: Sequence[Record]) -> Iterable[Candidate]:
        best = max((record for record in records if record.has_result), key=lambda record: record.accuracy or 0)
        return [*fixed, *([best.candidate] if best.candidate not in fixed else [])]

    space = space_of(config, BACKBONE_GFLOPS)
    return TrialSearcher(settings, space, fixed, num_drawn, finalists, (ended if ended is not None else []).append)


def run_to_the_end(
    searcher: TrialSearcher,
    settings: SearchSettings,
    trial: Callable[[Candidate, int], Record | None],
    stop_after: int = 999,
) -> list[tuple[Candidate, int]]:
    """Run two trials at once, as Tune does; return the trials in their order."""
    tried: list[tuple[Candidate, int]] = []
    running: list[str] = []
    while len(tried) < stop_after:
        suggested = searcher.suggest(f"trial-{len(tried)}")
        if suggested == Searcher.FINISHED:
            assert not running
            return tried
        if suggested is not None:
            assert isinstance(suggested, dict)
            tried.append((Candidate.parse(suggested["candidate"]), suggested["seed"]))
            running.append(f"trial-{len(tried) - 1}")
        if suggested is None or len(running) == 2:
            ended = running.pop(0)
            candidate, seed = tried[int(ended.split("-")[1])]
            record = trial(candidate, seed)
            if record is not None:
                settings.records.write(record)
            searcher.on_trial_complete(
                ended, {"accuracy": 1.0, "gflops": 1.0} if record else None, error=record is None
            )
    return tried


def finished(candidate: Candidate, seed: int) -> Record:
    """Return a record in which wider predictors are better and more expensive."""
    return record_of(candidate, min(1.0, 2 * candidate.width + 0.1 * len(candidate.blocks)), seed)


def test_the_papers_four_come_first_then_drawn_ones_then_the_seeds_of_the_best(tmp_path: Path) -> None:
    settings, records = settings_of(tmp_path), []
    searcher = searcher_of(settings, records)
    assert not searcher.is_over
    pickle.dumps(searcher)  # as Ray Tune does
    tried = run_to_the_end(searcher, settings, finished)
    fixed = list(paper_candidates(settings.config).values())
    assert [candidate for candidate, _ in tried[:4]] == fixed
    assert [seed for _, seed in tried] == [0] * 7 + [1] * (len(tried) - 7)
    assert {candidate for candidate, seed in tried if seed == 1} >= set(fixed)
    assert len(set(tried)) == len(tried) == len(records) == searcher.num_done
    assert searcher.is_over


def test_finished_trials_are_not_repeated(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    before = run_to_the_end(searcher_of(settings), settings, finished, stop_after=6)
    done = {(record.candidate, record.seed) for record in settings.records.read("context")}
    searcher = searcher_of(settings)
    assert searcher.num_done == len(done)
    after = run_to_the_end(searcher, settings, finished)
    assert not done & set(after)
    assert set(before) - done <= {*after} | {*before}, "an unfinished candidate may not be drawn again"
    drawn = {candidate for candidate, seed in done | set(after) if seed == 0}
    assert len(drawn) == 4 + 3
    assert searcher_of(settings).is_over
    assert run_to_the_end(searcher_of(settings), settings, finished) == []


def test_a_later_search_can_ask_for_more_trials(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    run_to_the_end(searcher_of(settings), settings, finished)
    more = searcher_of(settings, num_drawn=5)
    assert not more.is_over
    assert len([seed for _, seed in run_to_the_end(more, settings, finished) if seed == 0]) == 2


def test_trials_outside_a_narrowed_space_do_not_count(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    run_to_the_end(searcher_of(settings), settings, finished)
    fixed = list(paper_candidates(settings.config).values())
    for narrowed in (
        {"preset": "paper"},
        {"space": SPACE | {"max_gflops": 1e-9}},
        {"space": SPACE | {"width": [0.5, 0.5]}},
    ):
        narrow = settings_of(tmp_path, **narrowed)
        space = space_of(narrow.config, BACKBONE_GFLOPS)
        assert {record.candidate for record in records_in(space, fixed, narrow)} == set(fixed)
        assert searcher_of(narrow).num_done == 4 * 2
    fewer = settings_of(tmp_path, seeds=1)
    assert {record.seed for record in records_in(space_of(fewer.config, BACKBONE_GFLOPS), fixed, fewer)} == {0}


def test_records_of_another_backbone_are_not_counted(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    run_to_the_end(searcher_of(settings), settings, finished)
    other = replace(settings, context="another")
    assert searcher_of(other).num_done == 0
    assert settings.records.read("another") == []


def test_a_trial_whose_process_died_is_recorded_and_tried_again_after_a_restart(tmp_path: Path) -> None:
    settings, records = settings_of(tmp_path), []
    first = paper_candidates(settings.config)[1]
    searcher = searcher_of(settings, records)
    run_to_the_end(searcher, settings, lambda one, seed: None if one == first else finished(one, seed))
    died = [record for record in records if record.outcome == "failed"]
    assert {(record.candidate, record.seed) for record in died} == {(first, 0), (first, 1)}
    assert "its process died 3 times" in (died[0].reason or "")
    assert searcher.is_over
    assert set(run_to_the_end(searcher_of(settings), settings, finished)) == {(first, 0), (first, 1)}


def test_a_process_that_dies_is_not_explained_by_the_error_of_an_earlier_attempt(tmp_path: Path) -> None:
    settings, records = settings_of(tmp_path), []
    first = paper_candidates(settings.config)[1]
    settings.records.write(record_of(first, outcome="failed", reason="an earlier error", accuracy=None, gflops=None))
    searcher = searcher_of(settings, records)
    run_to_the_end(searcher, settings, lambda one, seed: None if one == first else finished(one, seed))
    (died,) = [record for record in records if record.outcome == "failed" and record.seed == 0]
    assert "its process died" in (died.reason or "")


def test_a_diverged_trial_is_not_repeated_and_the_sampler_ignores_it(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)

    def diverging(candidate: Candidate, seed: int) -> Record:
        if candidate in paper_candidates(settings.config).values():
            return finished(candidate, seed)
        nothing: dict[str, Any] = {"accuracy": None, "gflops": None, "shares": (), "choices": ""}
        return record_of(candidate, 0.5, seed, outcome="diverged", reason="too fast", **nothing)

    run_to_the_end(searcher_of(settings), settings, diverging)
    assert searcher_of(settings).is_over


def test_too_expensive_predictors_are_not_tried_and_a_small_space_is_used_up(tmp_path: Path) -> None:
    space = {"blocks": [[1]], "kernel": [3], "stem_stride": [4], "input_size": [16, 24], "width": [0.125, 0.125]}
    settings = settings_of(tmp_path, space=space, num_trials=9)
    tried = run_to_the_end(searcher_of(settings, num_drawn=9), settings, finished)
    assert len({candidate for candidate, _ in tried}) == 4 + 2
    smaller = space_of(settings.config, BACKBONE_GFLOPS).candidate({"blocks": "1", "input_size": 16, "kernel": 3})
    limit = 1.01 * predictor_gflops(replace(smaller, stem_stride=4))
    cheap = settings_of(tmp_path / "cheap", space=space | {"max_gflops": limit})
    tried = run_to_the_end(searcher_of(cheap), cheap, finished)
    fixed = set(paper_candidates(cheap.config).values())
    assert {candidate.input_size for candidate, _ in tried if candidate not in fixed} == {16}


def test_the_paper_preset_tries_only_the_four(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, preset="paper")
    tried = run_to_the_end(searcher_of(settings), settings, finished)
    assert len(tried) == 8
    assert {candidate for candidate, _ in tried} == set(paper_candidates(settings.config).values())


def test_a_trial_that_asha_stops_is_recorded(tmp_path: Path) -> None:
    settings, records = settings_of(tmp_path, objective="budget", budget_gflops=0.003), []
    searcher = searcher_of(settings, records)
    fixed = paper_candidates(settings.config).values()
    for number in range(5):
        suggested = searcher.suggest(str(number))
        assert isinstance(suggested, dict)
        candidate = Candidate.parse(suggested["candidate"])
        assert suggested["to_the_end"] == (candidate in fixed)
        if candidate in fixed:
            settings.records.write(finished(candidate, 0))
            searcher.on_trial_complete(str(number), {"accuracy": 0.9, "gflops": 0.001})
        else:
            searcher.on_trial_complete(str(number), {"accuracy": 0.5, "gflops": 0.002, "epoch": 1, "score": 0.5})
    assert (records[-1].outcome, records[-1].epochs, records[-1].accuracy) == ("stopped", 1, 0.5)
    assert records[-1].reason == "worse than others after 1 epochs"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Prepared images and an untrained backbone."""
    config = config_of(tmp_path_factory.mktemp("search"))
    glyphs = GlyphSettings(num_train=40, num_validation=20, image_size=64)
    prepare("glyphs", config.data.folder, glyphs=glyphs, num_processes=1, show_progress=False)
    manifest = load_manifest(config.data.folder)
    RunFolder.of(config).path.mkdir(parents=True)
    model = build_drnet(config.model, 10, manifest.mean, manifest.std)
    save_model(RunFolder.of(config).model, model, config, classes=manifest.classes)
    return config


def with_search(config: Config, **changed: Any) -> Config:
    return config.model_copy(update={"search": config.search.model_copy(update=changed)})


def test_a_valid_search_passes_its_checks(trained: Config) -> None:
    checked = check_search(trained)
    assert checked.space.base == Candidate.of(trained.model.predictor, trained.stages.predictor)
    assert checked.backbone.classes == tuple("BCDEFGHKRS")


def test_all_problems_are_reported_together(trained: Config, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"budget_gflops": 1e-6, "objective": "budget", "grace_epochs": 3, "cpus_per_trial": 10_000}
    wrong = with_search(trained, backbone=str(tmp_path), **asked)
    assert wrong.stages.predictor is not None
    predictor = wrong.stages.predictor.model_copy(update={"alpha_gflops": None, "alpha_milliseconds": 1.0})
    stages = wrong.stages.model_copy(update={"joint": None, "predictor": predictor})
    wrong = wrong.model_copy(update={"stages": stages, "cost": "milliseconds"})
    with pytest.raises(ConfigError) as caught:
        check_search(wrong)
    found = "\n".join(caught.value.problems)
    for expected in (
        "stages.joint is missing",
        "no trained model",
        "budget_gflops is 1e-06",
        "a trial needs 10000 CPUs, but there is room for 0 (",
        "cost is milliseconds, but a search compares candidates by GFLOPs",
        "search.grace_epochs 3 must be at most 2",
    ):
        assert expected in found
    without = trained.model_copy(update={"stages": trained.stages.model_copy(update={"predictor": None})})
    with pytest.raises(ConfigError, match=r"stages\.predictor is missing"):
        check_search(without)


def test_a_table_of_another_checkpoint_is_reported_before_the_first_trial(trained: Config, tmp_path: Path) -> None:
    fill(with_search(trained), tmp_path / "tables")
    check_search(with_search(trained, tables=tmp_path / "tables"))
    manifest = load_manifest(trained.data.folder)
    other = build_drnet(trained.model, 10, manifest.mean, manifest.std)
    save_model(tmp_path / "other.pt", other, trained, classes=manifest.classes)
    with pytest.raises(ConfigError, match="has no logit table of this backbone and data"):
        check_search(with_search(trained, tables=tmp_path / "tables", backbone=str(tmp_path / "other.pt")))


def fill(config: Config, folder: Path) -> None:
    model, manifest = load_model(RunFolder.of(config).model).model, load_manifest(config.data.folder)
    for split, crop_epochs in table_crops(config).items():
        key = TableKey.of(model, config, manifest, split)
        backbone_logits = Forward(model, key.precision).frozen_backbone
        loader = open_loader(config, split, input_sizes(config))
        fill_table(
            folder, key, crop_epochs, loader, backbone_logits, device=next(model.parameters()).device, show=print
        )


@pytest.mark.parametrize("cached", [True, False])
def test_a_process_sets_up_once_and_records_the_error_of_a_trial(trained: Config, tmp_path: Path, cached: bool) -> None:
    config = with_search(trained, cache_gb=1.0 if cached else 0.0, node_folder=tmp_path / "node")
    folder = SearchFolder(tmp_path / "search")
    fill(config, folder.tables)
    folder.backbone.write_bytes(RunFolder.of(config).model.read_bytes())
    settings = SearchSettings(config, folder, load_manifest(config.data.folder).digest, "context", cpus=1)
    data = trial_data(settings)
    assert trial_data(replace(settings)) is data
    assert (tmp_path / "node" / "tables").is_dir()
    assert bool(list((tmp_path / "node").rglob("*.npy"))) is True
    assert bool(list((tmp_path / "node" / "decoded").rglob("*.npy"))) is cached
    candidate = paper_candidates(config)[3]
    reported: list[dict[str, Any]] = []
    broken = {"candidate": {**candidate.described(), "input_size": 17}, "seed": 0}
    with pytest.raises(Exception, match="17"):
        tune_trial(broken, settings, reported.append)
    assert reported == []
    (record,) = settings.records.read("context")
    assert record.outcome == "failed"
    assert "17" in (record.reason or "")


def test_a_dry_run_describes_the_search(trained: Config) -> None:
    text = describe_search(trained)
    assert "blocks: 0, 1, 1-1" in text
    assert "trials: 7 with one seed, and 5 more for the finalists' other seeds: 12" in text
    assert "one trial: 80 images through the predictor" in text
    assert "100 images through the backbone" in text
    assert not SearchFolder.of(trained).path.exists()


def finetuning(config: Config, folder: Path, **search: Any) -> tuple[SearchSettings, Record]:
    """Return a search with one finished trial, whose finetuning can start."""
    config = with_search(config, seeds=1, **search)
    settings = SearchSettings(config, SearchFolder(folder), "digest", "context", cpus=1)
    record = record_of(paper_candidates(config)[3])
    start, run_config = start_file(settings, record), finetuned_config(settings, record)
    manifest = load_manifest(config.data.folder)
    start.parent.mkdir()
    model = build_drnet(run_config.model, 10, manifest.mean, manifest.std)
    save_model(start, model, run_config, classes=manifest.classes)
    return settings, record


def test_a_finetuned_run_chooses_its_policy_again_for_a_new_budget(trained: Config, tmp_path: Path) -> None:
    settings, record = finetuning(trained, tmp_path, budget_gflops=0.0019)
    run = RunFolder.of(finetuned_config(settings, record))
    run.report.mkdir(parents=True)
    loader = open_loader(trained, VALIDATION, input_sizes(trained))
    collect_predictions(load_model(start_file(settings, record)).model, loader.epoch(0)).save(run.predictions)
    run.report_json.write_text("{}")  # of an earlier budget
    run.finished.write_text("{}")
    (found,) = finetune(settings, summarize([record], correct_of()), correct_of())
    assert found.report is not None
    assert found.report["policies"]["budget"]["cost"] == 0.0019
    assert found.report == json.loads(run.report_json.read_text())


def test_a_problem_of_the_cluster_or_the_data_ends_the_search(trained: Config, tmp_path: Path) -> None:
    settings, record = finetuning(trained, tmp_path)
    data = trained.data.model_copy(update={"folder": tmp_path / "gone"})
    settings = replace(settings, config=settings.config.model_copy(update={"data": data}))
    with pytest.raises(ConfigError, match=r"data\.folder: "):
        finetune(settings, summarize([record], correct_of()), correct_of())


def test_the_finetuned_candidates_with_the_one_that_the_budget_chooses_are_ordered_by_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the third of four candidates are selected, and the budget chooses the third."""
    settings = settings_of(tmp_path, seeds=1, finetuned=3, budget_gflops=0.0039)
    candidates, correct_NR = list(paper_candidates(settings.config).values()), correct_of()
    records = [record_of(candidate, share) for candidate, share in zip(candidates, (0.0, 0.5, 0.9, 1.0), strict=True)]
    summaries = summarize(records, correct_NR)
    monkeypatch.setattr(driver, "_finetune_one", lambda _, summary: summary.candidate)
    assert finetune(settings, summaries, correct_NR) == candidates[1:]


def test_a_trial_that_is_evaluated_after_every_epoch_evaluates_more_images(trained: Config) -> None:
    manifest = load_manifest(trained.data.folder)
    assert search_work(trained, manifest).evaluated_images == 2 * 20
    stopped = with_search(trained, objective="budget", epochs=5)
    assert search_work(stopped, manifest).evaluated_images == 6 * 20


def test_the_scarcest_resource_limits_the_trials_at_once() -> None:
    search = config_of(Path()).search
    assert trials_at_once(search, [Capacity(16, 1)], {"CPU": 1, "GPU": 0.25}) == 4
    assert trials_at_once(search, [Capacity(16, 2)], {"CPU": 1, "GPU": 0.4}) == 4, "two on each GPU"
    assert trials_at_once(search, [Capacity(16, 1)], {"CPU": 1, "GPU": 0.1}) == 10
    assert trials_at_once(search, [Capacity(3, 0)], {"CPU": 1}) == 3
    assert trials_at_once(search.model_copy(update={"max_concurrent": 2}), [Capacity(3, 0)], {"CPU": 1}) == 2


def test_a_trial_must_fit_on_one_node() -> None:
    nodes, needed = [Capacity(3, 0), Capacity(3, 1), Capacity(0, 1)], {"CPU": 2, "GPU": 0.5}
    assert trials_fitting(nodes, {"CPU": 2}) == 2
    assert trials_fitting(nodes, {"CPU": 4}) == 0
    assert trials_fitting(nodes, needed) == 1
    assert trial_resources(config_of(Path()).search, nodes) == {"CPU": 1, "GPU": 0.25}
