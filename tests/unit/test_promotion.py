"""The alias of a real registry: promotion, its reasons, and rollback."""

from __future__ import annotations

import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from jobs import register
from jobs.cli import run_job
from pipeline.config.schema import Config
from pipeline.evaluation.gate import Bounds
from pipeline.tracking.promotion import (
    FIRST,
    OUTSIDE,
    PROMOTED,
    ROLLED_BACK,
    history,
    move,
    promote,
    roll_back,
    rollback_stack,
    weigh,
)
from pipeline.tracking.registry import open_model, register_model
from pipeline.tracking.store import TrackingError
from tests.unit.tracking_fixtures import evaluated, finish_run, fresh_store, make_config, make_model

N = 2000
# Each version's errors among N images, and its GFLOPs: the first, a worse, a cheaper, a more expensive one.
VERSIONS = {"1": (range(100), 1.0), "2": (range(200), 1.0), "3": (range(2, 101), 0.9), "4": (range(50), 1.1)}


class Registry:
    """One finished run with four evaluations, so four versions; every test has its own alias."""

    def __init__(self, folder: Path, store: str):
        self.folder, self.store, self.client = folder, store, MlflowClient(store)
        self.tree = {"tracking": {"uri": store}, "cluster": {"storage": str(folder / "runs")}}
        self.config = make_config(folder, **self.tree)
        self.run = folder / "runs" / "small"
        model, report = finish_run(self.config, self.run, make_model(self.config))
        (self.run / "report").mkdir()
        self.files = (model, report)
        for wrong, gflops in VERSIONS.values():
            self.evaluate(wrong, gflops)
            register_model(self.config, self.run, *self.files)

    def evaluate(self, wrong: range, gflops: float) -> None:
        for report in (self.files[1], self.run / "report" / "report.json"):
            evaluated(report, ~np.isin(np.arange(N), wrong), gflops)

    def with_alias(self, alias: str, *versions: str) -> Config:
        """Return a configuration with its own alias, which `versions` got one after another."""
        before = None
        for number in versions:
            move(self.client, "drnet", alias, before, number, FIRST if before is None else PROMOTED, "for the test")
            before = number
        return make_config(self.folder, **self.tree, registry={"alias": alias})

    def at(self, alias: str) -> str:
        return str(self.client.get_model_version_by_alias("drnet", alias).version)


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> Registry:
    folder = tmp_path_factory.mktemp("promotion")
    return Registry(folder, fresh_store(folder, tmp_path_factory))


def test_registering_sets_an_alias_once_and_never_moves_it(registry):
    assert registry.at("champion") == "1"
    (entry,) = history(registry.client, "drnet", "champion")
    assert (entry["version"], entry["how"]) == ("1", FIRST)


def test_a_better_version_is_promoted_and_its_tags_say_why(registry):
    config = registry.with_alias("better", "1")
    decision = promote(config, "3", Bounds())
    assert decision.objections == []
    assert registry.at("better") == "3"
    said = registry.client.get_model_version("drnet", "3").tags["better.gate"]
    assert said.startswith("promoted. Against version 1: +0.05 points (95 % interval -0.")
    assert "on 2,000 images" in said
    assert "-10.0 % GFLOPs" in said
    assert [entry["how"] for entry in history(registry.client, "drnet", "better")] == [FIRST, PROMOTED]


def test_a_worse_version_is_refused_and_its_tags_say_why(registry):
    config = registry.with_alias("worse", "1")
    decision = promote(config, "2", Bounds())
    assert "less accurate: -5.00" in decision.objections[0]
    assert registry.at("worse") == "1"
    assert registry.client.get_model_version("drnet", "2").tags["worse.gate"].startswith("refused: it is less accurate")
    assert promote(config, "2", Bounds(max_accuracy_drop=7)).objections == []
    assert registry.at("worse") == "2"


def test_a_more_expensive_version_needs_a_bound(registry):
    config = registry.with_alias("expensive", "1")
    assert "10 % more GFLOPs" in promote(config, "4", Bounds(max_gflops_increase=9)).objections[0]
    assert promote(config, "4", Bounds(max_gflops_increase=11)).objections == []
    assert registry.at("expensive") == "4"


def test_a_challenger_may_not_be_worse_than_the_best_former_champion(registry):
    """Version 3 is as good as the champion, but version 4 once was the champion and is 2.5 points better."""
    config = registry.with_alias("former", "4", "1")
    (objection,) = promote(config, "3", Bounds()).objections
    assert objection.startswith("it is less accurate than version 4, the best former champion: -2.45 points")
    assert promote(config, "3", Bounds(max_accuracy_drop=4)).objections == []


def test_a_rollback_goes_back_step_by_step(registry):
    config = registry.with_alias("back", "1", "3", "4")
    assert roll_back(config) == ("3", "4")
    assert registry.at("back") == "3"
    assert roll_back(config) == ("1", "3")
    with pytest.raises(TrackingError, match="version 1 of drnet is the first with the alias 'back'"):
        roll_back(config)
    assert registry.at("back") == "1"
    entries = history(registry.client, "drnet", "back")
    assert [entry["version"] for entry in entries] == ["1", "3", "4", "3", "1"]
    assert [entry["how"] for entry in entries][-2:] == [ROLLED_BACK, ROLLED_BACK]


def test_a_promotion_after_a_rollback_can_be_rolled_back(registry):
    config = registry.with_alias("again", "1", "4")
    roll_back(config)
    promote(config, "3", Bounds())
    assert roll_back(config) == ("1", "3")


def test_a_move_outside_this_project_is_detected_and_can_be_undone(registry):
    config = registry.with_alias("outside", "1")
    registry.client.set_registered_model_alias("drnet", "outside", "4")
    assert roll_back(config) == ("1", "4")
    assert [entry["how"] for entry in history(registry.client, "drnet", "outside")] == [FIRST, OUTSIDE, ROLLED_BACK]


def test_the_later_of_two_simultaneous_promotions_fails(registry):
    """Both have read the champion; the other one moves it first."""
    registry.with_alias("race", "1")
    seen = weigh(registry.client, "drnet", "race", "3", Bounds())
    move(registry.client, "drnet", "race", "1", "4", PROMOTED, "the other")
    with pytest.raises(TrackingError, match="moved in the meantime, from version 1 to version 4; rerun the command"):
        move(registry.client, "drnet", "race", seen.champion, "3", PROMOTED, "late")
    assert registry.at("race") == "4"


def refuse_tags(registry: Registry, condition: str) -> None:
    """Let the database refuse such values of registered models' tags."""
    with closing(sqlite3.connect(registry.store.removeprefix("sqlite:///"))) as database:
        for event in ("INSERT", "UPDATE"):
            database.execute(
                f'CREATE TRIGGER "{event} {condition}" BEFORE {event} ON registered_model_tags WHEN {condition} '
                "BEGIN SELECT RAISE(ABORT, 'refused by the test'); END"
            )


def test_a_history_as_long_as_a_tag_can_be_keeps_its_newest_moves(registry):
    """PostgreSQL and MySQL refuse longer tags, and SQLite does not."""
    refuse_tags(registry, "length(NEW.value) > 5000")
    why = "over version 1: " + "w" * 150
    before = None
    for turn in range(24):
        number = "13"[turn % 2]
        move(registry.client, "drnet", "long", before, number, PROMOTED, f"{turn} {why}")
        before = number
    entries = history(registry.client, "drnet", "long")
    assert entries[0]["why"] != f"0 {why}"
    assert [entry["why"].split()[0] for entry in entries] == [str(turn) for turn in range(24 - len(entries), 24)]
    assert len(json.dumps(entries)) + len(json.dumps(entries[-1])) > 5000, "no more would fit"
    assert roll_back(make_config(registry.folder, **registry.tree, registry={"alias": "long"})) == ("1", "3")


def test_a_move_that_fails_leaves_alias_and_history_as_they_were(registry):
    registry.with_alias("failing", "1", "3")
    before = history(registry.client, "drnet", "failing")
    with pytest.raises(MlflowException, match="77"):
        move(registry.client, "drnet", "failing", "3", "77", PROMOTED, "there is no such version")
    refuse_tags(registry, "NEW.key = 'failing.history'")
    with pytest.raises(MlflowException, match="refused by the test"):
        move(registry.client, "drnet", "failing", "3", "4", PROMOTED, "the tag cannot be written")
    assert registry.at("failing") == "3"
    assert history(registry.client, "drnet", "failing") == before


def test_a_version_without_answers_cannot_be_compared(registry, tmp_path):
    """Such as a version from before answers were kept."""
    source = registry.client.get_model_version("drnet", "1")
    bare = registry.client.create_logged_model(registry.client.get_run(source.run_id).info.experiment_id, "drnet")
    registry.client.create_registered_model("bare")
    (tmp_path / "weights").write_text("some")
    registry.client.log_model_artifacts(bare.model_id, str(tmp_path))
    number = registry.client.create_model_version("bare", f"models:/{bare.model_id}", model_id=bare.model_id).version
    registry.client.set_registered_model_alias("bare", "champion", number)
    config = make_config(registry.folder, **registry.tree, registry={"name": "bare"})
    added = register_model(config, registry.run, *registry.files)
    with pytest.raises(
        TrackingError,
        match=r"version 1 has no answers\.npz: an older jobs\.register created it\. Register its run again",
    ):
        promote(config, added.version, Bounds())


def test_an_alias_that_does_not_exist_cannot_be_promoted_or_rolled_back(registry):
    config = make_config(registry.folder, **registry.tree, registry={"alias": "nobody"})
    with pytest.raises(TrackingError, match=r"no version of drnet has the alias 'nobody'; jobs\.register without"):
        promote(config, "1", Bounds())
    with pytest.raises(TrackingError, match="nothing to roll back"):
        roll_back(config)


@pytest.mark.parametrize(
    ("moves", "expected"),
    [
        ([], []),
        ([("1", FIRST), ("2", PROMOTED), ("1", PROMOTED)], ["1", "2", "1"]),
        ([("1", FIRST), ("2", PROMOTED), ("3", PROMOTED), ("1", ROLLED_BACK)], ["1"]),
        ([("1", FIRST), ("2", PROMOTED), ("1", ROLLED_BACK), ("3", PROMOTED)], ["1", "3"]),
        ([("1", FIRST), ("2", PROMOTED), ("1", PROMOTED), ("3", PROMOTED), ("1", ROLLED_BACK)], ["1", "2", "1"]),
        # The history has a maximum length, so the version that was rolled back to may no longer be in it.
        ([("5", PROMOTED), ("4", ROLLED_BACK)], ["4"]),
    ],
)
def test_a_rollback_undoes_what_came_after(moves, expected):
    assert rollback_stack([{"version": version, "how": how} for version, how in moves]) == expected


def ran(monkeypatch, registry: Registry, tmp_path: Path, *arguments: str) -> str | int | None:
    """Exit code of `python -m jobs.register --config ... ARGUMENTS`."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(registry.config.model_dump(mode="json")))
    monkeypatch.setattr(sys, "argv", ["register", "--config", str(tmp_path / "config.yaml"), *arguments])
    try:
        run_job(register.main)
    except SystemExit as ended:
        return ended.code
    return 0


def test_the_job_registers_refuses_promotes_and_rolls_back(registry, tmp_path, monkeypatch, capsys):
    def job(*arguments: str) -> tuple[str | int | None, str]:
        code = ran(monkeypatch, registry, tmp_path, "--alias", "job", *arguments)
        return code, "".join(capsys.readouterr())

    registry.with_alias("job", "1")
    registry.evaluate(*VERSIONS["2"])
    code, said = job()
    assert code == 0
    assert "drnet version 2 (already registered)" in said
    assert "models:/drnet@job stays version 1; --promote compares the two" in said
    code, said = job("--promote")
    assert code == 1
    assert "not promoted: models:/drnet@job stays version 1\n- it is less accurate: -5.00" in said
    assert "job, version 1  version 2  difference" in said
    registry.evaluate(*VERSIONS["3"])
    code, said = job("--promote")
    assert code == 0
    assert "promoted: models:/drnet@job is now version 3; --rollback undoes it" in said
    code, said = job("--promote")
    assert (code, "models:/drnet@job is this version" in said) == (0, True)
    code, said = job("--rollback")
    assert (code, said) == (0, "rolled back: models:/drnet@job is version 1 again, not 3\n")
    code, said = job("--max-accuracy-drop", "1")
    assert (code, "need --promote" in said) == (2, True)
    code, said = job("--promote", "--max-accuracy-drop", "-1")
    assert (code, "max_accuracy_drop is -1" in said) == (2, True)


def test_a_model_with_answers_beside_it_still_loads(registry, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.store)
    assert open_model("models:/drnet/1").metadata is not None
