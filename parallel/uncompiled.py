"""Imports libraries without what they do at import: `torch.compile` of functions, loading of Weights & Biases."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch


@contextmanager
def importing_uncompiled() -> Iterator[None]:
    """Silences imports in this block and leaves their functions uncompiled.

    Decorating one loads the compiler's backend, a second of a rank's start; none is used here. megatron-core loads
    Weights & Biases where it is installed, another second, whose temporary folders a killed rank would leave.
    """
    tracker = "wandb"
    hidden = tracker not in sys.modules
    if hidden:
        sys.modules[tracker] = None  # type: ignore[assignment] # an import of it fails as if it were not installed
    compiled = torch.compile
    torch.compile = _as_written  # type: ignore[assignment]
    try:
        # DeepSpeed prints a warning for each kernel it cannot build; none is used.
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.compile = compiled
        if hidden:
            del sys.modules[tracker]


def _as_written(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    return _as_written if function is None else function
