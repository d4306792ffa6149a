"""List the configuration's fields, and explain to users what is wrong with a value."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError
from yaml.reader import ReaderError

from datasets.remote import redacted
from pipeline.config.schema import Config, Section
from pipeline.config.yaml_tree import choices, field_name, field_of, is_optional, item_of, section_of


def describe_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted key, type, default, meaning) of every field, for --help and the reference.

    The fields of a section come before those of the sections inside it.
    """
    fields = [(name, field, section_of(field.annotation)) for name, field in section.model_fields.items()]
    for name, field, inner in sorted(fields, key=lambda found: found[2] is not None):
        if inner is not None:
            yield from describe_fields(inner, f"{prefix}{name}.")
            continue
        default = "(required)" if field.is_required() else _plain(field.get_default())
        yield f"{prefix}{name}", _type_name(field.annotation), default, field.description or ""


_YAML_HINTS = {
    "'\\t'": "Indent with spaces, not tabs",
    "mapping values are not allowed": "Check the indentation, and put text that contains ': ' in quotes",
    "expected ',' or": "Close every bracket, and put text that contains ': ' or ', ' in quotes",
    "unexpected end of stream": "Close every quote",
    "cannot start any token": "Put text that starts with a special character in quotes",
    "could not determine a constructor": "Tags (!) are not allowed",
    "another document": "Remove the lines ---",
}


def explain_yaml(error: yaml.YAMLError) -> str:
    """Explain to users what is wrong with YAML text, and where."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark, problem, start = error.problem_mark, error.problem or "", error.context_mark
        if problem.startswith("but "):
            problem = f"{error.context}, {problem}"
        since = f", in the part that starts in line {start.line + 1}" if start and start.line < mark.line else ""
        hint = next((f". {hint}" for part, hint in _YAML_HINTS.items() if part in problem), "")
        return f"not YAML (line {mark.line + 1}, column {mark.column + 1}{since}): {problem}{hint}"
    if isinstance(error, ReaderError):
        return f"not YAML: it contains the control character {error.character:#x} at position {error.position}"
    return f"not YAML: {error}"


def explain(error: ValidationError) -> list[str]:
    """Explain to users what was given and what is allowed, one line for each key."""
    problems: dict[str, list[str]] = {}
    for item in error.errors():
        key, annotation = _key_of(item["loc"])
        problems.setdefault(key, []).append(_explain_item(key, annotation, item))
    return [
        " or ".join([found[0], *(each.partition(". Give ")[2] for each in found[1:])]) for found in problems.values()
    ]


def _key_of(location: Sequence[int | str]) -> tuple[str, Any]:
    """Return the dotted key of a pydantic location and its type, without the names of a union's members."""
    annotation: Any = Config
    parts: list[str] = []
    for part in location:
        section, item = section_of(annotation), item_of(annotation)
        if isinstance(part, str) and section is None and parts:
            break
        parts.append(str(part))
        field = section.model_fields.get(field_name(section, str(part))) if section else None
        annotation = item if isinstance(part, int) else field and field.annotation
    return ".".join(parts), annotation


def _explain_item(key: str, annotation: Any, item: Mapping[str, Any]) -> str:
    """Explain one pydantic error."""
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return _explain_unknown(key)
    if kind == "missing":
        return f"{key} is missing"
    if kind == "no_target":
        return f"{key}.alpha_gflops is missing (alpha_milliseconds if cost is milliseconds)"
    if not key:
        return f"the key {shown(item['input'])} is not text in UTF-8"
    given = f"{key} is {shown(item['input'])}"
    if kind == "value_error":
        return f"{given}: {context['error']}"
    section = section_of(annotation)
    if section:
        return f"{given}. Give its keys: {', '.join(section.model_fields)}"
    wanted = {
        "too_short": f"at least {_count(context.get('min_length'))}",
        "too_long": f"at most {_count(context.get('max_length'))}",
        "string_too_short": "some text",
        "string_unicode": "text in UTF-8",
        "string_too_long": "at most {max_length} characters",
        "greater_than": "more than {gt:g}",
        "greater_than_equal": "at least {ge:g}",
        "less_than": "less than {lt:g}",
        "less_than_equal": "at most {le:g}",
        "finite_number": "a finite number",
    }.get(kind)
    return f"{given}. Give {wanted.format(**context) if wanted else _allowed(annotation, kind == 'literal_error')}"


def _explain_unknown(key: str) -> str:
    """Suggest known keys in place of an unknown one."""
    fields = [name for name, *_ in describe_fields()]
    section, _, last = key.rpartition(".")
    parent = section_of(field_of(Config, section) if section else Config)
    if parent and field_name(parent, last) != last:
        return f"{key} is the old name of {field_name(parent, last)}, which is given too. Remove one of them"
    if ":" in last:
        return f"{key} is not a known key. Write a space after the colon"
    siblings = sorted(parent.model_fields) if parent else []
    sections = sorted({name.rsplit(".", depth)[0] for name in fields for depth in range(1, 1 + name.count("."))})
    prefix = f"{section}." if section else ""
    near = (
        [f"{prefix}{name}" for name in difflib.get_close_matches(last, siblings, n=3, cutoff=0.7)]
        or [name for name in fields if name.rpartition(".")[2] == last]
        or difflib.get_close_matches(key, fields + sections, n=3, cutoff=0.7)
    )
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Allowed keys: {', '.join(siblings)}"
    return f"{key} is not a known key. {hint}"


def _allowed(annotation: Any, literals: bool) -> str:
    """Describe the values of a type: its literals, or its other values."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    found = []
    for each in choices(annotation):
        if typing.get_origin(each) is Literal:
            found += [_plain(value) for value in typing.get_args(each)] if literals else []
        elif literals:
            continue
        elif typing.get_origin(each) is tuple:
            count = len(typing.get_args(each)) if Ellipsis not in typing.get_args(each) else 0
            found.append(f"a list of {_count(count)}" if count else "a list, such as [a, b]")
        elif each is not type(None):
            found.append(names.get(each, str(each)))
    found += ["null"] if is_optional(annotation) else []
    return " or ".join(filter(None, [", ".join(found[:-1]), found[-1]]))


def _count(number: int | None) -> str:
    return f"{number} value{'' if number == 1 else 's'}"


def shown(value: Any) -> str:
    """Return a value as a user would write it, without secrets, and shortened if it is long."""
    if isinstance(value, dict):
        value = list(value)
        return f"a section with the keys {', '.join(map(str, value))}" if value else "an empty section"
    text = redacted(repr(value) if isinstance(value, str | float) else _plain(value))
    return text if len(text) <= 100 else f"{text[:100]}..."


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if len(choices(annotation)) > 1:
        return " | ".join("null" if each is type(None) else _type_name(each) for each in choices(annotation))
    if choices(annotation) != (annotation,):
        return _type_name(choices(annotation)[0])
    if origin is Literal:
        return " | ".join(_plain(arg) for arg in args)
    if origin is tuple:
        return f"list of {_type_name(args[0])}"
    return getattr(annotation, "__name__", str(annotation)).replace("Path", "path")


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_plain, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
