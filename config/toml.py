"""Configs as TOML text; the standard library only reads it."""

import tomli_w
from pydantic import BaseModel


def to_toml(config: BaseModel) -> str:
    """The resolved config with every default spelled out; None is left out, since TOML has no null."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def format_value(value: object) -> str:
    """A scalar, or a list of them, as TOML writes it."""
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")
