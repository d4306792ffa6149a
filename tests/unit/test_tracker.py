from __future__ import annotations

import logging
import math
import os
import pickle
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.tracking import runs
from pipeline.tracking.journal import JOURNAL_FILE, NODE_JOURNALS, Journal, metrics_record
from pipeline.tracking.runs import Description
from pipeline.tracking.store import PROJECT_FOLDER, TrackingError, explanation, tracking_uri
from pipeline.tracking.tracker import RunHandle, RunLogger, close_run, open_run, replay, system_metrics
from tests.unit.tracking_fixtures import free_port, fresh_store, make_config, make_manifest, wait_until


@pytest.fixture
def store(tmp_path, tmp_path_factory, monkeypatch) -> str:
    """A fresh store that MLFLOW_TRACKING_URI names."""
    uri = fresh_store(tmp_path, tmp_path_factory)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "small"


@pytest.fixture
def opened(store, tmp_path, folder) -> RunHandle:
    return open_run(make_config(tmp_path), folder, make_manifest())


def runs_of(uri: str) -> list:
    client = MlflowClient(uri)
    return list(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]))


def stage_ids(handle: RunHandle) -> dict[str, str]:
    found = runs.children(MlflowClient(handle.uri), handle.run_id)
    return {run.data.tags[runs.STAGE_TAG]: run.info.run_id for run in found}


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in MlflowClient(uri).get_metric_history(run_id, key))


def log(handle: RunHandle, *entries: tuple[str | None, dict[str, float], int]) -> None:
    """Log as rank 0 does; afterwards the server has everything."""
    logger = RunLogger(handle)
    for entry in entries:
        logger.metrics(*entry)
    logger.close()


def test_the_address_is_the_environment_then_the_configuration_then_the_project(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri() == f"sqlite:///{PROJECT_FOLDER / 'mlflow.db'}"
    config = make_config(tmp_path, tracking={"uri": "http://configured:5000"})
    assert tracking_uri(config) == "http://configured:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment:5000")
    assert tracking_uri(config) == "http://environment:5000"


def test_a_relative_store_is_the_same_from_every_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere/mlflow.db")
    assert tracking_uri() == f"sqlite:///{PROJECT_FOLDER / 'elsewhere' / 'mlflow.db'}"


def test_an_unknown_kind_of_address_is_refused_without_showing_its_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "ftp://user:secret@host/x")
    with pytest.raises(TrackingError, match=r"ftp://user:\*\*\*@host/x.*sqlite:///FILE") as raised:
        tracking_uri()
    assert "secret" not in str(raised.value)


def test_a_refused_host_name_is_explained():
    assert "--allowed-hosts" in explanation(RuntimeError("403: Invalid Host header - possible attack"), "http://host")


def test_a_run_holds_parameters_commit_data_and_configuration(opened, tmp_path):
    client = MlflowClient(opened.uri)
    run = client.get_run(opened.run_id)
    assert run.info.run_name == "small"
    assert run.data.params["stages.backbone.epochs"] == "2"
    assert run.data.params["model.resolutions"] == "[48, 32]"
    if (PROJECT_FOLDER / ".git").exists():
        assert len(run.data.tags["mlflow.source.git.commit"]) == 40
        assert run.data.tags["drnet.git_dirty"] in ("true", "false")
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("glyphs", make_manifest().digest)
    local = client.download_artifacts(opened.run_id, "config.yaml", str(tmp_path))
    assert "small_resnet" in Path(local).read_text()


def test_the_handle_can_be_sent_to_workers(opened):
    assert pickle.loads(pickle.dumps(opened)) == opened


def test_git_tags_are_empty_outside_a_repository(tmp_path):
    assert runs.git_tags(tmp_path) == {}


def test_a_restart_finds_the_same_run(opened, tmp_path, folder):
    log(opened, ("backbone", {"loss": 1.0}, 1))
    again = open_run(make_config(tmp_path), folder, make_manifest())
    log(again, ("backbone", {"loss": 0.5}, 2))
    assert again.run_id == opened.run_id
    assert len(runs_of(opened.uri)) == 2  # the run and its one stage
    assert history(opened.uri, stage_ids(opened)["backbone"], "loss") == [(1, 1.0), (2, 0.5)]


def test_a_stages_run_ends_when_the_next_stage_begins(opened):
    log(opened, ("backbone", {"loss": 1.0}, 1), ("predictor", {"loss": 2.0}, 1), (None, {"best": 0.9}, 1))
    client = MlflowClient(opened.uri)
    children = {stage: client.get_run(run_id) for stage, run_id in stage_ids(opened).items()}
    assert {stage: child.info.status for stage, child in children.items()} == {
        "backbone": "FINISHED",
        "predictor": "RUNNING",
    }
    assert children["predictor"].info.start_time >= children["backbone"].info.start_time
    assert history(opened.uri, opened.run_id, "best") == [(1, 0.9)]
    assert client.get_run(opened.run_id).data.metrics == {"best": 0.9}


def test_a_run_with_more_stages_than_a_request_returns_has_each_once(opened, monkeypatch):
    monkeypatch.setattr(runs, "_PAGE", 2)
    stages = [f"trial {number}" for number in range(5)]
    log(opened, *((stage, {"loss": 1.0}, 1) for stage in stages))
    log(opened, *((stage, {"loss": 0.5}, 2) for stage in stages))
    assert len(runs_of(opened.uri)) == 1 + len(stages)
    assert stage_ids(opened).keys() == set(stages)


def test_a_closed_run_has_its_report_and_a_resumed_one_is_running(opened, tmp_path, folder):
    client = MlflowClient(opened.uri)
    report = folder / "report"
    report.mkdir()
    (report / "report.json").write_text("{}")
    log(opened, ("joint", {"loss": 1.0}, 1))
    close_run(opened, "FAILED", artifacts=report)
    everything = [opened.run_id, stage_ids(opened)["joint"]]
    assert [client.get_run(run_id).info.status for run_id in everything] == ["FAILED", "FAILED"]
    assert [file.path for file in client.list_artifacts(opened.run_id, "report")] == ["report/report.json"]

    resumed = open_run(make_config(tmp_path), folder, make_manifest())
    log(resumed, ("joint", {"loss": 0.9}, 2))
    assert [client.get_run(run_id).info.status for run_id in everything] == ["RUNNING", "RUNNING"]
    close_run(resumed, "FINISHED", artifacts=folder / "absent")
    assert [client.get_run(run_id).info.status for run_id in everything] == ["FINISHED", "FINISHED"]


def test_a_report_that_was_not_sent_is_uploaded_after_its_run_was_moved(opened, tmp_path, folder, monkeypatch):
    report = folder / "report"
    report.mkdir()
    (report / "report.json").write_text("{}")
    with monkeypatch.context() as context:
        context.setattr("pipeline.tracking.tracker._send_now", lambda uri, folder: None)  # the server was down
        close_run(opened, "FINISHED", artifacts=report)
    moved = folder.rename(tmp_path / "moved")
    replay(make_config(tmp_path), moved)
    files = MlflowClient(opened.uri).list_artifacts(opened.run_id, "report")
    assert [file.path for file in files] == ["report/report.json"]


def test_values_that_are_not_finite_are_delivered(opened):
    log(opened, (None, {"nan": math.nan, "inf": math.inf, "low": -math.inf}, 1))
    (nan,), (inf,), (low,) = (history(opened.uri, opened.run_id, key) for key in ("nan", "inf", "low"))
    assert math.isnan(nan[1])
    assert inf[1] > 1e308
    assert low[1] < -1e308


def test_values_from_before_a_restart_are_not_logged_again(opened):
    log(opened, ("backbone", {"loss": 1.0, "nan": math.nan, "images_per_second": 100.0}, 1))
    log(opened, ("backbone", {"loss": 1.0, "nan": math.nan, "images_per_second": 90.0}, 1))
    run_id = stage_ids(opened)["backbone"]
    assert history(opened.uri, run_id, "loss") == [(1, 1.0)]
    assert len(history(opened.uri, run_id, "nan")) == 1
    assert history(opened.uri, run_id, "images_per_second") == [(1, 90.0), (1, 100.0)]


def test_sending_the_whole_journal_twice_changes_nothing(opened, tmp_path, folder):
    log(opened, *(("backbone", {"loss": 1 / step, "nan": math.nan, "inf": math.inf}, step) for step in range(1, 4)))
    run_id = stage_ids(opened)["backbone"]
    before = {key: history(opened.uri, run_id, key) for key in ("loss", "inf")}
    (folder / f"{JOURNAL_FILE}.delivered").unlink()
    assert replay(make_config(tmp_path), folder).run_id == opened.run_id
    assert {key: history(opened.uri, run_id, key) for key in ("loss", "inf")} == before
    assert len(history(opened.uri, run_id, "nan")) == 3
    assert len(runs_of(opened.uri)) == 2


def test_more_values_than_a_request_may_hold(opened):
    log(opened, (None, {f"key{i:04d}": float(i) for i in range(2300)}, 1))
    assert len(MlflowClient(opened.uri).get_run(opened.run_id).data.metrics) == 2300


def test_only_a_record_that_mlflow_never_accepts_is_skipped(opened, caplog):
    with caplog.at_level(logging.WARNING):
        log(opened, (None, {"before": 1.0}, 1), (None, {"not$allowed": 1.0}, 1), (None, {"after": 1.0}, 1))
        replay_pending = Journal(opened.folder).num_pending(opened.uri)
    assert MlflowClient(opened.uri).get_run(opened.run_id).data.metrics == {"before": 1.0, "after": 1.0}
    assert "not$allowed" in caplog.text
    assert replay_pending == 0


def test_a_run_that_is_deleted_during_training_keeps_its_values_for_the_next_start(opened, tmp_path, folder, caplog):
    log(opened, (None, {"first": 1.0}, 1))
    MlflowClient(opened.uri).delete_run(opened.run_id)
    with caplog.at_level(logging.WARNING):
        log(opened, (None, {"second": 2.0}, 2))
    assert "was deleted" in caplog.text
    again = open_run(make_config(tmp_path), folder, make_manifest())
    assert again.run_id != opened.run_id
    assert MlflowClient(opened.uri).get_run(again.run_id).data.metrics == {"first": 1.0, "second": 2.0}


def test_a_node_sends_everything_again_to_a_new_run(opened, tmp_path, folder):
    node = RunLogger(opened, NODE_JOURNALS.replace("*", "node-1"))
    node.metrics(None, {"cpu": 1.0}, 0)
    node.close()
    MlflowClient(opened.uri).delete_run(opened.run_id)
    again = open_run(make_config(tmp_path), folder, make_manifest())
    assert history(opened.uri, again.run_id, "cpu") == [(0, 1.0)]


def test_a_run_in_use_is_not_the_duplicate_that_is_deleted(opened, tmp_path, folder):
    client, description = MlflowClient(opened.uri), Description.load(folder)
    experiment = client.get_run(opened.run_id).info.experiment_id
    # Ids are random and start times equal, so one of several late duplicates comes first in any order of those two.
    for _ in range(8):
        client.create_run(experiment, description.started_ms, {runs.KEY_TAG: description.key}, description.name)
    assert open_run(make_config(tmp_path), folder, make_manifest()).run_id == opened.run_id
    assert [run.info.run_id for run in runs_of(opened.uri)] == [opened.run_id]


def test_a_deleted_experiment_stops_the_start_with_advice(opened, tmp_path, folder):
    client = MlflowClient(opened.uri)
    client.delete_experiment(client.get_experiment_by_name("drnet").experiment_id)
    with pytest.raises(TrackingError, match=r"was deleted.*restore it.*tracking\.experiment"):
        open_run(make_config(tmp_path), folder, make_manifest())


def test_passwords_and_long_values_stay_out_of_the_parameters(store, tmp_path, folder):
    config = make_config(
        tmp_path,
        tracking={"uri": "postgresql://user:secret@host/mlflow"},
        data={"source": "x" * 7000},
    )
    handle = open_run(config, folder, make_manifest())
    params = MlflowClient(store).get_run(handle.run_id).data.params
    assert params["tracking.uri"] == "postgresql://user:***@host/mlflow"
    assert len(params["data.source"]) == 6000
    assert "secret" not in (folder / runs.DESCRIPTION_FILE).read_text()


def test_names_that_are_not_utf8_reach_mlflow_escaped(store, tmp_path):
    latin = os.fsdecode(b"caf\xe9")
    folder = tmp_path / latin / "small"
    handle = open_run(make_config(tmp_path, data={"source": str(tmp_path / latin)}), folder, make_manifest())
    (folder / "report").mkdir()
    (folder / "report" / "report.json").write_text("{}")
    close_run(handle, "FINISHED", artifacts=folder / "report")
    run = MlflowClient(store).get_run(handle.run_id)
    assert run.data.params["data.source"].endswith("caf\\xe9")
    assert run.data.tags["drnet.run_folder"].endswith("caf\\xe9/small")
    assert [file.path for file in MlflowClient(store).list_artifacts(handle.run_id, "report")] == ["report/report.json"]


@pytest.mark.parametrize("content", ["", "[]", '{"key": "k"}'])
def test_a_damaged_description_says_what_to_do(tmp_path, content):
    (tmp_path / runs.DESCRIPTION_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"damaged.*remove it"):
        Description.load(tmp_path)


def test_a_folder_that_was_never_tracked_cannot_be_replayed(store, tmp_path, folder):
    with pytest.raises(ValueError, match=r"train the run first"):
        Description.load(folder)


def test_a_server_that_is_down_all_the_time_causes_one_warning_and_loses_no_value(
    store,
    tmp_path,
    folder,
    monkeypatch,
    caplog,
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    config = make_config(tmp_path)
    with caplog.at_level(logging.WARNING):
        handle = open_run(config, folder, make_manifest())
    assert handle.run_id is None
    assert len(caplog.records) == 1
    assert "Connection refused. Check that the server runs" in caplog.text.replace('"', "")
    with system_metrics(handle, "node-0"):
        log(handle, ("backbone", {"loss": 1.0}, 1), ("joint", {"loss": 0.5}, 1))
    close_run(handle, "FINISHED")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    delivered = replay(config, folder)
    ids = stage_ids(delivered)
    assert history(store, ids["backbone"], "loss") == [(1, 1.0)]
    assert history(store, ids["joint"], "loss") == [(1, 0.5)]
    run = MlflowClient(store).get_run(delivered.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.start_time == Description.load(folder).started_ms


def test_training_survives_a_journal_that_cannot_be_written(opened, folder, caplog):
    logger = RunLogger(opened)
    (folder / JOURNAL_FILE).unlink()
    (folder / JOURNAL_FILE).mkdir()
    with caplog.at_level(logging.WARNING):
        logger.metrics(None, {"loss": 1.0}, 1)
    (folder / JOURNAL_FILE).rmdir()
    logger.close()
    assert "values are lost" in caplog.text


def test_system_metrics_are_recorded_by_node(opened, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    client = MlflowClient(opened.uri)
    key = "system/node-1/cpu_utilization_percentage"
    with system_metrics(opened, "node-1"):
        wait_until(lambda: key in client.get_run(opened.run_id).data.metrics, f"{key} arrives")
    assert 0 <= client.get_run(opened.run_id).data.metrics[key] <= 100


def test_a_stage_in_the_journal_needs_no_configuration(opened, tmp_path, folder):
    Journal(folder).append(metrics_record("another", {"loss": 1.0}, 1, since_ms=1000))
    replay(make_config(tmp_path), folder)
    child = MlflowClient(opened.uri).get_run(stage_ids(opened)["another"])
    assert child.info.start_time == 1000


def test_the_parameters_of_a_stage_can_be_logged_again(opened):
    for _ in range(2):
        logger = RunLogger(opened)
        logger.params("trial 1", {"width": 0.25, "blocks": [1, 1]})
        logger.metrics("trial 1", {"accuracy": 0.9}, 2)
        logger.params("trial 2", {"width": 0.5})
        logger.close()
    close_run(opened, "FINISHED")
    client, ids = MlflowClient(opened.uri), stage_ids(opened)
    assert client.get_run(ids["trial 1"]).data.params == {"width": "0.25", "blocks": "[1, 1]"}
    assert client.get_run(ids["trial 2"]).data.params == {"width": "0.5"}
    assert history(opened.uri, ids["trial 1"], "accuracy") == [(2, 0.9)]


def test_the_end_of_a_stage_stays_when_its_parameters_are_logged_again(opened):
    logger = RunLogger(opened)
    logger.params("trial 1", {"width": 0.25})
    logger.close()
    close_run(opened, "FINISHED")
    client, trial = MlflowClient(opened.uri), stage_ids(opened)["trial 1"]
    before = client.get_run(trial).info
    again = RunLogger(opened)
    again.params("trial 1", {"width": 0.25})
    again.params("trial 2", {"width": 0.5})
    again.close()
    close_run(opened, "FINISHED")
    assert client.get_run(trial).info.end_time == before.end_time
    assert client.get_run(stage_ids(opened)["trial 2"]).data.params == {"width": "0.5"}
