"""Explains pydantic's errors: which key, what is wrong, what would be valid."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import get_args

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
    table, below = schema, schema
    for name in loc:
        key.append(str(name))
        if isinstance(name, int):  # an index into a list of tables
            continue
        table, subtable = below, _subtable(below, name)
        if subtable is None:
            break
        below = subtable
    return tuple(key), table


def _explain(key: tuple[str, ...], table: type[BaseModel], errors: list[ErrorDetails], schema: type[BaseModel]) -> str:
    name, kind, value = key[-1], errors[0]["type"], errors[0]["input"]
    given = _short(format_value(value) if isinstance(value, str | int | float) else repr(value))
    if kind == "extra_forbidden":
        return f"unknown key; {_suggest(name, table, schema)}"
    if kind == "missing":
        if below := _subtable(table, name):
            needs = [key for key, field in below.model_fields.items() if field.is_required()]
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
    if near := get_close_matches(name, table.model_fields, n=1):
        return f"did you mean {near[0]}?"
    elsewhere = [".".join(path) for path in _paths(schema) if path[-1] == name]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"known here: {', '.join(table.model_fields)}"


def _paths(table: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    for name in table.model_fields:
        yield (name,)
        if below := _subtable(table, name):
            yield from ((name, *path) for path in _paths(below))


def _subtable(table: type[BaseModel], name: str) -> type[BaseModel] | None:
    """Returns the schema of the table `name`; None for a value or an unknown key."""
    if name not in table.model_fields:
        return None
    annotation = table.model_fields[name].annotation
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
