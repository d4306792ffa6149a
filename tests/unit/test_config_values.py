"""pipeline/config: values and paths are what the user wrote, and a key appears once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.store.artifact.utils.models import _parse_model_uri
from mlflow.utils.validation import (
    _validate_experiment_name,
    _validate_model_alias_name,
    _validate_model_alias_name_reserved,
    _validate_model_name,
)
from pydantic import ValidationError

from pipeline.config.fields import LocalPath
from pipeline.config.load import ConfigError, load_config, parse_config
from pipeline.config.schema import Config, RegistryConfig, Section, TrackingConfig
from pipeline.config.yaml_tree import choices, read_yaml, section_of

FILE = """\
name: run
data:
  dataset: imagefolder
  folder: data/folder
  source: data/images
stages:
  backbone: {epochs: 2}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(FILE)
    return path


def value_of(config: Config, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def problems_of(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load_config(file, overrides)
    return raised.value.problems


PATHS = [
    "/d/set #2",
    "/d/my: photos",
    "[old] photos",
    "{a}",
    "2024",
    "2026-11-29",
    "no",
    "1e3",
    "*x",
    "&x",
    "'q'",
    "a\tb",
]


@pytest.mark.parametrize("text", PATHS)
@pytest.mark.parametrize("key", ["data.source", "data.folder", "cluster.storage", "stages.backbone.init_from"])
def test_a_path_on_the_command_line_is_taken_literally(file: Path, key: str, text: str) -> None:
    assert value_of(load_config(file, [f"{key}={text}"]), key) == Path(text)


@pytest.mark.parametrize(
    "text", ["2024", "2026-11-29", "no", "on", "null", "1e3", "0x10", "1_000", "010", "true", "1.50"]
)
def test_text_is_not_changed_on_the_command_line_or_in_a_file(file: Path, text: str) -> None:
    assert load_config(file, [f"name={text}"]).name == text
    file.write_text(FILE.replace("name: run", f"name: {text}"))
    if text == "null":
        assert problems_of(file) == ["name is null. Give text"]
    else:
        assert load_config(file).name == text


def test_a_data_set_of_hugging_face_is_downloaded_before(file):
    [problem] = problems_of(file, "data.source=hf://datasets/uoft-cs/cifar10")
    assert "run `hf download --repo-type dataset --local-dir FOLDER uoft-cs/cifar10` and give FOLDER" in problem


def test_what_groups_images_is_a_regular_expression(file):
    assert load_config(file, [r"data.group_by=^(.+)_\d+"]).data.group_by == r"^(.+)_\d+"
    [problem] = problems_of(file, "data.group_by=(?:scene")
    assert "data.group_by is '(?:scene': it is not a regular expression" in problem
    [problem] = problems_of(file, "data.group_by=(scene")
    assert "it is not a regular expression" in problem


@pytest.mark.parametrize("key", ["data.source", "model.weights", "tracking.uri", "search.backbone"])
def test_null_clears_optional_text_and_empty_text_is_refused(file: Path, key: str) -> None:
    assert value_of(load_config(file, [f"{key}=x", f"{key}=null", "data.uri=file:///d"]), key) is None
    [problem] = problems_of(file, f"{key}=")
    assert problem.startswith(f"{key} is ''")


@pytest.mark.parametrize(
    ("text", "value"),
    [("10", 10), ("010", 10), ("-3", -3), ("1_000", 1000), ("1e3", 1000), ("1.0", 1), ("+5", 5), ("7 # seven", 7)],
)
def test_a_leading_zero_does_not_make_an_integer_octal(file: Path, text: str, value: int) -> None:
    assert load_config(file, [f"seed={text}"]).seed == value
    file.write_text(f"seed: {text}\n{FILE}")
    assert load_config(file).seed == value


@pytest.mark.parametrize("text", ["0x10", "0o10", "1:30", "2.5", "1e-3", "yes", "ten", "2026-11-29", "[1]", "", ".nan"])
def test_an_integer_that_is_not_decimal_is_refused(file: Path, text: str) -> None:
    [problem] = problems_of(file, f"seed={text}")
    assert problem.startswith("seed is ")
    assert problem.endswith(("Give an integer", "Give a finite number"))


@pytest.mark.parametrize("text", ["yes", "on", "true", "True"])
def test_a_switch_accepts_old_and_new_yaml(file: Path, text: str) -> None:
    assert load_config(file, [f"training.compile={text}"]).training.compile is True


@settings(deadline=None)
@given(value=st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans() | st.text())
def test_a_dumped_value_is_read_back(value: Any) -> None:
    found, problems = read_yaml(yaml.safe_dump({"x": value}), None)
    assert problems == []
    assert found == {"x": value}
    assert type(found["x"]) is type(value)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_any_name_is_a_path(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "literal.yaml"
    file.write_text(FILE)
    if not text.strip() or text.startswith("~") or "://" in text or text == "null":
        return
    assert load_config(file, [f"data.source=/d/{text}"]).data.source == Path(f"/d/{text}")


def test_a_home_folder_is_expanded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    file.write_text(FILE.replace("data/images", "~/images"))
    config = load_config(file, ["cluster.storage=~/runs", "model.weights=~/net.pth", "search.tables=~"])

    assert config.data.source == Path("/home/me/images")
    assert config.cluster.storage == Path("/home/me/runs")
    assert config.model.weights == "/home/me/net.pth"
    assert config.search.tables == Path("/home/me")
    assert parse_config(config.model_dump(mode="json")) == config


def test_an_unknown_home_folder_is_refused(file: Path) -> None:
    [problem] = problems_of(file, "data.folder=~nobody-has-this-name/x")
    assert "its home folder is unknown" in problem


def path_keys(section: type[Section] = Config, prefix: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        if inner := section_of(field.annotation):
            found += path_keys(inner, f"{prefix}{name}.")
        elif Path in choices(field.annotation):
            found.append(f"{prefix}{name}")
    return found


@pytest.mark.parametrize("address", ["s3://b/x", "gs://b/x", "hdfs://h:1/x", "https://h/x", "S3://b", "abfss://c@a/x"])
@pytest.mark.parametrize("key", [*path_keys(), "model.weights", "search.backbone"])
def test_an_address_is_refused_where_only_a_path_works(file: Path, key: str, address: str) -> None:
    overrides = [f"stages.{name}={{epochs: 1, alpha_gflops: 1}}" for name in ("predictor", "joint")]
    [problem] = problems_of(file, *overrides, f"{key}={address}")
    assert problem.startswith(f"{key} is '{address}': this field takes a local path")
    assert "data.uri" in problem
    assert "tracking.uri" in problem
    assert "--upload" in problem


def test_a_file_address_is_refused_with_its_path(file: Path) -> None:
    [problem] = problems_of(file, "data.source=file:///d/my images")
    assert "write '/d/my images'" in problem


def test_an_address_shows_no_password(file: Path) -> None:
    [problem] = problems_of(file, "cluster.storage=s3://key:s3cret@b/x")
    assert "s3cret" not in problem


def test_every_path_field_is_checked() -> None:
    """A field of the plain type Path would accept addresses and keep `~`."""
    assert {"data.folder", "cluster.storage", "search.tables", "stages.joint.init_from"} <= set(path_keys())
    for cls in all_sections():
        for name, field in cls.model_fields.items():
            if Path in choices(field.annotation):
                with pytest.raises(ValidationError, match=r"local path|takes a local"):
                    cls.__pydantic_validator__.validate_assignment(cls.model_construct(), name, "s3://b/x")
    assert Path in choices(LocalPath)


def all_sections(section: type[Section] = Config) -> set[type[Section]]:
    inner = {found for field in section.model_fields.values() if (found := section_of(field.annotation))}
    return {section}.union(*(all_sections(each) for each in inner))


DUPLICATES = [
    ("stages: {joint: {epochs: 1}}\n", "stages is given 2 times: line 6, line 8. Keep one"),
    ("seed: 1\n'seed': 2\n", "seed is given 2 times: line 8, line 9. Keep one"),
    (
        "training:\n  batch_size: 4\n  precision: bfloat16\n  batch_size: 8\n",
        "training.batch_size is given 2 times: line 9, line 11",
    ),
    ('search: {space: {"kernel": [3], kernel: [5]}}\n', "search.space.kernel is given 2 times: line 8, line 8"),
    ("seed: 1\nseed: 2\nseed: 3\n", "seed is given 3 times: line 8, line 9, line 10"),
    ("unknown: [{a: 1, a: 2}]\n", "unknown.0.a is given 2 times"),
]


@pytest.mark.parametrize(("text", "named"), DUPLICATES)
def test_a_key_that_is_given_twice_is_refused_with_its_lines(file: Path, text: str, named: str) -> None:
    file.write_text(FILE + text)
    assert any(named in problem for problem in problems_of(file))


def test_a_key_that_is_given_twice_in_an_override_is_refused(file: Path) -> None:
    [problem] = problems_of(file, "stages.backbone={epochs: 1, epochs: 2}")
    assert "epochs is given 2 times" in problem


def test_a_merged_key_may_be_changed(file: Path) -> None:
    file.write_text(
        FILE.replace(
            "backbone: {epochs: 2}", "backbone: &b {epochs: 2, lr: 0.5}\n  joint: {<<: *b, lr: 2, alpha_gflops: 1}"
        )
    )
    stages = load_config(file).stages
    assert stages.joint is not None
    assert (stages.joint.epochs, stages.joint.lr) == (2, 2)


def test_an_override_changes_only_one_of_two_sections_that_share_an_anchor(file: Path) -> None:
    file.write_text(FILE.replace("backbone: {epochs: 2}", "predictor: &p {epochs: 2, alpha_gflops: 1}\n  joint: *p"))
    stages = load_config(file, ["stages.joint.epochs=3"]).stages
    assert stages.predictor is not None
    assert stages.joint is not None
    assert (stages.predictor.epochs, stages.joint.epochs) == (2, 3)


@pytest.mark.parametrize("text", ["a: &a {b: *a}\n", "a: &a {<<: *a}\n", f"a: {'[' * 5000}\n"])
def test_a_document_without_end_is_refused(file: Path, text: str) -> None:
    file.write_text(text)
    assert problems_of(file)


PREDICTOR = "predictor: {epochs: 4, alpha_gflops: 1, %s}"


def test_the_old_name_of_num_crops_works(file: Path) -> None:
    file.write_text(FILE + f"  {PREDICTOR % 'views: 2'}\n")
    configs = [
        load_config(file),
        load_config(file, ["stages.predictor.views=2"]),
        load_config(file, ["stages.predictor={epochs: 4, alpha_gflops: 1, views: 2}"]),
        parse_config(yaml.safe_load(file.read_text())),  # a stored configuration
        parse_config(load_config(file).model_dump(mode="json")),
    ]
    for config in configs:
        assert config.stages.predictor is not None
        assert config.stages.predictor.num_crops == 2
        assert "views" not in config.model_dump(mode="json")["stages"]["predictor"]


@pytest.mark.parametrize("key", ["num_crops", "views"])
def test_an_override_replaces_the_old_name_of_num_crops(file: Path, key: str) -> None:
    for old in ("num_crops", "views"):
        file.write_text(FILE + f"  {PREDICTOR % f'{old}: 2'}\n")
        stage = load_config(file, [f"stages.predictor.{key}=3"]).stages.predictor
        assert stage is not None
        assert stage.num_crops == 3


def test_old_and_new_name_together_are_refused(file: Path) -> None:
    file.write_text(FILE + f"  {PREDICTOR % 'views: 2, num_crops: 3'}\n")
    assert problems_of(file) == ["stages.predictor.num_crops is given 2 times: line 8 (views), line 8. Keep one"]
    with pytest.raises(ConfigError, match=r"views is the old name of num_crops, which is given too"):
        parse_config(yaml.safe_load(file.read_text()))


NAMES = (
    st.text(min_size=1, max_size=30)
    | st.text("ab1v/:.'\"@?#%\\ _-\n", min_size=1, max_size=8)
    | st.from_regex("[vV]?[0-9]+|latest|LaTest", fullmatch=True)
)


@settings(deadline=None)
@given(NAMES)
def test_mlflow_accepts_every_registry_name_and_alias_that_is_accepted_here(text: str) -> None:
    for key, check in (("name", _validate_model_name), ("alias", _validate_model_alias_name)):
        try:
            registry = RegistryConfig.model_validate({key: text})
        except ValidationError:
            continue
        check(text)
        if key == "alias":
            _validate_model_alias_name_reserved(text)
        parsed = _parse_model_uri(f"models:/{registry.name}@{registry.alias}")
        assert (parsed.name, parsed.alias) == (registry.name, registry.alias)


@pytest.mark.parametrize(
    "name", ["a/b", "a:b", ".", "..", "a'b", 'a"b', "", " ", " a", "a@b", "a?b", "a#b", "a%b", "x" * 300]
)
def test_a_registry_name_that_mlflow_cannot_use_is_refused(file: Path, name: str) -> None:
    [problem] = problems_of(file, f"registry.name={name}")
    assert problem.startswith("registry.name is ")
    assert "letters, digits" in problem


@pytest.mark.parametrize("alias", ["latest", "Latest", "v1", "V22", "a.b", "a b", "", "ä"])
def test_an_alias_that_mlflow_cannot_use_is_refused(file: Path, alias: str) -> None:
    [problem] = problems_of(file, f"registry.alias={alias}")
    assert problem.startswith("registry.alias is ")


@settings(deadline=None)
@given(st.text(max_size=600))
def test_mlflow_accepts_every_experiment_name_that_is_accepted_here(text: str) -> None:
    try:
        TrackingConfig(experiment=text)
    except ValidationError:
        return
    _validate_experiment_name(text)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("data.folder", "images", "data.folder, images, is inside data.source images"),
        ("data.folder", "./images/../images/prepared", "is inside data.source images"),
        ("data.folder", "link/prepared", "is inside data.source images"),
        ("cluster.storage", "images/runs", "cluster.storage, images/runs, is inside data.source"),
        ("search.tables", "images/tables", "search.tables, images/tables, is inside"),
        ("search.node_folder", "images/decoded", "search.node_folder, images/decoded, is inside"),
        ("tracking.uri", "sqlite:///{here}/images/mlflow.db", "the folder of tracking.uri, {here}/images, is inside"),
        ("data.folder", "validation", "data.folder, validation, is inside data.validation_source validation"),
    ],
)
def test_a_folder_inside_the_images_is_refused(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to("images")
    here = os.path.realpath(tmp_path)
    overrides = ["data.source=images", "data.validation_source=validation", f"{key}={value.format(here=here)}"]
    [problem] = problems_of(file, *overrides)
    assert named.format(here=here) in problem
    assert list((tmp_path / "images").iterdir()) == []


def test_a_folder_beside_the_images_is_allowed(file: Path) -> None:
    assert load_config(file, ["data.source=/d/images", "data.folder=/d/images-prepared"])
    assert load_config(file, ["data.dataset=glyphs", "data.source=.", "data.folder=data"])
