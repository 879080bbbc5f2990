"""A part of the network: a table of the config that describes its weights and cost, and computes. Imports no torch.

A part is one file in `parts/`: its options, `weights()`, `cost()` and the function that it computes, over a module
(modules.py) that holds the weights.
"""

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Part(BaseModel):
    """Options of one kind of part; `kind` tells it from the other kinds of its union."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def default_kind(kind: str) -> BeforeValidator:
    """Returns a validator that reads a table without `kind` as one of `kind`."""

    def complete(value: Any) -> Any:
        return {"kind": kind, **value} if isinstance(value, dict) else value

    return BeforeValidator(complete)


def as_tuple(value: Any) -> Any:
    """Turns a list of TOML into a tuple, which frozen configs can hash."""
    return tuple(value) if isinstance(value, list) else value
