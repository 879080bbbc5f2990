"""Describes every key of a run config as a JSON schema, which editors check and complete by. Imports no torch."""

from typing import Any

from triplane.model.config import ModelConfig
from triplane.training.config import RunConfig

_PREFIX = "#/$defs/"


def keys_schema() -> dict[str, Any]:
    """Returns the schema of a config with every table spelled out."""
    return RunConfig.model_json_schema()


def file_schema() -> dict[str, Any]:
    """Returns the schema of a config file, whose tables may leave out `kind` and be given by short keys.

    It therefore requires no key of a part of the network: `triplane plan` does.
    """
    schema: dict[str, Any] = _any_kind(keys_schema())
    tables = schema["$defs"]
    model = tables[ModelConfig.__name__]
    for short, (part, key) in ModelConfig.short_keys.items():
        owner = next(
            table for name in part_tables(model["properties"][part]) if key in (table := tables[name])["properties"]
        )
        model["properties"][short] = owner["properties"][key]
    for part in ("attention", "feed_forward"):
        model["required"].remove(part)
    for table in tables.values():
        if "kind" in table["properties"]:
            table["required"] = []
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def part_tables(key: dict[str, Any]) -> list[str]:
    """Returns the names of the tables that a key may hold, alone or in a list."""
    if "$ref" in key:
        return [key["$ref"].removeprefix(_PREFIX)]
    below = [*key.get("anyOf", ()), *key.get("oneOf", ()), *([key["items"]] if "items" in key else ())]
    return [name for kind in below for name in part_tables(kind)]


def _any_kind(schema: Any) -> Any:
    """Lets a table without `kind` be of any."""
    if isinstance(schema, list):
        return [_any_kind(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    return {"anyOf" if key == "oneOf" else key: _any_kind(value) for key, value in schema.items()}
