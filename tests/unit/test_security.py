"""Nothing runs code from data, unpacks an archive outside its folder, or shows a secret."""

from __future__ import annotations

import ast
import importlib
import io
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from datasets.prepare.prepare import prepare
from datasets.sources.catalog import imagenet100_ids
from datasets.sources.index import SourceError
from pipeline.config.load import parse_config
from pipeline.config.schema import Config
from tests.unit.pictures import jpeg

ROOT = Path(__file__).resolve().parents[2]
CODE = [file for package in ("datasets", "pipeline", "jobs") for file in sorted((ROOT / package).rglob("*.py"))]
SECRET = "s3cr3t-of-the-test"


def unsafe_calls(source: str) -> Iterator[str]:
    """Find calls that can run code from the data they read, or write to paths that an archive names."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        unsafe = (
            (name == "torch.load" and options.get("weights_only") != "True")
            or re.fullmatch(r"(pickle|cloudpickle|dill|marshal|shelve|joblib)\.(loads?|Unpickler|open)", name)
            or re.fullmatch(r"yaml\.(load|load_all|unsafe_load|full_load)", name)
            or options.get("allow_pickle") == "True"
            or options.get("shell") == "True"
            or re.fullmatch(r"(os\.system|os\.popen|eval|exec)", name)
            or name.rpartition(".")[2] in ("extractall", "extract", "unpack_archive")
        )
        if unsafe:
            yield f"line {node.lineno}: {ast.unparse(node)}"


def test_no_code_loads_pickles_or_unpacks_archives() -> None:
    found = {str(file.relative_to(ROOT)): list(unsafe_calls(file.read_text())) for file in CODE}
    assert len(found) > 50
    assert {file: calls for file, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "call",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.loads(data)",
        "yaml.load(text, Loader)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "archive.extractall(folder)",
        "eval(text)",
    ],
)
def test_an_unsafe_call_is_found(call: str) -> None:
    assert list(unsafe_calls(f"def f():\n    return {call}")) == [f"line 2: {call}"]


def test_safe_calls_pass() -> None:
    calls = ["torch.load(p, weights_only=True)", "yaml.safe_load(t)", "archive.extractfile(m)", "model.eval()"]
    assert list(unsafe_calls("\n".join(calls))) == []


def test_members_of_a_tar_cannot_leave_their_folder(tmp_path: Path) -> None:
    """Images are read in place and never unpacked, so folders in members' names have no effect. Links are refused."""
    source = tmp_path / "inside" / "source"
    (source / "train").mkdir(parents=True)
    for number, wnid in enumerate(imagenet100_ids()):
        (source / "val" / wnid).mkdir(parents=True)
        (source / "val" / wnid / "v.JPEG").write_bytes(jpeg(seed=number))
        with tarfile.open(source / "train" / f"{wnid}.tar", "w") as archive:
            data = jpeg(seed=1000 + number)
            for name in ("../../../escaped.JPEG", f"{tmp_path}/absolute.JPEG"):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))

    manifest = prepare("imagenet100", tmp_path / "out", source=source, num_processes=1).manifest

    assert manifest.splits["train"].count == 2 * 100
    assert not list(tmp_path.rglob("escaped.JPEG")) + list(tmp_path.rglob("absolute.JPEG"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "out"]
    assert ".." not in (tmp_path / "out" / "images.jsonl").read_text()

    with tarfile.open(source / "train" / f"{wnid}.tar", "a") as archive:
        link = tarfile.TarInfo("link.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(SourceError, match=r"entries that are not files, such as links: link\.JPEG"):
        prepare("imagenet100", tmp_path / "linked", source=source, num_processes=1)
    assert not list(tmp_path.glob("linked/*.beton"))


def test_a_configuration_cannot_create_objects(tmp_path: Path) -> None:
    from pipeline.config.load import ConfigError, load_config

    file = tmp_path / "config.yaml"
    file.write_text(f"name: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(file)
    for key in ("seed", "name"):  # YAML, and text that is taken literally
        with pytest.raises(ConfigError, match=r"not YAML|name is"):
            load_config("glyphs", [f"{key}=!!python/object/apply:os.mkdir ['{tmp_path / 'made'}']"])
    assert not (tmp_path / "made").exists()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse_config(
        {
            "name": "run",
            "data": {
                "dataset": "glyphs",
                "folder": "data",
                "uri": f"s3://key:{SECRET}@bucket/folder?secret_key={SECRET}",
            },
            "stages": {"backbone": {"epochs": 1}},
            "cluster": {"storage": str(tmp_path)},
            "tracking": {"uri": f"http://me:{SECRET}@127.0.0.1:9"},
        }
    )


def test_secrets_of_addresses_are_never_stored_or_shown(config: Config) -> None:
    """The run's config.yaml, checkpoints and MLflow parameters use this dump; logs and tracebacks use repr."""
    assert SECRET not in yaml.safe_dump(config.model_dump(mode="json"))
    assert SECRET not in repr(config)
    again = parse_config(config.model_dump(mode="json"))
    assert again.tracking.uri == "http://me:***@127.0.0.1:9"


def test_warnings_and_files_of_an_untracked_run_contain_no_secrets(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from datasets.beton import load_manifest
    from datasets.sources.glyphs import GlyphSettings
    from pipeline.tracking.tracker import close_run, open_run

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    prepare("glyphs", tmp_path / "data", glyphs=GlyphSettings(20, 10, 32), num_processes=1)
    (tmp_path / "run").mkdir()
    with caplog.at_level(logging.DEBUG, logger="pipeline"):
        handle = open_run(config, tmp_path / "run", load_manifest(tmp_path / "data"))
        close_run(handle, "FAILED")
    assert "Training continues" in caplog.text
    assert SECRET not in caplog.text
    kept = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert {"journal.jsonl", "tracking.json"} <= kept.keys()
    assert [name for name, content in kept.items() if SECRET.encode() in content] == []
    assert SECRET not in repr(handle)


def test_mlflow_loads_no_pickle() -> None:
    importlib.import_module("pipeline.tracking")
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"


def test_nothing_listens_on_all_addresses() -> None:
    """Everything listens on this machine only, unless a user changes that; a pod on Kubernetes has its own address."""
    kinds = ("*.py", "*.md", "*.yaml", "*.sh", "Makefile")
    files = {file for kind in kinds for file in ROOT.glob(kind)} | set(CODE)
    files |= {file for folder in ("deploy", "docs", "scripts", "jobs/configs") for file in (ROOT / folder).rglob("*.*")}
    texts = {str(file.relative_to(ROOT)): file.read_bytes() for file in files if file.suffix not in (".png", ".svg")}
    assert [name for name, text in texts.items() if b"0.0.0.0" in text] == ["deploy/rayservice.yaml"]
