"""Run a search: check everything, fill the logit tables, run the trials, finetune the best, choose, report."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray import tune

from datasets.beton import TRAIN, VALIDATION, Manifest, beton_path, read_layout, split_keys
from pipeline.cluster.connection import ray_cluster
from pipeline.cluster.doctor import require_healthy
from pipeline.cluster.driver import (
    calibrate_run,
    download_validation_split,
    environment,
    only_driver,
    split_of,
    train_run,
)
from pipeline.cluster.group import run_group
from pipeline.cluster.preflight import cluster_capacity
from pipeline.cluster.progress import event_writer, followed
from pipeline.cluster.signals import restored, sigterm_as_sigint
from pipeline.cluster.worker import data_of_node
from pipeline.config.load import ConfigError, with_absolute_paths
from pipeline.config.run_folder import RunFolder
from pipeline.config.schema import Config, PolicyConfig, StagesConfig
from pipeline.models.cost import Costs
from pipeline.models.drnet import DRNet, build_configured, place_model
from pipeline.policies.calibrate import Budget, Calibration, calibrate
from pipeline.policies.route import Images
from pipeline.search.checks import Checked, check_search, check_trials_fit, trial_resources, with_run_precision
from pipeline.search.front import Summary, budget_alias, choose_item, spread, summarize
from pipeline.search.records import Record, SearchFolder, context_digest
from pipeline.search.report import Finetuned, build_search_report, write_search_report
from pipeline.search.source import model_with_backbone
from pipeline.search.space import RECIPE_KEYS, Candidate, input_sizes, paper_candidates
from pipeline.search.trial import SearchSettings, table_crops, trial_stage, tune_trial
from pipeline.search.tuner import PatientASHA, TrialSearcher, records_in
from pipeline.tracking.registry import RegisteredModel, register_model
from pipeline.tracking.runs import COMMIT_TAG, git_tags
from pipeline.tracking.store import PROJECT_FOLDER, tracking_uri
from pipeline.tracking.tracker import RunHandle, RunLogger, tracked_run
from pipeline.training.assembly import open_loader, validation_extents
from pipeline.training.checkpoint import load_model, save_model
from pipeline.training.logit_table import LogitTable, TableError, TableKey, fill_table
from pipeline.training.objectives import Forward


@dataclass(frozen=True)
class SearchResult:
    """A finished search.

    Attributes:
        chosen: the finetuned candidate that the budget chooses; None without a budget, or if no candidate is within it.
    """

    folder: SearchFolder
    report: dict[str, Any]
    chosen: Finetuned | None


def search_run(config: Config) -> SearchResult:
    """Search, finetune, choose and report. Resume where an earlier attempt stopped.

    Raises:
        ConfigError: lists every problem that can be found before the first trial, or that prevents a finetuning.
        ValueError: another driver is running this search, or the logit tables cannot be computed.
        KeyboardInterrupt: the search was stopped by Ctrl-C or SIGTERM.
    """
    config, folder = with_run_precision(with_absolute_paths(config)), SearchFolder.of(config)
    checked = check_search(config)
    folder.path.mkdir(parents=True, exist_ok=True)
    with (
        only_driver(folder.lock),
        ray_cluster(),
        sigterm_as_sigint(),
        tracked_run(
            config.model_copy(update={"name": f"{config.name}-search"}), folder.path, folder.report, checked.manifest
        ) as tracking,
    ):
        require_healthy(config, checked.manifest.digest)
        check_trials_fit(config)
        download_validation_split(config)
        settings = _begin(config, folder, checked)
        _fill_tables(settings, checked.manifest)
        images = _validation_images(settings, checked)
        correct_NR = images.correct_NR
        _run_trials(settings, checked, correct_NR, tracking)
        records = records_in(checked.space, fixed_candidates(config), settings)
        calibration = calibrate(images, split_keys(config.data.folder), Budget(), split_of(config))
        finetuned = finetune(settings, summarize(records, correct_NR), correct_NR)
        # The reports of the finetuned runs are about these images.
        chosen = choose_finetuned(config, finetuned, correct_NR[calibration.held_out])
        report = _report(settings, checked, records, correct_NR, calibration, finetuned, chosen)
    return SearchResult(folder, report, chosen)


def _begin(config: Config, folder: SearchFolder, checked: Checked) -> SearchSettings:
    """Save the backbone in the search's folder, and return the settings that the trials share."""
    manifest = checked.manifest
    model = model_with_backbone(checked.backbone, config, len(manifest.classes))
    save_model(folder.backbone, model, config, classes=manifest.classes)
    return SearchSettings(
        config, folder, manifest.digest, _context(config, model, manifest), config.search.cpus_per_trial
    )


def _context(config: Config, model: DRNet, manifest: Manifest) -> str:
    """Return the digest of everything that a trial depends on, except its candidate and seed."""
    stage, training = trial_stage(config), config.training
    return context_digest(
        {
            "tables": [TableKey.of(model, config, manifest, split).content for split in (TRAIN, VALIDATION)],
            "stage": stage.model_dump(mode="json", exclude={*RECIPE_KEYS, "init_from", "logits"}),
            "training": {key: getattr(training, key) for key in ("batch_size", "precision", "accumulate")},
            "dropout": config.model.predictor.dropout,
            "initial_shares": config.model.predictor.initial_shares,
            "budget": config.search.budget_gflops if config.search.objective == "budget" else None,
        }
    )


def _fill_tables(settings: SearchSettings, manifest: Manifest) -> None:
    """Let all workers compute the missing parts of the logit tables."""
    config, folder = settings.config, settings.folder
    if config.search.tables is not None or _tables_complete(settings, manifest):
        return
    # This folder contains only Ray Train's own files. A restart resumes from the written part of the tables.
    shutil.rmtree(folder.fill, ignore_errors=True)
    saved = "the written part of the logit tables"
    with followed(folder.path):
        run_group(_fill_worker, settings, config, storage=folder.fill, event_folder=folder.path, saved=saved)
    shutil.rmtree(folder.fill, ignore_errors=True)


def _tables_complete(settings: SearchSettings, manifest: Manifest) -> bool:
    model = load_model(settings.folder.backbone).model
    try:
        for split, crop_epochs in table_crops(settings.config).items():
            LogitTable(settings.tables, TableKey.of(model, settings.config, manifest, split), crop_epochs)
    except TableError:
        return False
    return True


def _fill_worker(settings: SearchSettings) -> None:
    """Compute this rank's part of the tables."""
    config, context = settings.config, ray.train.get_context()
    rank, device = context.get_world_rank(), ray.train.torch.get_device()
    show = event_writer(settings.folder.path if rank == 0 else None)
    manifest = data_of_node(config.data, settings.data_digest, show)
    model = load_model(settings.folder.backbone).model
    model = place_model(model, device, channels_last=config.training.channels_last)
    settings.folder.tables.mkdir(exist_ok=True)
    for split, crop_epochs in table_crops(config).items():
        key = TableKey.of(model, config, manifest, split)
        loader = open_loader(config, split, input_sizes(config), num_threads=torch.get_num_threads())
        backbone_logits = Forward(model, key.precision).frozen_backbone
        fill_table(settings.folder.tables, key, crop_epochs, loader, backbone_logits, device=device, show=show)


def _validation_images(settings: SearchSettings, checked: Checked) -> Images:
    """Return the backbone's answers for the validation images, on which policies without a predictor are fitted."""
    model = load_model(settings.folder.backbone).model
    key = TableKey.of(model, settings.config, checked.manifest, VALIDATION)
    table = LogitTable(settings.tables, key, range(1))
    logits_NRK = table.logits(0, torch.arange(key.num_samples)).float().numpy()
    labels_N = read_layout(beton_path(settings.config.data.folder, VALIDATION)).metadata["label"]
    costs = Costs(settings.config.model.resolutions, tuple(checked.backbone_gflops), predictor_gflops=0.0)
    return Images.of(logits_NRK, labels_N, None, costs, extents_N=validation_extents(settings.config))


def fixed_candidates(config: Config) -> list[Candidate]:
    """Return the candidates that every search tries: the paper's four."""
    return list(paper_candidates(config).values())


def _run_trials(settings: SearchSettings, checked: Checked, correct_NR: np.ndarray, tracking: RunHandle) -> None:
    """Run every trial that has no record yet."""
    config, search = settings.config, settings.config.search
    fixed = fixed_candidates(config)
    logger = RunLogger(tracking)

    def finalists(records: Sequence[Record]) -> list[Candidate]:
        found = [summary for summary in summarize(records, correct_NR).values() if completed(summary)]
        best = spread(found, lambda summary: summary.point, search.finalists)
        return [*fixed, *(summary.candidate for summary in best if summary.candidate not in fixed)]

    def on_record(record: Record) -> None:
        _track(logger, record)
        print(f"[{searcher.num_done}/{searcher.num_planned}] {_line(record)}", flush=True)

    searcher = TrialSearcher(settings, checked.space, fixed, search.num_trials, finalists, on_record)
    try:
        for record in settings.records.read(settings.context):
            _track(logger, record)
        if searcher.is_over:
            return
        print(f"{searcher.num_done} of {searcher.num_planned} trials are done", flush=True)
        _run_tune(settings, searcher)
    finally:
        logger.close()
    if not searcher.is_over:
        raise KeyboardInterrupt("interrupted; rerun the same command to run the remaining trials")


def _run_tune(settings: SearchSettings, searcher: TrialSearcher) -> None:
    search, folder = settings.config.search, settings.folder
    shutil.rmtree(folder.tune, ignore_errors=True)
    # Tune's newer output cannot be silenced, and the driver prints a line for every trial.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    trainable = tune.with_parameters(tune_trial, settings=settings, report=tune.report)
    scheduler = None
    if search.objective == "budget":
        scheduler = PatientASHA(trial_stage(settings.config).epochs, search.grace_epochs)
    tuner = tune.Tuner(
        tune.with_resources(trainable, trial_resources(search, cluster_capacity())),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=searcher.num_planned,
            max_concurrent_trials=search.max_concurrent,
            reuse_actors=True,  # a process imports torch and opens the tables once
        ),
        run_config=tune.RunConfig(
            name=folder.tune.name,
            storage_path=str(folder.path),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=search.max_failures),
        ),
    )
    with restored(signal.SIGINT):  # Tune leaves its own handler installed
        tuner.fit()
    shutil.rmtree(folder.tune, ignore_errors=True)


def _line(record: Record) -> str:
    """Format a trial as one line for the terminal."""
    what = f"{record.candidate.network}, seed {record.seed}"
    if record.accuracy is None or record.gflops is None:
        return f"{what}: {record.outcome}: {record.reason}"
    said = f"{what}: {100 * record.accuracy:.2f} % at {record.gflops:.4g} GFLOPs, {record.seconds:.1f} s"
    return said if record.outcome == "finished" else f"{said}, {record.outcome}"


def _track(logger: RunLogger, record: Record) -> None:
    """Log a trial to MLflow, as a child of the search's run."""
    name = f"trial {record.key[:8]}"
    logger.params(name, {**record.candidate.described(), "seed": record.seed})
    values = {"accuracy": record.accuracy, "gflops": record.gflops, "predictor_gflops": record.predictor_gflops}
    numbers = {key: value for key, value in values.items() if value is not None}
    logger.metrics(name, {**numbers, f"outcome_{record.outcome}": 1.0}, record.epochs)


def finetune(
    settings: SearchSettings, summaries: Mapping[Candidate, Summary], correct_NR: np.ndarray
) -> list[Finetuned]:
    """Finetune the best finalists with their backbone, each in its own run, cheapest first.

    With a budget, the finalist that the budget chooses is one of them, in place of the cheapest if necessary.
    """
    search = settings.config.search
    finalists = [summary for summary in summaries.values() if summary.num_seeds == search.seeds and completed(summary)]
    selected = spread(finalists, lambda summary: summary.point, search.finetuned)
    lowest = _lowest_accuracy(settings.config, correct_NR)
    best = choose_item(
        finalists, lambda summary: summary.point, budget_gflops=search.budget_gflops, lowest_accuracy=lowest
    )
    has_budget = search.budget_gflops is not None or lowest is not None
    if best is not None and has_budget and selected and best not in selected:
        selected = sorted([best, *selected[1:]], key=lambda summary: summary.gflops)
    return [_finetune_one(settings, summary) for summary in selected]


def _finetune_one(settings: SearchSettings, summary: Summary) -> Finetuned:
    record = summary.records[0]
    start, run_config = start_file(settings, record), finetuned_config(settings, record)
    if not start.exists():
        start.parent.mkdir(exist_ok=True)
        _save_start(start, settings, run_config, settings.records.weights(record))
    print(f"finetuning {record.candidate.network} with its backbone", flush=True)
    try:
        result = train_run(run_config)
        if result.already_finished:  # its report may be for another budget
            result = calibrate_run(run_config)
    except ConfigError:  # of the cluster, the data or the store, which other candidates share
        raise
    except ValueError as error:
        return Finetuned(record.candidate, run_config, None, str(error))
    return Finetuned(record.candidate, run_config, result.report)


def start_file(settings: SearchSettings, record: Record) -> Path:
    """Return the model.pt that the finetuning of a trial's candidate starts from."""
    return settings.folder.finetuned / f"{record.key}.start.pt"


def finetuned_config(settings: SearchSettings, record: Record) -> Config:
    """Return the configuration of the run that finetunes a trial's candidate with its backbone."""
    config = settings.config
    joint = config.stages.joint
    assert joint is not None
    recipe = {key: value for key, value in record.candidate.recipe().items() if key != "lr"}
    start = start_file(settings, record)
    return config.model_copy(
        update={
            "name": f"{config.name}-{record.key[:8]}",
            "model": record.candidate.model(config.model),
            "stages": StagesConfig(joint=joint.model_copy(update={**recipe, "init_from": start})),
            "policy": policy_of(config),
            "cluster": config.cluster.model_copy(update={"storage": settings.folder.finetuned}),
            # Use the search's own store, which may be a file in the search's storage.
            "tracking": config.tracking.model_copy(update={"uri": tracking_uri(config)}),
        }
    )


def policy_of(config: Config) -> PolicyConfig:
    """Return how a finetuned run chooses its policy: by the search's budget, so that a policy without a predictor may
    win.

    With both limits, the run takes the most accurate policy within the budget, and the search checks the other limit.
    """
    search = config.search
    if search.budget_gflops is not None:
        return config.policy.model_copy(update={"budget_gflops": search.budget_gflops, "max_accuracy_drop": None})
    if search.max_accuracy_drop is not None:
        return config.policy.model_copy(update={"max_accuracy_drop": search.max_accuracy_drop})
    return config.policy


def _save_start(start: Path, settings: SearchSettings, config: Config, weights: Path) -> None:
    """Save a model.pt with the search's backbone and a trial's predictor."""
    loaded = load_model(settings.folder.backbone)
    predictor = build_configured(config.model.predictor, len(config.model.resolutions))
    predictor.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    size = config.model.predictor.input_size
    model = DRNet(loaded.model.backbone, predictor, config.model.resolutions, size, loaded.mean, loaded.std)
    save_model(start, model, config, classes=loaded.classes)


def choose_finetuned(config: Config, finetuned: Sequence[Finetuned], correct_NR: np.ndarray) -> Finetuned | None:
    """Return the finetuned candidate that the budget chooses, or None without a budget.

    Args:
        correct_NR: the backbone's answers for the images that the finetuned runs report on.
    """
    budget, lowest = config.search.budget_gflops, _lowest_accuracy(config, correct_NR)
    if budget is None and lowest is None:
        return None
    return choose_item(
        [item for item in finetuned if item.report is not None],
        lambda item: item.point,
        budget_gflops=budget,
        lowest_accuracy=lowest,
    )


def _lowest_accuracy(config: Config, correct_NR: np.ndarray) -> float | None:
    """Return the lowest accuracy that max_accuracy_drop allows, as a fraction of 1."""
    drop = config.search.max_accuracy_drop
    return None if drop is None else float(correct_NR.mean(axis=0).max()) - drop / 100


def completed(summary: Summary) -> bool:
    """Return whether the candidate finished with every seed that was tried."""
    return all(record.outcome == "finished" for record in summary.records)


def _report(
    settings: SearchSettings,
    checked: Checked,
    records: Sequence[Record],
    correct_NR: np.ndarray,
    calibration: Calibration,
    finetuned: Sequence[Finetuned],
    chosen: Finetuned | None,
) -> dict[str, Any]:
    config = settings.config
    report = build_search_report(
        records,
        correct_NR,
        config=config,
        space=checked.space,
        backbone_gflops=checked.backbone_gflops,
        finetuned=finetuned,
        chosen=chosen,
        context={
            "dataset": checked.manifest.dataset,
            "git_commit": git_tags(PROJECT_FOLDER).get(COMMIT_TAG),
            "backbone": checked.backbone.origin,
            "data digest": checked.manifest.digest,
            **environment(),
        },
        calibration=calibration,
    )
    write_search_report(settings.folder.report, report)
    return report


def register_chosen(chosen: Finetuned | None) -> RegisteredModel:
    """Register the chosen model under an alias that names the budget.

    Raises:
        ValueError: no model was chosen.
        TrackingError: as in `register_model`.
    """
    if chosen is None:
        raise ValueError(
            "No finetuned model is within the budget, so none was registered. Raise the budget, or search.finetuned."
        )
    config = chosen.config
    alias = budget_alias(config.search)
    run = RunFolder.of(config)
    config = config.model_copy(update={"registry": config.registry.model_copy(update={"alias": alias})})
    return register_model(config, run.path, run.model, run.report_json)
