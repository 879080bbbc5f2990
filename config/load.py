"""Loads a run config from a TOML file and command-line overrides."""

import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from pydantic import ValidationError

from triplane.config.explain import explain, spelled
from triplane.config.overrides import Override
from triplane.model.config import ModelConfig
from triplane.storage.errors import ConfigError
from triplane.training.config import RunConfig


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads the TOML file `path` and applies `key.path=value` overrides; the last one for a key wins.

    Validates keys, types and bounds; `checks.check` validates constraints among keys.
    Raises ConfigError with all problems, each line naming the file or the override at fault.
    """
    problems: list[str] = []
    parsed: list[Override] = []
    for text in overrides:
        try:
            parsed.append(Override.parse(text))
        except ConfigError as error:
            problems.append(str(error))
    try:
        values = _read(path)
    except ConfigError as error:
        raise ConfigError("\n".join([str(error), *problems])) from None
    for override in parsed:
        try:
            values = override.apply(values)
        except ConfigError as error:
            problems.append(str(error))
    try:
        config = RunConfig.model_validate(values, strict=True)
    except ValidationError as error:
        for spelled_out, problem in explain(error, RunConfig).items():
            key = _as_given(spelled_out, values)
            # An override may have created the table of the key, or replaced it or a value in it.
            overridden = any(override.path[: len(key)] == key[: len(override.path)] for override in parsed)
            problems.append(f"{'override' if overridden else path}: {spelled(key)}: {problem}")
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _as_given(key: tuple[str, ...], values: Mapping[str, object]) -> tuple[str, ...]:
    """Returns the key as the user wrote it, where `[model]` takes a short one."""
    given = values.get("model")
    if isinstance(given, Mapping) and key[0] == "model":
        for short, long in ModelConfig.short_keys.items():
            table = given.get(long[0])
            spelled_out = isinstance(table, Mapping) and long[1] in table
            if short in given and key[1:3] == long and not spelled_out:
                return ("model", short, *key[3:])
    return key


def _read(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {_near(path)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        text = "" if path.suffix == ".toml" else "; to train on a text, let its name end in .txt"
        raise ConfigError(f"{path}: not TOML: {error}{text}") from None


def _near(path: Path) -> str:
    names = sorted(file.name for file in path.parent.glob("*.toml"))
    near = get_close_matches(path.name, names) or get_close_matches(f"{path.name}.toml", names) or names
    return f"did you mean {', '.join(str(path.parent / name) for name in near)}?" if near else "no .toml file is near"
