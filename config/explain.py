"""Explains pydantic's errors: which key, what is wrong, what would be valid."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from triplane.config.toml import format_value

_WANTED = "Input should be "
_SHOWN = 80
"""Characters shown of an invalid value."""


def explain(error: ValidationError, schema: type[BaseModel]) -> dict[tuple[str, ...], str]:
    """Maps the path of each invalid key of a config read by `schema` to one line on what is wrong."""
    by_key: dict[tuple[str, ...], list[ErrorDetails]] = defaultdict(list)
    places: dict[tuple[str, ...], _Place] = {}
    for details in error.errors():
        key, places[key] = _locate(details["loc"], schema)
        by_key[key].append(details)
    return {key: _explain(key, places[key], details, schema) for key, details in by_key.items()}


class _Place(NamedTuple):
    """Where a key stands."""

    table: type[BaseModel]
    union: list[type[BaseModel]]
    """The kinds that the table may be of."""


def _locate(loc: tuple[int | str, ...], schema: type[BaseModel]) -> tuple[tuple[str, ...], _Place]:
    """Returns the key that an error is about, and its place.

    If a field takes several types, `loc` is longer than the key and ends in the type tried.
    """
    key: list[str] = []
    tables = union = [schema]
    place = _Place(schema, union)
    for name in loc:
        if isinstance(name, int):  # an index into a list of tables
            key.append(str(name))
            continue
        if chosen := [kind for kind in tables if name in _kinds(kind)]:  # the kind of a table
            tables = chosen
            continue
        key.append(name)
        place = _Place(tables[0], union)
        tables = union = _subtables(place.table, name)
        if not tables:
            break
    return tuple(key), place


def _explain(key: tuple[str, ...], place: _Place, errors: list[ErrorDetails], schema: type[BaseModel]) -> str:
    name, table, kind, value = key[-1], place.table, errors[0]["type"], errors[0]["input"]
    below = _subtables(table, name)
    kinds = [name for table in below for name in _kinds(table)]
    given = _short(format_value(value) if isinstance(value, str | int | float | tuple) else repr(value))
    if kind == "extra_forbidden":
        return _unknown(key, place, schema)
    if kind == "value_error":
        return str(errors[0]["ctx"]["error"])
    if kind == "union_tag_invalid":
        near = get_close_matches(errors[0]["ctx"]["tag"], kinds, n=1)
        return f'kind is "{_short(errors[0]["ctx"]["tag"])}"; {_near_or_all(near, kinds)}'
    if kind == "union_tag_not_found":
        return f"kind is missing; known here: {', '.join(kinds)}"
    if kind == "missing":
        if below:
            needs = [key for key, field in below[0].model_fields.items() if field.is_required()]
            return f"missing table; it requires {', '.join(needs)}"
        meaning = " ".join((table.model_fields[name].description or "").split()).partition(". ")[0]
        return f"missing. {meaning}".rstrip(". ")
    if kind in ("model_type", "model_attributes_type"):
        return f"{given} given; should be a table, [{spelled(key)}]"
    if kind in ("list_type", "tuple_type") and below:
        return f"{given} given; should be a list of tables, [[{spelled(key)}]]"
    # There is one error for each type that the field takes.
    messages = dict.fromkeys(details["msg"].replace("a valid tuple", "a list of these") for details in errors)
    wanted = [message.removeprefix(_WANTED) for message in messages if message.startswith(_WANTED)]
    if not wanted:
        message = next(iter(messages))
        return f"{given} given; {message[0].lower()}{message[1:]}"
    return f"{given} given; should be {' or '.join(wanted)}"


def spelled(key: Sequence[str]) -> str:
    """Spells a path as `data.sources[0].weight`."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(key))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _unknown(key: tuple[str, ...], place: _Place, schema: type[BaseModel]) -> str:
    name, table = key[-1], place.table
    short_keys = getattr(table, "short_keys", {})
    if name in short_keys:
        return f"stands for {'.'.join(short_keys[name])}, which is given as well; leave one out"
    if others := [kind for other in place.union if name in other.model_fields for kind in _kinds(other)]:
        return f'not an option of {key[-2]} of kind "{_kinds(table)[0]}", but of {" and ".join(others)}'
    known = [*table.model_fields, *short_keys]
    if near := get_close_matches(name, known, n=1):
        return f"unknown key; did you mean {near[0]}?"
    elsewhere = sorted({path for path in _paths(schema) if path[-1] == name}, key=len)
    nearest = [".".join(path) for path in elsewhere if len(path) == len(elsewhere[0])]
    return f"unknown key; {_near_or_all(nearest, known)}"


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
