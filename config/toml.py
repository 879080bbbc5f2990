"""Writes configs as TOML; the standard library only reads it."""

import tomli_w

from triplane.training.config import RunConfig


def to_toml(config: RunConfig) -> str:
    """Formats the resolved config with every default; omits None, as TOML has no null."""
    return tomli_w.dumps(config.model_dump(exclude_none=True) | {"model": config.model.as_tables()})


def format_value(value: object) -> str:
    """Formats a value as TOML on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {format_value(below)}' for key, below in value.items())} }}"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")
