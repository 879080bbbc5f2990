"""Writes configs as TOML; the standard library only reads it."""

import tomli_w
from pydantic import BaseModel


def to_toml(config: BaseModel) -> str:
    """Formats the resolved config with every default; omits None, as TOML has no null."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def format_value(value: object) -> str:
    """Formats a scalar, or a list of scalars, as TOML."""
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")
