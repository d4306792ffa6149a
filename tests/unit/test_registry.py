from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import mlflow
import numpy as np
import pytest
import ray
import torch
import yaml
from mlflow import MlflowClient
from PIL import Image

from jobs import register, serve
from jobs.cli import run_job
from pipeline.cluster.serve_model import serve_model
from pipeline.config.schema import Config, ServingConfig
from pipeline.models.drnet import DRNet
from pipeline.search.source import find_backbone, load_backbone, registered_backbone
from pipeline.serving.deployments import Router, Served
from pipeline.serving.package import _content, classify_files
from pipeline.tracking.registry import RegisteredModel, find_model, open_model, register_model
from pipeline.tracking.store import TrackingError
from tests.unit.pictures import jpeg, smooth_rgb
from tests.unit.tracking_fixtures import (
    finish_run,
    free_port,
    fresh_store,
    make_config,
    make_manifest,
    make_model,
    random_crops,
    routed_logits,
)


class Finished:
    """A finished run with its model in a fresh registry."""

    def __init__(self, folder: Path, factory: pytest.TempPathFactory):
        self.store = fresh_store(folder, factory)
        self.config: Config = make_config(folder, tracking={"uri": self.store})
        self.folder = folder / "runs" / "small"
        self.model: DRNet = make_model(self.config)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", "")  # the configuration must be enough
            self.files = finish_run(self.config, self.folder, self.model)
            self.registered: RegisteredModel = register_model(self.config, self.folder, *self.files)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    return Finished(tmp_path_factory.mktemp("finished"), tmp_path_factory)


@pytest.fixture(autouse=True)
def address(finished, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", finished.store)


def version_of(finished: Finished, alias: str = "champion"):
    return MlflowClient(finished.store).get_model_version_by_alias("drnet", alias)


def with_registry(config: Config, **fields: str) -> Config:
    return config.model_copy(update={"registry": config.registry.model_copy(update=fields)})


def test_a_version_has_its_accuracy_cost_and_origin_as_tags(finished):
    version = version_of(finished)
    assert (str(version.version), version.status) == ("1", "READY")
    assert version.tags["accuracy"] == "0.937500"
    assert version.tags["gflops"] == "0.0123"
    assert version.tags["dataset_digest"] == make_manifest().digest
    assert version.tags["git_commit"]
    run = MlflowClient(finished.store).get_run(version.run_id)
    assert run.info.run_name == "small"
    assert run.info.status == "FINISHED"
    assert finished.registered.uri == "models:/drnet/1"


def test_a_version_holds_the_trained_backbone(finished):
    found = registered_backbone("models:/drnet@champion")
    expected = load_backbone(finished.files[0])
    assert found.origin == "models:/drnet@champion"
    assert found.state.keys() == expected.state.keys()
    assert all(torch.equal(value, expected.state[name]) for name, value in found.state.items())
    assert (found.resolutions, found.classes, found.mean) == (expected.resolutions, expected.classes, expected.mean)
    with pytest.raises(TrackingError, match="nobody"):
        registered_backbone("models:/drnet@nobody")


def test_a_configuration_names_the_registry(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    search = finished.config.search.model_copy(update={"backbone": "models:/drnet/1"})
    config = finished.config.model_copy(update={"search": search})
    assert find_backbone(config).origin == "models:/drnet/1"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    monkeypatch.setattr(sys, "argv", ["serve", "--config", str(tmp_path / "config.yaml"), "--dry-run"])
    run_job(serve.main)
    (application,) = yaml.safe_load(capsys.readouterr().out)["applications"]
    assert application["args"] == {"model": "models:/drnet/1", "tracking_uri": finished.store}


def test_with_an_empty_ray_address_this_machine_serves(finished, monkeypatch):
    """The port is only checked if no cluster is used."""
    if ray.is_initialized():
        pytest.skip("the cluster of other tests would be used")
    monkeypatch.setenv("RAY_ADDRESS", "")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = ServingConfig(port=listener.getsockname()[1])
        with pytest.raises(ValueError, match=r"cannot be used .*Set serving\.port"):
            serve_model("models:/drnet/1", serving, None)


def test_signature_example_and_exact_requirements(finished):
    model = open_model("models:/drnet@champion")
    assert str(model.metadata.get_input_schema().inputs[0].type) == "DataType.string"
    assert model.metadata.get_output_schema().input_names()[0] == "class_index"
    assert [(spec.name, spec.default) for spec in model.metadata.get_params_schema().params] == [
        ("budget_bias", 0.0),
        ("budget_gflops", 0.0),
        ("max_accuracy_drop", -1.0),
    ]
    folder = Path(mlflow.artifacts.download_artifacts("models:/drnet@champion"))
    example = json.loads((folder / "serving_input_example.json").read_text())
    assert base64.b64decode(example["dataframe_split"]["data"][0][0]).startswith(b"\xff\xd8")
    requirements = (folder / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in requirements} == {"mlflow", "torch", "numpy", "pandas", "pillow"}
    assert all("==" in line and "+" not in line for line in requirements)


def test_loading_a_model_can_choose_how_it_runs(finished):
    config = {"device": "cpu", "precision": "bfloat16"}
    model = mlflow.pyfunc.load_model("models:/drnet@champion", model_config=config)
    placement = model.unwrap_python_model().classifier.network.placement
    assert (placement.device, placement.precision, placement.compiled) == ("cpu", "bfloat16", False)


def test_the_same_model_is_not_registered_twice_but_takes_another_alias(finished):
    again = register_model(with_registry(finished.config, alias="second"), finished.folder, *finished.files)
    assert (again.version, again.is_new) == ("1", False)
    assert {str(version_of(finished, alias).version) for alias in ("second", "champion")} == {"1"}


def test_another_evaluation_is_another_version_and_the_alias_stays(finished, tmp_path):
    config = with_registry(finished.config, name="other")
    first = register_model(config, finished.folder, *finished.files)
    report = json.loads(finished.files[1].read_text())
    report["headline"]["mean_gflops"] = 0.5
    (tmp_path / "report.json").write_text(json.dumps(report))
    shutil.copy(finished.files[1].with_name("answers.npz"), tmp_path)
    assert find_model("models:/other/latest").uri == "models:/other/1"
    second = register_model(config, finished.folder, finished.files[0], tmp_path / "report.json")
    assert find_model("models:/other/latest").uri == "models:/other/2"
    assert (first.version, second.version, second.is_new) == ("1", "2", True)
    assert (first.champion, second.champion) == ("1", "1")
    assert str(MlflowClient(finished.store).get_model_version_by_alias("other", "champion").version) == "1"


def test_a_report_that_does_not_match_the_answers_is_refused(finished, tmp_path):
    report = json.loads(finished.files[1].read_text())
    report["headline"]["top1"] = 0.5
    (tmp_path / "report.json").write_text(json.dumps(report))
    shutil.copy(finished.files[1].with_name("answers.npz"), tmp_path)
    with pytest.raises(ValueError, match=r"states top-1 0\.500000, but .*answers\.npz gives 0\.937500.*jobs\.evaluate"):
        register_model(finished.config, finished.folder, finished.files[0], tmp_path / "report.json")


def test_a_run_that_has_not_finished_is_named(finished, tmp_path):
    with pytest.raises(ValueError, match=r"run small has not finished.*model\.pt.*jobs\.train"):
        register_model(finished.config, finished.folder, tmp_path / "model.pt", finished.files[1])


@pytest.mark.parametrize(
    "override", ["registry.alias=latest", "registry.alias=v1", "registry.name=a/b", "registry.name=a:b"]
)
def test_a_name_or_alias_that_mlflow_refuses_is_a_configuration_error(override, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["register", "--config", "glyphs", override])
    with pytest.raises(SystemExit) as ended:
        run_job(register.main)
    assert ended.value.code == 2
    assert override.split("=")[0] in capsys.readouterr().err


def test_nothing_is_registered_while_the_server_is_down(finished, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TrackingError, match="nothing was registered"):
        register_model(finished.config, finished.folder, *finished.files)


@pytest.mark.parametrize(
    ("model_uri", "message"),
    [
        ("models:/nobody@champion", r"no model is named 'nobody' \(registered: drnet"),
        ("models:/drnet@nobody", r"has no alias 'nobody' \(it has: champion"),
        ("models:/drnet/77", r"has no version '77' \(it has: 1\)"),
        ("models:/empty/latest", r"has no version 'latest' \(it has: none\)"),
        ("models:/", "MLflow at sqlite"),
    ],
)
def test_an_unknown_model_is_refused_with_the_known_ones(finished, model_uri, message):
    if "empty" in model_uri:
        MlflowClient(finished.store).create_registered_model("empty")
    with pytest.raises(TrackingError, match=message):
        open_model(model_uri)


def test_looking_up_a_model_does_not_create_a_registry(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'absent.db'}")
    with pytest.raises(TrackingError, match=r"absent\.db does not exist.*jobs\.register"):
        open_model("models:/drnet@champion")
    assert not (tmp_path / "absent.db").exists()


def test_files_are_classified_in_order_and_bad_ones_explained(finished, tmp_path):
    paths = [tmp_path / f"{seed}.jpg" for seed in range(5)]
    for seed, path in enumerate(paths):
        path.write_bytes(jpeg(60, 50, seed=seed))
    (tmp_path / "text.jpg").write_text("hello")
    paths[2:2] = [tmp_path / "text.jpg", tmp_path / "absent.jpg"]
    rows = list(classify_files(open_model("models:/drnet@champion"), paths, at_once=3))
    assert [row["file"] for row in rows] == [str(path) for path in paths]
    assert [bool(row["error"]) for row in rows] == [False, False, True, True, False, False, False]
    assert "not a JPEG" in rows[2]["error"]
    assert "No such file" in rows[3]["error"]
    with (tmp_path / "huge.jpg").open("wb") as huge:
        huge.truncate(33 * 1024**2)
    said = _content(tmp_path / "huge.jpg")
    assert isinstance(said, str), "it is not read"
    assert said == "the file has 34,603,008 bytes; at most 33,554,432 are allowed"
    assert json.loads(json.dumps(rows)) == rows
    assert {type(rows[0][key]) for key in ("class_index", "resolution")} == {int}


def test_a_router_answers_until_its_request_is_cancelled(finished):
    router = Router(Served(model="models:/drnet/1", tracking_uri=finished.store).model_dump())
    stop, files = threading.Event(), [jpeg(60, 50)] * 3
    assert [answer.error for answer in router.classify(files, router.policy(None, {}), stop)] == [None] * 3
    stop.set()
    assert router.classify(files, router.policy(None, {}), stop) == []
    router.classifier.close()


LOADED_ELSEWHERE = """
import importlib.util, pickle, sys
import numpy as np, pandas as pd, torch
assert importlib.util.find_spec("pipeline") is None
def refuse(*arguments, **options):
    raise AssertionError("a pickle is loaded")
pickle.load = pickle.loads = torch.load = refuse
import mlflow.pyfunc
model = mlflow.pyfunc.load_model("models:/drnet@champion")
data = np.load("crops.npz")
crops = {int(side): torch.from_numpy(data[side]) for side in data.files}
routed = model.unwrap_python_model().classifier.network.classify(crops)
rows = model.predict(pd.DataFrame({"image": [open("image.png", "rb").read()]}))
np.savez("answers.npz", logits=routed.logits_NK, choice=routed.choice_N, row=rows["probability"].to_numpy(float))
"""


def test_a_fresh_process_without_this_project_predicts_as_the_trained_model(finished, tmp_path):
    crops = random_crops(finished.model, 41)
    np.savez(tmp_path / "crops.npz", **{str(side): images.numpy() for side, images in crops.items()})
    picture = Image.fromarray(smooth_rgb(64, 64, seed=2))
    picture.save(tmp_path / "image.png")
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PYTHONPATH": ""}
    command = [sys.executable, "-I", "-c", LOADED_ELSEWHERE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = np.load(tmp_path / "answers.npz")

    logits_NK, choice_N = routed_logits(finished.model, crops)
    assert set(choice_N.tolist()) == {0, 1}
    assert np.array_equal(answers["choice"], choice_N)
    assert np.array_equal(answers["logits"].argmax(axis=1), logits_NK.argmax(dim=1))
    np.testing.assert_allclose(answers["logits"], logits_NK, rtol=1e-4, atol=1e-4)

    box = (4, 4, 60, 60)  # 0.875 of 64 pixels
    own = {side: picture.resize((side, side), Image.Resampling.BILINEAR, box=box) for side in finished.model.sides}
    expected, _ = routed_logits(finished.model, {side: torch.tensor(np.asarray(own[side]))[None] for side in own})
    assert answers["row"] == pytest.approx(expected.softmax(dim=1).max().item(), rel=1e-4)
