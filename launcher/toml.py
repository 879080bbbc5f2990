"""Configs as TOML text; the standard library only reads it."""

import json
from collections.abc import Mapping

from pydantic import BaseModel


def to_toml(config: BaseModel) -> str:
    """The resolved config with every default spelt out; `None` is left out, since TOML has no null."""
    return "\n".join(_lines(config.model_dump(exclude_none=True), "")) + "\n"


def format_value(value: object) -> str:
    """A scalar as TOML writes it."""
    assert isinstance(value, str | int | float), f"{type(value)} is no TOML scalar of ours"
    if isinstance(value, float):
        return repr(value)
    # JSON's strings, integers and booleans are TOML's too, but for the delete character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _lines(table: Mapping[str, object], prefix: str) -> list[str]:
    lines = [f"{key} = {format_value(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{prefix}{key}]", *_lines(value, f"{prefix}{key}.")]
    return lines
