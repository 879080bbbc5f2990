"""Imports of libraries that decorate functions with `torch.compile` while they are loaded."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
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
        # DeepSpeed prints a warning for each kernel that it cannot build; none is used.
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.compile = compiled


def _as_written(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    return _as_written if function is None else function
