"""Read YAML by the types of the configuration's fields: text stays as written, and a key may appear only once."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AliasChoices

from pipeline.config.schema import Section

_STR, _INT, _FLOAT, _BOOL, _NULL, _MERGE = (
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "merge")
)


class _Loader(yaml.SafeLoader):
    """Read plain values as YAML 1.2 does.

    Only true and false are booleans, a date or a time is text, and every integer is decimal: 010 is 10.
    """

    def construct_yaml_int(self, node: yaml.Node) -> int:
        return int(self.construct_scalar(node))


_Loader.yaml_implicit_resolvers = {}
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
for _tag, _pattern, _first in (
    (_NULL, r"~|null|Null|NULL|", "~nN"),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_INT, rf"[-+]?{_DIGITS}", "-+0123456789"),
    (
        _FLOAT,
        rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    (_MERGE, r"<<", "<"),
):
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), [*_first, *([""] if _tag == _NULL else [])])
_Loader.add_constructor(_INT, _Loader.construct_yaml_int)


def read_yaml(text: str, annotation: Any) -> tuple[Any, list[str]]:
    """Read one YAML document.

    Args:
        annotation: type of the value. Plain numbers and booleans in its text and path fields are kept as text.

    Returns:
        The value, and a problem for each key that is given twice.

    Raises:
        yaml.YAMLError: the text is not YAML, or it is nested too deeply.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        prepared = _Preparation()
        problems = list(prepared.of(node, annotation, ""))
        return loader.construct_document(node), problems
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply, or it contains itself") from None
    except (ValueError, KeyError, AttributeError):  # by an explicit tag, or by int() for more than 4,300 digits
        raise yaml.YAMLError("it contains a number or a tagged value that cannot be read") from None
    finally:
        loader.dispose()


@dataclass
class _Preparation:
    """Change the nodes of a document before they become values."""

    seen: set[int] = field(default_factory=set)

    def of(self, node: yaml.Node, annotation: Any, key: str) -> Iterator[str]:
        """Keep text as text, replace old field names with new ones, and yield keys that are given twice."""
        if id(node) in self.seen:  # an alias
            return
        self.seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            if node.style is None and node.tag in (_INT, _FLOAT, _BOOL) and is_text(annotation):
                node.tag = _STR
        elif isinstance(node, yaml.SequenceNode):
            item = item_of(annotation)
            for index, child in enumerate(node.value):
                yield from self.of(child, item, f"{key}.{index}")
        elif isinstance(node, yaml.MappingNode):
            section = section_of(annotation)
            given: dict[str, list[tuple[str, int]]] = {}
            for name_node, child in node.value:
                name = str(name_node.value)
                if name_node.tag == _MERGE:
                    yield from self.of(child, annotation, key)
                    continue
                inner = None
                if isinstance(name_node, yaml.ScalarNode):
                    name_node.tag, name_node.value = _STR, field_name(section, name) if section else name
                    given.setdefault(name_node.value, []).append((name, name_node.start_mark.line + 1))
                    inner = section.model_fields.get(name_node.value) if section else None
                yield from self.of(child, inner and inner.annotation, f"{key}.{name_node.value}")
            for name, places in given.items():
                if len(places) > 1:
                    listed = ", ".join(
                        f"line {line}" if old == name else f"line {line} ({old})" for old, line in places
                    )
                    yield f"{f'{key}.{name}'[1:]} is given {len(places)} times: {listed}. Keep one"


def field_of(section: type[Section], key: str) -> Any:
    """Return the annotation of the field with a dotted key, or None if there is none."""
    annotation: Any = section
    for name in key.split("."):
        inner = section_of(annotation)
        found = inner.model_fields.get(field_name(inner, name)) if inner else None
        if found is None:
            return None
        annotation = found.annotation
    return annotation


def field_name(section: type[Section], name: str) -> str:
    """Return the name of the field that has `name` as its old name, or `name` itself."""
    for current, found in section.model_fields.items():
        if isinstance(found.validation_alias, AliasChoices) and name in found.validation_alias.choices:
            return current
    return name


def section_of(annotation: Any) -> type[Section] | None:
    """Return the Section class in `annotation`, even if it is optional."""
    return next((each for each in choices(annotation) if isinstance(each, type) and issubclass(each, Section)), None)


def is_text(annotation: Any) -> bool:
    """Return whether a value of this type, other than null, is text or a path."""
    kinds = [each for each in choices(annotation) if each is not type(None)]
    return bool(kinds) and all(
        each in (str, Path)
        or (typing.get_origin(each) is Literal and all(isinstance(value, str) for value in typing.get_args(each)))
        for each in kinds
    )


def is_optional(annotation: Any) -> bool:
    """Return whether null is a value of this type."""
    return type(None) in choices(annotation)


def choices(annotation: Any) -> tuple[Any, ...]:
    """Return the types that a union allows, or the one type that is not a union."""
    if typing.get_origin(annotation) is Annotated:
        return choices(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(each for arg in typing.get_args(annotation) for each in choices(arg))
    return (annotation,)


def item_of(annotation: Any) -> Any:
    """Return the type of a list's items, or None if it is not a list."""
    found = next((each for each in choices(annotation) if typing.get_origin(each) in (tuple, list)), None)
    return typing.get_args(found)[0] if found else None
