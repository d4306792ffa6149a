"""jobs/cli.py: how every job reads its command line and how it ends."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml

from jobs import tune
from jobs.cli import field_reference, job_parser, parsed_config, reference_page, run_job
from pipeline.config.explain import describe_fields
from pipeline.config.load import ConfigError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    tree = {"name": "run", "data": {"dataset": "glyphs", "folder": "d"}, "stages": {"backbone": {"epochs": 2}}}
    path.write_text(yaml.safe_dump(tree))
    return path


def ended(main) -> int | str | None:
    with pytest.raises(SystemExit) as raised:
        run_job(main)
    return raised.value.code


def test_config_and_overrides_become_a_config(file):
    parser = job_parser("train", "Train.")

    config = parsed_config(parser.parse_args(["--config", str(file), "seed=4", "stages.backbone.lr=0.5"]))

    assert config.seed == 4
    assert config.stages.backbone is not None
    assert config.stages.backbone.lr == 0.5


def test_overrides_may_come_first(file):
    args = job_parser("train", "Train.").parse_args(["seed=4", "--config", str(file)])

    assert parsed_config(args).seed == 4


def test_the_config_is_required(capsys):
    with pytest.raises(SystemExit) as raised:
        job_parser("train", "Train.").parse_args(["seed=4"])

    assert raised.value.code == 2
    assert "--config" in capsys.readouterr().err


def test_help_says_what_the_job_does_and_lists_every_field(capsys):
    with pytest.raises(SystemExit) as raised:
        job_parser("train", "\n    Train the stages.\n\n    In order.\n    ").parse_args(["--help"])

    assert raised.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: python -m jobs.train" in printed
    assert "\nTrain the stages.\n\nIn order.\n" in printed
    words = " ".join(printed.split())
    for key, kind, default, _ in describe_fields():
        expected = f"{key} [{kind}] " + ("required" if default == "(required)" else f"default {default}")
        assert " ".join(expected.split()) in words


def test_the_reference_says_what_each_field_means_and_fits_a_terminal():
    reference = field_reference()

    flat = " ".join(reference.split())
    assert all(" ".join(meaning.split()) in flat for *_, meaning in describe_fields())
    assert max(map(len, reference.splitlines())) <= 110


def test_a_job_that_succeeds_ends_silently(capsys):
    run_job(lambda: None)

    assert capsys.readouterr() == ("", "")


def test_a_users_error_is_one_message_and_exit_code_2(capsys):
    def main() -> None:
        raise ConfigError(["seed is missing", "name is missing"], "c.yaml")

    assert ended(main) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: c.yaml has 2 problems:\n  - seed is missing\n  - name is missing\n"
    assert captured.out == ""


def test_a_missing_file_is_a_users_error(tmp_path, capsys):
    assert ended(lambda: (tmp_path / "absent").read_text()) == 2
    assert "absent" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "shown"), [((), "interrupted\n"), (("resume with X",), "resume with X\n")])
def test_ctrl_c_ends_with_the_shells_code(capsys, words: tuple[str, ...], shown: str):
    def main() -> None:
        raise KeyboardInterrupt(*words)

    assert ended(main) == 130
    assert capsys.readouterr().err == shown


def test_a_bug_keeps_its_traceback():
    def main() -> None:
        raise AssertionError("an invariant")

    with pytest.raises(AssertionError, match="an invariant"):
        run_job(main)


def test_a_job_can_add_arguments(file):
    parser = job_parser("prepare", "Prepare.")
    parser.add_argument("--force", action="store_true")

    args = parser.parse_args(["--config", str(file), "--force", "seed=1"])

    assert isinstance(args, argparse.Namespace)
    assert args.force
    assert parsed_config(args).seed == 1


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        (["--config", "glyphs"], "Give --budget-gflops or --max-accuracy-drop"),
        (["--config", "elpv", "--max-accuracy-drop", "1"], "set search.finetuned to 1 or more"),
    ],
)
def test_a_search_that_cannot_register_is_refused_before_it_starts(options, allowed, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["jobs.tune", *options, "--register"])

    assert ended(tune.main) == 2
    assert allowed in capsys.readouterr().err


def test_the_configuration_page_is_up_to_date():
    page = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
    assert page.read_text() == reference_page(), "run `make docs`"
