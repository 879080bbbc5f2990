"""Runs modules that hard-code the device "cuda" on another device, by giving them a torch that maps it."""

import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_FACTORIES = ("empty", "empty_like", "full", "ones", "tensor", "zeros")


def serve(device: torch.device, modules: Iterable[types.ModuleType]) -> None:
    """Replaces the name `torch` in each of `modules`; torch itself stays untouched."""
    for module in modules:
        module.torch = _TorchOn(device)  # type: ignore[attr-defined]


class _TorchOn(types.ModuleType):
    """torch, except that the device "cuda" means `device`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(f"torch_on_{device.type}")
        self.device_served = device
        self.cuda = types.ModuleType(f"cuda_on_{device.type}")
        self.cuda.__getattr__ = lambda name: getattr(torch.cuda, name)  # type: ignore[method-assign]
        self.cuda.current_device = lambda: device  # type: ignore[attr-defined]
        self.cuda.synchronize = lambda *_: None  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in _FACTORIES:
            return value

        def on_device(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            named_cuda = device is not None and torch.device(device).type == "cuda"
            return value(*args, device=self.device_served if named_cuda else device, **kwargs)

        return on_device
