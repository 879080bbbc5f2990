"""Writes the reference of a run config as markdown, from its JSON schema."""

from collections.abc import Iterator
from typing import Any

from triplane.config.schema import part_tables
from triplane.config.toml import format_value

_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
_NAMES = {"array": "list", "integer": "integer", "number": "number", "string": "string", "boolean": "boolean"}


_HEAD = """# The config
Written by `triplane config --reference` from the docstrings in `*/config.py` and `model/parts/`; change it there.

A run is one TOML file; [configs/](../configs) has examples. `key.path=value` on the command line overrides a key, and
`key.path=none` resets it to its default. Every mistake is reported at once, before anything starts.

An editor that checks TOML by a JSON schema, such as VS Code with Even Better TOML, or any with Taplo's language server,
completes keys, shows their meaning and marks mistakes. Write the schema by
`triplane config --schema > run.schema.json`, and name it in the first line of the config:

```toml
#:schema ./run.schema.json
```
"""


class _Sections:
    """A section for each table, and in it a row for each key."""

    def __init__(self, schema: dict[str, Any]):
        self._tables = schema["$defs"]
        self._headings: dict[str, str] = {}
        """The heading of each table that has been written."""
        self.lines = list(self._section("Top level", "", schema))

    def _section(self, heading: str, path: str, table: dict[str, Any]) -> Iterator[str]:
        below: list[tuple[str, str]] = []
        rows = []
        for key, schema in table["properties"].items():
            where = f"{path}.{key}" if path else key
            for name in part_tables(schema):
                if name not in self._headings:
                    self._headings[name] = self._heading(where, name, schema)
                    below.append((where, name))
            meaning = _text(schema) or " ".join(_text(self._tables[name]) for name in part_tables(schema))
            rows.append(f"| `{key}` | {self._type(schema)} | {_default(schema)} | {meaning} |")
        yield from (
            "",
            f"## {heading}",
            _text(table),
            "",
            "| key | value | default | meaning |",
            "| --- | --- | --- | --- |",
        )
        yield from rows
        for where, name in below:
            yield from self._section(self._headings[name], where, self._tables[name])

    def _heading(self, path: str, name: str, schema: dict[str, Any]) -> str:
        kind = self._tables[name]["properties"].get("kind", {}).get("const")
        named = f"[[{path}]]" if schema.get("type") == "array" else f"[{path}]"
        return f'`{named}` of kind "{kind}"' if kind else f"`{named}`"

    def _type(self, schema: dict[str, Any]) -> str:
        if names := part_tables(schema):
            first = self._headings[names[0]].partition(" of kind")[0]
            return f"table{'s' if schema.get('type') == 'array' else ''} {first}"
        options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
        return " or ".join(map(_values, options))


def reference(schema: dict[str, Any]) -> str:
    """Returns the reference: an introduction, then the tables of `keys_schema`, depth first."""
    return _HEAD + "\n".join(_Sections(schema).lines) + "\n"


def _values(schema: dict[str, Any]) -> str:
    if known := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{format_value(value)}`" for value in known)
    bounds = [f"{sign} {schema[name]:g}" for name, sign in _BOUNDS.items() if name in schema]
    of = f" of {_values(schema['items'])}" if "items" in schema else ""
    return " ".join([_NAMES[schema["type"]] + of, *([" and ".join(bounds)] if bounds else [])])


def _default(schema: dict[str, Any]) -> str:
    if "default" not in schema:
        return "required"
    match schema["default"]:
        case None:
            return "none"
        case {"kind": kind} if part_tables(schema) and "oneOf" in schema:
            return f'kind "{kind}"'
        case dict():
            return ""
        case value:
            return f"`{format_value(value)}`"


def _text(schema: dict[str, Any]) -> str:
    return " ".join(schema.get("description", "").split()).replace("|", "\\|")
