"""Configs as TOML text; the standard library only reads it."""

import json
from collections.abc import Mapping

from pydantic import BaseModel


def to_toml(config: BaseModel, prefix: str = "") -> str:
    """The resolved config with every default spelt out; `None` is left out, since TOML has no null.

    `prefix`, such as `model.`, is where its tables stand.
    """
    return "\n".join(_lines(config.model_dump(exclude_none=True), prefix)) + "\n"


def format_value(value: object) -> str:
    """A scalar, or a list of them, as TOML writes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(format_value, value))}]"
    assert isinstance(value, str | int | float), f"{type(value)} is no TOML value of ours"
    if isinstance(value, float):
        return repr(value)
    # JSON's strings, integers and booleans are TOML's too, but for the delete character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _lines(table: Mapping[str, object], prefix: str) -> list[str]:
    below = {key: value for key, value in table.items() if isinstance(value, Mapping) or _is_tables(value)}
    lines = [f"{key} = {format_value(value)}" for key, value in table.items() if key not in below]
    for key, value in below.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{prefix}{key}]", *_lines(value, f"{prefix}{key}.")]
        elif isinstance(value, list):
            for entry in value:
                lines += ["", f"[[{prefix}{key}]]", *_lines(entry, f"{prefix}{key}.")]
    return lines


def _is_tables(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, Mapping) for entry in value)
