"""pipeline/config/job_package.py: which paths are lost with a Ray job's package or missing from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.cli import job_config, job_parser
from pipeline.config.job_package import job_package, package_problems
from pipeline.config.load import ConfigError, parse_config
from pipeline.tracking import store


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An unpacked package, as the working folder."""
    folder = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_123"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def config_of(**changed: Any):
    tree = {
        "name": "run",
        "data": {"dataset": "imagefolder", "folder": "/shared/data", "source": "/shared/images"},
        "stages": {"backbone": {"epochs": 1}},
        "cluster": {"storage": "/shared/runs"},
    }
    return parse_config(tree | changed)


def test_a_folder_in_a_package_is_recognized(package: Path, tmp_path: Path) -> None:
    assert job_package(package) == package
    assert job_package(package / "jobs" / "configs") == package
    assert job_package(package.parent) is None
    assert job_package(tmp_path) is None


def test_paths_outside_the_package_are_allowed(package: Path) -> None:
    assert list(package_problems(config_of(), package)) == []
    assert list(package_problems(config_of(), package, preparing=True)) == []


def test_a_path_that_is_deleted_with_the_job_is_refused(package: Path) -> None:
    data = {"dataset": "glyphs", "folder": "data/glyphs"}
    config = config_of(data=data, cluster={}, tracking={"uri": "sqlite:///mlflow.db"})

    folder, storage, tracking = package_problems(config, package)

    assert folder.startswith("data.folder is data/glyphs, in the package of this Ray job")
    assert "data.folder=/shared/glyphs" in folder
    assert "cluster.storage=/shared/runs" in storage
    assert "sqlite:///mlflow.db is in the package" in tracking
    assert [problem.split()[0] for problem in package_problems(config, package, preparing=True)] == ["data.folder"]


@pytest.mark.parametrize(
    "uri", ["sqlite:///a%20b/mlflow.db?timeout=5", "sqlite:///{package}/100%25.db", "sqlite:///q%3Fx/m.db"]
)
def test_a_quoted_sqlite_file_in_the_package_is_refused(package: Path, uri: str) -> None:
    [problem] = package_problems(config_of(tracking={"uri": uri.format(package=package)}), package)
    assert "is in the package of this Ray job" in problem
    beside = f"sqlite:///{package.parent}/mlflow%3F.db"
    assert list(package_problems(config_of(tracking={"uri": beside}), package)) == []


def test_an_absolute_path_into_the_package_is_refused_too(package: Path) -> None:
    [problem] = package_problems(config_of(cluster={"storage": str(package / "runs")}), package)
    assert problem.startswith("cluster.storage")


def test_a_password_in_a_jobs_command_is_refused_without_showing_it(package: Path) -> None:
    data = {"dataset": "glyphs", "folder": "/local", "uri": "s3://key:s3cr@et@bucket/folder"}
    config = config_of(data=data, tracking={"uri": "http://me:s3cr@et@host:5000"})

    problems = list(package_problems(config, package))

    assert [problem.split()[0] for problem in problems] == ["data.uri", "tracking.uri"]
    assert all("environment of the nodes" in problem for problem in problems)
    assert "s3cr" not in "".join(problems)


def test_a_file_that_was_not_sent_is_named_with_the_reason(package: Path) -> None:
    (package / "there.pt").touch()
    stages = {"backbone": {"epochs": 1, "init_from": "runs/other/model.pt"}, "joint": None}
    config = config_of(model={"weights": "weights/net.pth"}, stages=stages)

    weights, start = package_problems(config, package)

    assert weights.startswith("model.weights weights/net.pth is not in the package")
    [weights] = package_problems(config_of(model={"weights": "net.safetensors"}), package)
    assert weights.startswith("model.weights net.safetensors is not in the package")
    assert start.startswith("stages.backbone.init_from runs/other/model.pt is not in the package")
    assert ".gitignore and .rayignore" in start
    stages = {"backbone": {"epochs": 1, "init_from": "there.pt"}}
    assert list(package_problems(config_of(stages=stages, model={"weights": "IMAGENET1K_V1"}), package)) == []


def test_a_searchs_inputs_must_be_in_the_package_or_outside_it(package: Path) -> None:
    backbone, tables = package_problems(config_of(search={"backbone": "runs/a/model.pt", "tables": "tables"}), package)
    assert backbone.startswith("search.backbone runs/a/model.pt is not in the package")
    assert tables.startswith("search.tables tables is not in the package")
    elsewhere = config_of(search={"backbone": "models:/drnet@champion", "tables": "/shared/tables"})
    assert list(package_problems(elsewhere, package)) == []


def test_only_a_preparation_needs_the_source(package: Path) -> None:
    config = config_of(data={"dataset": "imagefolder", "folder": "/shared/data", "source": "data/images"})
    [problem] = package_problems(config, package, preparing=True)
    assert problem.startswith("data.source data/images is not in the package")
    assert list(package_problems(config, package)) == []


def test_a_job_explains_why_a_configuration_is_missing(package: Path) -> None:
    parser = job_parser("train", "Train.")
    with pytest.raises(ConfigError, match=r"the Ray job has 2 problems"):
        job_config(parser.parse_args(["--config", "glyphs"]))
    with pytest.raises(ConfigError, match=r"no such file[^\n]*\n.*not in the package of this Ray job"):
        job_config(parser.parse_args(["--config", "data/mine.yaml"]))


def test_relative_paths_work_outside_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert job_config(job_parser("train", "Train.").parse_args(["--config", "glyphs"])).name == "glyphs"
    with pytest.raises(ConfigError) as raised:
        job_config(job_parser("train", "Train.").parse_args(["--config", "data/mine.yaml"]))
    assert len(raised.value.problems) == 1


def test_the_default_tracking_store_outlasts_a_job(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = store.tracking_uri(config_of())
    monkeypatch.setattr(store, "PROJECT_FOLDER", package)
    assert store.tracking_uri(config_of()) == "sqlite:////shared/runs/mlflow.db"
    assert before == f"sqlite:///{Path(__file__).resolve().parents[2] / 'mlflow.db'}"
