"""Seeded changes of parsed JSON: wrong types, missing keys, huge and odd numbers, nesting, swapped parts."""

import copy
import random
from typing import Any

_ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 0.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**30, 10**400),
    *("", "x", "0", "1e3", "../x", "/etc/passwd", "\0", "\ud800", "a" * 1000, "\n"),
    *([], {}, [[]], [None], {"a": 1}, [1, 2, 3], [-1, -1]),
]


def mutate(value: Any, draw: random.Random, times: int) -> Any:
    """A copy of `value` with so many random places changed."""
    value = copy.deepcopy(value)
    for _ in range(times):
        value = _once(value, draw)
    return value


def _once(value: Any, draw: random.Random) -> Any:
    places = list(_places(value))
    if not places:
        return draw.choice(_ODD)
    parent, key = draw.choice(places)
    match draw.choice(["replace", "replace", "replace", "remove", "swap", "nest", "scale"]):
        case "replace":
            parent[key] = copy.deepcopy(draw.choice(_ODD))
        case "remove":
            del parent[key]
        case "swap":
            other, at = draw.choice(places)
            parent[key], other[at] = copy.deepcopy(other[at]), copy.deepcopy(parent[key])
        case "nest":
            inner = parent[key]
            for _ in range(draw.choice([1, 3, 300])):
                inner = [inner] if draw.random() < 0.5 else {"a": inner}
            parent[key] = inner
        case "scale" if isinstance(parent[key], int | float):
            parent[key] = parent[key] * draw.choice([-1, 2, 1000, 10**9])
        case "scale":
            parent[key] = [parent[key], parent[key]]
    return value


def _places(value: Any) -> Any:
    """Each place that holds something: its container and its key."""
    found = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in list(found):
        yield value, key
        yield from _places(below)
