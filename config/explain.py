"""Explains pydantic's errors: which key, what is wrong, what would be valid."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from triplane.config.toml import format_value

_WANTED = "Input should be "
_SHOWN = 80
"""Characters shown of an invalid value."""


def explain(error: ValidationError, schema: type[BaseModel]) -> dict[tuple[str, ...], str]:
    """Maps the path of each invalid key of a config read by `schema` to one line on what is wrong."""
    by_key: dict[tuple[str, ...], list[ErrorDetails]] = defaultdict(list)
    tables: dict[tuple[str, ...], type[BaseModel]] = {}
    for details in error.errors():
        key, tables[key] = _locate(details["loc"], schema)
        by_key[key].append(details)
    return {key: _explain(key, tables[key], details, schema) for key, details in by_key.items()}


def _locate(loc: tuple[int | str, ...], schema: type[BaseModel]) -> tuple[tuple[str, ...], type[BaseModel]]:
    """Returns the key that an error is about, and its table.

    If a field takes several types, `loc` is longer than the key and ends in the type tried.
    """
    key: list[str] = []
    table, tables = schema, [schema]
    for name in loc:
        if isinstance(name, int):  # an index into a list of tables
            key.append(str(name))
            continue
        if chosen := [kind for kind in tables if name in _kinds(kind)]:  # the kind of a table
            tables = chosen
            continue
        key.append(name)
        table = tables[0]
        tables = _subtables(table, name)
        if not tables:
            break
    return tuple(key), table


def _explain(key: tuple[str, ...], table: type[BaseModel], errors: list[ErrorDetails], schema: type[BaseModel]) -> str:
    name, kind, value = key[-1], errors[0]["type"], errors[0]["input"]
    given = _short(format_value(value) if isinstance(value, str | int | float) else repr(value))
    if kind == "extra_forbidden":
        return f"unknown key; {_suggest(name, table, schema)}"
    if kind == "value_error":
        return str(errors[0]["ctx"]["error"])
    if kind == "union_tag_invalid":
        kinds = [name for below in _subtables(table, name) for name in _kinds(below)]
        near = get_close_matches(errors[0]["ctx"]["tag"], kinds, n=1)
        return f'kind is "{_short(errors[0]["ctx"]["tag"])}"; {_near_or_all(near, kinds)}'
    if kind == "missing":
        if below := _subtables(table, name):
            needs = [key for key, field in below[0].model_fields.items() if field.is_required()]
            return f"missing table; it requires {', '.join(needs)}"
        meaning = " ".join((table.model_fields[name].description or "").split()).partition(". ")[0]
        return f"missing. {meaning}".rstrip(". ")
    if kind == "model_type":
        return f"{given} given; should be a table, [{spelled(key)}]"
    # There is one error for each type that the field takes.
    messages = [details["msg"] for details in errors]
    wanted = [message.removeprefix(_WANTED) for message in messages if message.startswith(_WANTED)]
    if not wanted:
        return f"{given} given; {messages[0][0].lower()}{messages[0][1:]}"
    return f"{given} given; should be {' or '.join(wanted)}"


def spelled(key: Sequence[str]) -> str:
    """Spells a path as `data.sources[0].weight`."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(key))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _suggest(name: str, table: type[BaseModel], schema: type[BaseModel]) -> str:
    known = [*table.model_fields, *getattr(table, "short_keys", ())]
    if near := get_close_matches(name, known, n=1):
        return f"did you mean {near[0]}?"
    elsewhere = [".".join(path) for path in _paths(schema) if path[-1] == name]
    return _near_or_all(list(dict.fromkeys(elsewhere)), known)


def _near_or_all(near: list[str], known: list[str]) -> str:
    return f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(known)}"


def _paths(table: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    for name in table.model_fields:
        yield (name,)
        for below in _subtables(table, name):
            yield from ((name, *path) for path in _paths(below))


def _subtables(table: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """Returns the schemas of the table `name`, one for each of its kinds; none for a value or an unknown key."""
    return list(_tables_in(table.model_fields[name].annotation)) if name in table.model_fields else []


def _tables_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _tables_in(inner)


def _kinds(table: type[BaseModel]) -> tuple[str, ...]:
    """Returns the name of a table among the kinds of its union; none if it is in none."""
    return get_args(table.model_fields["kind"].annotation) if "kind" in table.model_fields else ()
