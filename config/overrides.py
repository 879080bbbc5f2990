"""Command-line overrides `key.path=value` of the config file."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from triplane.storage.errors import ConfigError

_UNSET = ("none", "null")


@dataclass(frozen=True)
class Override:
    """Replaces the value at `path`."""

    path: tuple[str, ...]
    value: object
    """None resets the key to its default."""

    @classmethod
    def parse(cls, text: str) -> "Override":
        """Parses `key.path=value`; a value that is not TOML is taken as a string, `none` unsets the key.

        Raises ConfigError for any other form.
        """
        path, _, value = text.partition("=")
        keys = tuple(key.strip() for key in path.split("."))
        if not all(keys) or not value.strip():
            raise ConfigError(f"override {text!r}: give it as key.path=value, for example optimizer.lr=1e-3")
        return cls(keys, _parse_value(value.strip()))

    def apply(self, values: Mapping[str, object]) -> dict[str, object]:
        """Returns a copy of the nested tables `values` with `path` set; creates missing tables.

        Raises ConfigError if `path` leads through a value.
        """
        return _set(values, self.path, self.value, depth=1)


def _parse_value(text: str) -> object:
    if text.lower() in _UNSET:  # TOML has no null
        return None
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _set(values: Mapping[str, object], path: Sequence[str], value: object, depth: int) -> dict[str, object]:
    key = path[depth - 1]
    if depth == len(path):
        return {**values, key: value} if value is not None else {k: v for k, v in values.items() if k != key}
    below = values.get(key, {})
    if not isinstance(below, Mapping):
        parent = ".".join(path[:depth])
        raise ConfigError(f"override: {'.'.join(path)}: {parent} is a value, not a table; set {parent} itself")
    return {**values, key: _set(below, path, value, depth + 1)}
