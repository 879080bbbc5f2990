"""Imports of libraries that decorate functions with `torch.compile` while they are loaded."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def importing_uncompiled() -> Iterator[None]:
    """What is imported in this block is quiet, and leaves its functions as they are written.

    Decorating one is enough to load the compiler's backend, a second of a rank's start; none is used here.
    """
    compiled = torch.compile
    torch.compile = _as_written  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.compile = compiled


def _as_written(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    return _as_written if function is None else function
