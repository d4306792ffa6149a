"""pipeline/cluster/doctor.py: problems found in the nodes' answers, and a node's answer about real folders."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from datasets.beton import TRAIN, Manifest, load_manifest
from datasets.prepare.prepare import prepare
from datasets.sources.glyphs import GlyphSettings
from pipeline.cluster.doctor import (
    Answer,
    Node,
    Request,
    answer,
    cluster_notes,
    marked,
    memory_notes,
    node_problems,
    space_problems,
    staging_problems,
    thread_notes,
)
from pipeline.cluster.preflight import Capacity, capacity_problems, cpus_for_each, num_fitting, worker_resources
from pipeline.config.load import parse_config
from pipeline.config.schema import Config
from pipeline.search.records import SearchFolder
from pipeline.training.describe import describe
from tests.mlflow_server import Server

GB = 10**9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor") / "data"
    glyphs = GlyphSettings(num_train=40, num_validation=20, image_size=32)
    prepare("glyphs", folder, glyphs=glyphs, num_processes=1)
    return folder


@pytest.fixture(scope="module")
def manifest(data: Path) -> Manifest:
    return load_manifest(data)


def config_of(**changed: Any) -> Config:
    tree = {
        "name": "run",
        "data": {"dataset": "glyphs", "folder": "/local/data"},
        "stages": {"backbone": {"epochs": 1}},
        "cluster": {"storage": "/shared/runs"},
        "tracking": {"uri": "http://tracking:5000"},
    }
    return parse_config(tree | changed)


def node(name: str, *, cpus: int = 4, gpus: int = 0, is_driver: bool = False, **changed: Any) -> Node:
    fine = Answer(
        host=name,
        versions={"python": "3.11.7", "torch": "2.13.0"},
        cpus=8,
        gpus=gpus,
        memory_bytes=16 * GB,
        data_digest="digest",
        data_free_bytes=100 * GB,
        storage_free_bytes=100 * GB,
        problems=[],
    )
    return Node(name, is_driver, cpus, gpus, replace(fine, **changed))


def test_equal_nodes_have_no_problems() -> None:
    nodes = [node("head", cpus=0, is_driver=True), node("a", gpus=1), node("b", gpus=1)]
    assert list(node_problems(config_of(), nodes, "digest")) == []
    assert list(thread_notes(config_of(), nodes)) == []


def test_different_versions_are_reported_with_their_nodes() -> None:
    other = {"python": "3.11.7", "torch": "2.12.0"}
    [problem] = node_problems(config_of(), [node("a"), node("b", versions=other), node("c")], "digest")
    assert problem.startswith("torch is not the same on every node: 2.13.0 on a, c; 2.12.0 on b.")
    assert "requirements.lock" in problem


def test_a_problem_of_every_node_is_reported_once() -> None:
    nodes = [node("a", problems=["storage: none"]), node("b", problems=["storage: none", "token: open"])]
    assert list(node_problems(config_of(), nodes, "digest")) == [
        "storage: none (on every node)",
        "token: open (on b)",
    ]


def test_other_data_on_a_node_is_reported_and_a_head_without_workers_needs_none() -> None:
    nodes = [
        node("a", is_driver=True),
        node("b", data_digest="other"),
        node("head", cpus=0, problems=["data.folder: x"]),
    ]
    [problem] = node_problems(config_of(), nodes, "digest")
    assert "other data than the driver's (digest digest) on b;" in problem
    assert "data.uri" in problem
    staged = config_of(data={"dataset": "glyphs", "folder": "/local", "uri": "file:///shared"})
    assert list(node_problems(staged, nodes, "digest")) == [], "the node downloads the data again"


def test_gpus_that_torch_does_not_see_are_reported() -> None:
    nodes = [replace(node("a"), gpus=2), replace(node("b", gpus=2))]
    [problem] = node_problems(
        config_of(), [replace(nodes[0], answer=replace(nodes[0].answer, gpus=1)), nodes[1]], "digest"
    )
    assert problem.startswith("Ray counts 2 GPUs on a, torch sees 1;")
    assert "--num-gpus=1" in problem


def test_a_tracking_file_of_one_machine_is_refused_on_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    one, two = [node("a")], [node("a"), node("b")]
    local = config_of(tracking={"uri": "sqlite:////home/me/mlflow.db"})
    assert list(node_problems(local, one, "digest")) == []
    [problem] = node_problems(local, two, "digest")
    assert "/home/me/mlflow.db is a file of one machine, and this cluster has 2" in problem
    shared = config_of(tracking={"uri": "sqlite:////shared/runs/mlflow.db"})
    assert list(node_problems(shared, two, "digest")) == []
    below = config_of(tracking={"uri": "sqlite:////shared/runs/mlflow/mlflow.db"})
    for search in (shared, below):
        assert list(node_problems(search, two, "digest")) == []
        finetuned = search.cluster.model_copy(update={"storage": SearchFolder.of(search).finetuned})
        assert list(node_problems(search.model_copy(update={"cluster": finetuned}), two, "digest")) == []


def test_workers_are_not_spread_over_nodes() -> None:
    nodes = [Capacity(3, 1), Capacity(3, 0), Capacity(0, 0)]
    assert num_fitting(nodes, 2, use_gpu=False) == 2
    assert num_fitting(nodes, 2, use_gpu=True) == 1
    assert cpus_for_each(nodes, 2, use_gpu=False) == 3
    assert cpus_for_each([Capacity(4, 0), Capacity(2, 0)], 2, use_gpu=False) == 2
    assert cpus_for_each([Capacity(4, 0)], 8, use_gpu=False) == 1
    three = config_of(cluster={"num_workers": 3, "cpus_per_worker": 2, "use_gpu": False}, training={"batch_size": 6})
    [problem] = capacity_problems(three, nodes)
    assert "num_workers 3 with 2 CPUs each, but there is room for 2 (3 CPUs and 3 CPUs and 0 CPUs)" in problem
    two = {"num_workers": 2, "cpus_per_worker": 2}
    assert capacity_problems(config_of(cluster=two | {"use_gpu": False}), nodes) == []
    [problem] = capacity_problems(config_of(cluster=two | {"use_gpu": True}), nodes)
    assert "room for 1" in problem
    assert "cluster.use_gpu=false" in problem


def test_auto_gives_every_worker_a_gpu_if_a_node_has_one() -> None:
    nodes = [Capacity(4, 1), Capacity(4, 1)]
    too_many = config_of(cluster={"num_workers": 8})
    [problem] = capacity_problems(too_many, nodes)
    assert "8 with 1 CPU and a GPU each, but there is room for 2 (4 CPUs, 1 GPU and 4 CPUs, 1 GPU)" in problem
    assert "cluster.use_gpu=false" in problem
    assert capacity_problems(too_many, [Capacity(8, 0)]) == []
    elastic = config_of(cluster={"num_workers": 8, "min_workers": 1})
    assert capacity_problems(elastic, nodes) == []
    with_gpu = {"use_gpu": True, "resources_per_worker": {"CPU": 4, "GPU": 1}}
    for fitting in (elastic, config_of(cluster={"num_workers": 2})):
        assert worker_resources(fitting, nodes) == with_gpu
    on_cpus = {"use_gpu": False, "resources_per_worker": {"CPU": 1}}
    assert worker_resources(config_of(cluster={"num_workers": 8, "use_gpu": False}), nodes) == on_cpus
    assert worker_resources(too_many, [Capacity(4, 0)] * 2) == on_cpus


def test_a_full_disk_is_reported_before_a_download(manifest: Manifest) -> None:
    config = config_of(data={"dataset": "glyphs", "folder": "/local", "uri": "file:///shared"})
    full = node("a", data_digest=None, data_free_bytes=10)
    held = node("b", data_digest=manifest.digest, data_free_bytes=10)
    [problem] = staging_problems(config, manifest, [full, held])
    assert "data.folder /local on a has 0.0 MB free" in problem
    assert list(staging_problems(config_of(), manifest, [full])) == [], "nothing is downloaded"


def test_a_storage_without_space_for_checkpoints_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(cluster={"storage": str(tmp_path)}, model={"backbone": "small_resnet"})
    assert list(space_problems(config)) == []
    monkeypatch.setattr("pipeline.cluster.doctor.free_bytes", lambda _: 1000)
    [problem] = space_problems(config)
    assert problem.startswith("cluster.storage has 0.0 MB free; 3 checkpoints")


def test_a_checkpoint_counts_the_moving_average_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {"backbone": {"epochs": 1, "momentum": 0, "ema_decay": 0.9}}
    config = config_of(cluster={"storage": str(tmp_path)}, model={"backbone": "small_resnet"}, stages=stages)
    checkpoint = describe(config).stages[0].memory.weights  # with the average, and without a state of the optimizer
    monkeypatch.setattr("pipeline.cluster.doctor.free_bytes", lambda _: 3 * checkpoint)
    assert list(space_problems(config)) == []
    monkeypatch.setattr("pipeline.cluster.doctor.free_bytes", lambda _: 3 * checkpoint - 1)
    assert len(list(space_problems(config))) == 1


def test_notes_on_memory_and_threads(manifest: Manifest) -> None:
    size = manifest.splits[TRAIN].size_bytes
    nodes = [node("a", memory_bytes=size - 1), node("b", memory_bytes=2 * size)]
    [note] = memory_notes(config_of(), manifest, nodes)
    assert "larger than the memory of a, so reads are random" in note
    assert list(memory_notes(config_of(loader={"window_pages": 64}), manifest, nodes)) == []
    [note] = thread_notes(config_of(), [node("a", cpus=16)])
    assert "Ray counts 16 CPUs on a, but processes may use only 8" in note
    [note] = thread_notes(config_of(loader={"num_threads": 9}), [node("a")])
    assert "loader.num_threads 9" in note


def test_a_cluster_without_authentication_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert list(cluster_notes()) == []
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert "RAY_AUTH_MODE" in next(cluster_notes())


def asked(tmp_path: Path, data: Path, **changed: Any) -> Answer:
    with marked(tmp_path / "runs") as mark:
        request = Request(mark, data, None, None, tokens=True, thorough=False)
        return answer(replace(request, **changed), "node-1", 0)


def test_a_node_answers_about_its_folders(tmp_path: Path, data: Path, manifest: Manifest) -> None:
    found = asked(tmp_path, data)
    assert found.problems == []
    assert found.data_digest == manifest.digest
    assert found.versions["torch"].startswith("2.")
    assert found.memory_bytes > GB
    assert found.storage_free_bytes > 0
    assert list((tmp_path / "runs").iterdir()) == [], "no files remain"


def test_a_node_with_another_storage_is_reported(tmp_path: Path, data: Path) -> None:
    [problem] = asked(tmp_path, data, mark=tmp_path / "elsewhere" / ".doctor-1").problems
    assert problem.startswith(f"cluster.storage {tmp_path / 'elsewhere'} is not the folder that the driver writes to")


def test_a_storage_without_file_locks_is_reported(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:  # as some NFS and FUSE mounts do
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    [problem] = asked(tmp_path, data).problems
    assert problem.startswith(f"cluster.storage {tmp_path / 'runs'} cannot be locked (No locks")


def test_a_node_without_data_reports_it_unless_the_data_has_an_address(tmp_path: Path) -> None:
    [problem] = asked(tmp_path, tmp_path / "none").problems
    assert problem.startswith("data.folder:")
    assert "jobs.prepare" in problem
    assert asked(tmp_path, tmp_path / "none", data_uri="file:///somewhere").problems == []


def test_damaged_data_and_an_unreachable_address_are_found_by_the_thorough_check(
    tmp_path: Path, data: Path, manifest: Manifest
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text(manifest.to_json())
    assert asked(tmp_path, broken).problems == []
    [problem] = asked(tmp_path, broken, thorough=True).problems
    assert "train.beton" in problem
    absent = (tmp_path / "absent").as_uri()
    [problem] = asked(tmp_path, data, data_uri=absent, thorough=True).problems
    assert problem.startswith("data.uri: ")


def test_an_unreachable_server_is_reported(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    [problem] = asked(tmp_path, data, tracking_uri="http://me:secret@127.0.0.1:9", thorough=True).problems
    assert problem.startswith("MLflow at http://me:***@127.0.0.1:9 says:")
    assert "secret" not in problem


@pytest.mark.slow
def test_a_server_that_refuses_the_host_name_is_reported(tmp_path: Path, data: Path) -> None:
    server = Server(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    server.start()
    try:
        assert asked(tmp_path, data, tracking_uri=server.uri, thorough=True).problems == []
        [problem] = asked(
            tmp_path, data, tracking_uri=server.uri.replace("127.0.0.1", "localhost"), thorough=True
        ).problems
    finally:
        server.kill()
    assert "tart the server with --allowed-hosts naming the host that is used here" in problem


def test_a_token_that_others_can_read_is_reported(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("a" * 64)
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert asked(tmp_path, data).problems == [], "RAY_AUTH_TOKEN is used"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    [problem] = asked(tmp_path, data).problems
    assert problem.endswith(f"chmod 600 {token}")
    assert asked(tmp_path, data, tokens=False).problems == []
    token.chmod(0o600)
    assert asked(tmp_path, data).problems == []
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / ("a" * 300) / "token"))
    assert asked(tmp_path, data).problems == [], "a path that cannot be read is no problem of the storage"
