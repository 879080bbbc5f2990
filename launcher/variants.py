"""The variants of a sweep: all combinations of the values given for keys of a config."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from triplane.config.overrides import Override
from triplane.storage.errors import ConfigError

_CLOSES = {"[": "]", "{": "}", '"': '"', "'": "'"}
_LONGEST = 120
"""Characters of a name, which is also that of a folder."""
_HASHED = 6


@dataclass(frozen=True)
class Variant:
    """One combination."""

    name: str
    """Keys and values, as the name of its folder in that of the sweep."""
    overrides: list[str]


def variants(choices: Sequence[str]) -> list[Variant]:
    """Combines `key.path=v1,v2` choices, with the values of the last key varying fastest.

    Raises ConfigError with all problems.
    """
    given: dict[tuple[str, ...], list[tuple[str, Override]]] = {}
    problems: list[str] = []
    for choice in choices:
        key, _, values = choice.partition("=")
        try:
            texts = [f"{key.strip()}={value}" for value in _split(values)]
            parsed = [(text, Override.parse(text)) for text in texts]
        except ConfigError as error:
            problems.append(str(error))
            continue
        path = parsed[0][1].path
        problems += _repeated(choice, [override for _, override in parsed])
        if path in given:
            problems.append(f"{choice}: {'.'.join(path)} is given twice; give all its values at once")
        elif path == ("run_dir",):
            problems.append(f"{choice}: each variant has a run_dir of its own; set the folder of all by --out")
        given[path] = parsed
    if problems:
        raise ConfigError("\n".join(problems))
    shown = {path: path[-1] if [key[-1] for key in given].count(path[-1]) == 1 else ".".join(path) for path in given}
    return [
        Variant(
            _name(",".join(f"{shown[override.path]}={_text(text, override)}" for text, override in combination)),
            [text for text, _ in combination],
        )
        for combination in product(*given.values())
    ]


def _text(text: str, override: Override) -> str:
    return override.value if isinstance(override.value, str) else text.partition("=")[2].strip()


def _name(text: str) -> str:
    """Returns the text if it can be the name of a folder, else one that is like it and as unique."""
    plain = re.sub(r"[^\w.,=+-]+", "_", text, flags=re.ASCII)[:_LONGEST]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:_HASHED]}"


def _repeated(choice: str, overrides: Sequence[Override]) -> Iterator[str]:
    """Yields values that are the same, such as 1e-3 and 0.001."""
    values = [(isinstance(override.value, bool), override.value) for override in overrides]
    for number, value in enumerate(values):
        if value in values[:number]:
            yield f"{choice}: {value[1]} is given twice; leave one out"


def _opens(char: str, before: str, open_until: list[str]) -> bool:
    """Whether a bracket or quote is one: within quotes it is not, nor is an apostrophe within a word."""
    if open_until:
        return open_until[-1] not in "\"'"
    return char not in "\"'" or not before


def _split(text: str) -> Iterator[str]:
    """Yields the parts between commas, except those within brackets and quotes."""
    start = 0
    open_until: list[str] = []
    for place, char in enumerate(text):
        if open_until and char == open_until[-1]:
            open_until.pop()
        elif char in _CLOSES and _opens(char, text[start:place].strip(), open_until):
            open_until.append(_CLOSES[char])
        elif char == "," and not open_until:
            yield text[start:place]
            start = place + 1
    yield text[start:]
