"""The alias of a registered model (champion): the gate that guards it, its history, and rolling it back.

Registering a model sets an alias that does not exist yet. Only `promote` and `roll_back` move an existing alias.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient

from pipeline.config.schema import Config
from pipeline.evaluation.gate import (
    ANSWERS_FILE,
    Answers,
    Bounds,
    Comparison,
    compare_answers,
    former_objections,
    objections,
    static_objections,
)
from pipeline.tracking.store import TrackingError, connect, explained, now_ms, tracking_uri

FIRST, PROMOTED, ROLLED_BACK, OUTSIDE = "first", "promoted", "rolled back", "moved outside"
MAX_HISTORY = 5000
"""The most characters that a registered model's tag can have in MLflow's tables in PostgreSQL and MySQL."""


@dataclass(frozen=True)
class Decision:
    """The gate's decision about a challenger."""

    name: str
    alias: str
    challenger: str
    champion: str
    """The version that had the alias when the two were compared."""
    comparison: Comparison | None
    """The comparison of the two versions; None if the challenger already is the champion."""
    objections: list[str]


def promote(config: Config, number: str, bounds: Bounds) -> Decision:
    """Give the configured alias to a version if the gate has no objection. The version's tags record the reasons.

    Raises:
        TrackingError: the two versions cannot be compared, or another process moved the alias in the meantime.
    """
    uri = tracking_uri(config)
    mlflow.set_tracking_uri(uri)  # MLflow resolves models:/ addresses by this alone, for the whole process
    with explained(uri):
        client = connect(uri)
        decision = weigh(client, config.registry.name, config.registry.alias, number, bounds)
        if decision.comparison is None:
            return decision
        if not decision.objections:
            why = f"over version {decision.champion}: {decision.comparison.sentence()}"
            move(client, decision.name, decision.alias, decision.champion, number, PROMOTED, why)
        record(client, decision, decision.comparison)
    return decision


def weigh(client: MlflowClient, name: str, alias: str, number: str, bounds: Bounds) -> Decision:
    """Compare a version with the one that has the alias, without changing anything.

    Raises:
        TrackingError: no version has the alias, or the two cannot be compared.
    """
    champion = alias_version(client, name, alias)
    if champion is None:
        raise TrackingError(f"no version of {name} has the alias {alias!r}; jobs.register without --promote sets it")
    if champion == number:
        return Decision(name, alias, number, champion, None, [])
    try:
        challenger = _answers(name, number)
        found = compare_answers(challenger, _answers(name, champion))
    except ValueError as error:
        raise TrackingError(f"versions {number} and {champion} of {name}: {error}") from None
    reasons = objections(found, bounds) + static_objections(challenger, bounds)
    best, against = _best_former(client, name, alias, challenger, number)
    if against is not None and against.champion_top1 > found.champion_top1:
        reasons += former_objections(against, bounds, best)
    return Decision(name, alias, number, champion, found, reasons)


def _best_former(
    client: MlflowClient, name: str, alias: str, challenger: Answers, number: str
) -> tuple[str, Comparison | None]:
    """Return the most accurate version that had the alias before the champion, and the challenger compared with it.

    Versions that were rolled back, deleted, or evaluated on other images do not count. If none is left, the version is
    empty and the comparison None.
    """
    *formers, _ = rollback_stack(history(client, name, alias))
    existing = {str(found.version): found for found in client.search_model_versions(f"name = '{name}'")}
    versions = [version for version in dict.fromkeys(formers) if version in existing and version != number]
    # Sorted by the accuracy in the tags, the first version that was evaluated on the challenger's images is the best.
    for version in sorted(versions, key=lambda version: -float(existing[version].tags.get("accuracy", 0))):
        try:
            return version, compare_answers(challenger, _answers(name, version))
        except ValueError:
            continue
    return "", None


def record(client: MlflowClient, decision: Decision, found: Comparison) -> None:
    """Write the decision and its reasons into the challenger's tags."""
    verdict = "refused: " + "; ".join(decision.objections) if decision.objections else "promoted"
    said = f"{verdict}. Against version {decision.champion}: {found.sentence()}"
    client.set_model_version_tag(decision.name, decision.challenger, f"{decision.alias}.gate", said)


def roll_back(config: Config) -> tuple[str, str]:
    """Give the alias back to the version that had it before. Return that version, and the one that lost the alias.

    Versions that were deleted in the meantime are skipped.

    Raises:
        TrackingError: no version had the alias before, or another process moved it in the meantime.
    """
    uri, name, alias = tracking_uri(config), config.registry.name, config.registry.alias
    with explained(uri):
        client = connect(uri)
        current = alias_version(client, name, alias)
        if current is None:
            raise TrackingError(f"no version of {name} has the alias {alias!r}, so there is nothing to roll back")
        existing = {str(found.version) for found in client.search_model_versions(f"name = '{name}'")}
        *earlier, _ = rollback_stack(history(client, name, alias))
        earlier = [number for number in earlier if number in existing and number != current]
        if not earlier:
            raise TrackingError(
                f"version {current} of {name} is the first with the alias {alias!r}; there is no earlier one"
            )
        move(client, name, alias, current, earlier[-1], ROLLED_BACK, f"from version {current}")
    return earlier[-1], current


def give_first(client: MlflowClient, name: str, alias: str, number: str) -> str:
    """Give a version the alias if no version has it. Return the version that has it afterwards."""
    champion = alias_version(client, name, alias)
    if champion is not None:
        return champion
    move(client, name, alias, None, number, FIRST, "no version had the alias")
    return number


def move(client: MlflowClient, name: str, alias: str, expected: str | None, number: str, how: str, why: str) -> None:
    """Add the move to the history and point the alias at a version.

    If the alias cannot be moved, the history is restored. MLflow has no compare-and-swap, so the alias is read right
    before and right after. If two processes move it at the same time, at least the process whose version does not keep
    the alias gets an error.

    Args:
        expected: the version that should have the alias now; None if none should.
        number: the version that gets the alias.
        how, why: kind of and reason for the move, for the history.

    Raises:
        TrackingError: the alias does not have the expected version before or after the move.
    """
    if (found := alias_version(client, name, alias)) != expected:
        raise TrackingError(
            f"the alias {alias!r} of {name} was moved in the meantime, from {_version(expected)} to {_version(found)}; "
            "rerun the command to compare with the new version"
        )
    before = history(client, name, alias)
    _save_history(client, name, alias, [*before, {"version": number, "how": how, "why": why, "time_ms": now_ms()}])
    try:
        client.set_registered_model_alias(name, alias, number)
    except Exception:
        _save_history(client, name, alias, before)
        raise
    if (found := alias_version(client, name, alias)) != number:
        raise TrackingError(
            f"this command gave the alias {alias!r} of {name} to version {number}, and at the same moment somebody "
            f"else gave it to {_version(found)}, which has it now; rerun the command"
        )


def history(client: MlflowClient, name: str, alias: str) -> list[dict[str, Any]]:
    """Return the moves of the alias, oldest first: `version`, `how`, `why`, `time_ms`. The last one is current.

    Only the newest moves are kept, as many as fit in MAX_HISTORY characters. A move that was made outside this module
    is detected here and becomes an entry too.
    """
    model = client.get_registered_model(name)
    try:
        entries = json.loads(model.tags.get(_history_tag(alias), "[]"))
    except ValueError as error:
        raise TrackingError(f"the tag {_history_tag(alias)} of {name} is damaged ({error}); remove the tag") from None
    current = model.aliases.get(alias)
    if current is not None and (not entries or entries[-1]["version"] != str(current)):
        entries.append(
            {"version": str(current), "how": OUTSIDE, "why": "moved outside jobs.register", "time_ms": now_ms()}
        )
    return entries


def _save_history(client: MlflowClient, name: str, alias: str, entries: Sequence[dict[str, Any]]) -> None:
    """Write the newest moves of the alias, as many as the tag has room for."""
    while len(text := json.dumps(entries)) > MAX_HISTORY:
        entries = entries[1:]
    client.set_registered_model_tag(name, _history_tag(alias), text)


def rollback_stack(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Return the versions that rollbacks step through, the current one last. A rollback removes all later versions.

    The history may lack the version that a rollback returned to, because its oldest moves are removed. Then only that
    version is left.
    """
    stack: list[str] = []
    for entry in entries:
        version = entry["version"]
        if entry["how"] == ROLLED_BACK:
            while stack and stack[-1] != version:
                stack.pop()
            stack = stack or [version]
        elif not stack or stack[-1] != version:
            stack.append(version)
    return stack


def alias_version(client: MlflowClient, name: str, alias: str) -> str | None:
    """Return the version that has the alias, or None."""
    found = client.get_registered_model(name).aliases.get(alias)
    return None if found is None else str(found)


def _answers(name: str, number: str) -> Answers:
    """Download a version's answers. Raise ValueError if the version has none. Errors of the registry pass through."""
    version = f"models:/{name}/{number}"
    if ANSWERS_FILE not in {found.path for found in mlflow.artifacts.list_artifacts(artifact_uri=version)}:
        raise ValueError(
            f"version {number} has no {ANSWERS_FILE}: an older jobs.register created it. Register its run again"
        )
    with tempfile.TemporaryDirectory() as temporary:
        artifact = f"{version}/{ANSWERS_FILE}"
        return Answers.load(Path(mlflow.artifacts.download_artifacts(artifact_uri=artifact, dst_path=temporary)))


def _history_tag(alias: str) -> str:
    return f"{alias}.history"


def _version(number: str | None) -> str:
    return "no version" if number is None else f"version {number}"
