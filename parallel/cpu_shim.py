"""Lets modules that name the device "cuda" literally run without one: they see a torch in which it is the CPU."""

import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_CPU = torch.device("cpu")
_FACTORIES = ("empty", "empty_like", "full", "ones", "tensor", "zeros")


def serve_cpu(modules: Iterable[types.ModuleType]) -> None:
    """Replaces the name `torch` in each of `modules`; torch itself is not touched."""
    for module in modules:
        module.torch = _TorchOnCpu()  # type: ignore[attr-defined]


class _TorchOnCpu(types.ModuleType):
    """torch, except that the device "cuda" means the CPU."""

    def __init__(self) -> None:
        super().__init__("torch_on_cpu")
        self.cuda = types.ModuleType("cuda_on_cpu")
        self.cuda.__getattr__ = lambda name: getattr(torch.cuda, name)  # type: ignore[method-assign]
        self.cuda.current_device = lambda: _CPU  # type: ignore[attr-defined]
        self.cuda.synchronize = lambda *_: None  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in _FACTORIES:
            return value

        def on_cpu(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            named_cuda = device is not None and torch.device(device).type == "cuda"
            made: Tensor = value(*args, device=_CPU if named_cuda else device, **kwargs)
            return made

        return on_cpu
