"""Records, operator by operator, the work a GPU would get and the waits of the host."""

import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

_READS_VALUES = {
    aten._local_scalar_dense.default,  # .item(), .tolist(), bool()
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.unique_dim.default,
    aten._unique2.default,
}
"""Operators whose result or shape depends on values, so that the host waits for them."""
# fmt: off
_NO_WORK = {
    "_reshape_alias", "_shape_as_tensor", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "device",
    "diagonal", "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "narrow", "new_empty",
    "new_empty_strided", "permute", "reshape", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unfold", "unsqueeze", "view",
}
# fmt: on
"""Operators that give the device nothing to do."""
_PASSED_OVER = (
    "/torch/",
    "/tests/cuda/recorder.py",
    "/tests/cuda/absent_gpu.py",
    "contextlib.py",
    "cuda_accelerator.py",
)
"""Files that wait on behalf of others."""
_ROOT = str(Path(__file__).resolve().parents[2])


class Wait(NamedTuple):
    """A place in the code where the host waits for the device."""

    phase: str
    owner: str
    """`triplane`, or the library."""
    what: str
    place: str
    """File and line."""


@dataclass
class Record:
    """Events of each phase."""

    phase: str = ""
    waits: Counter[Wait] = field(default_factory=Counter)
    copies: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Between host and device, by phase and direction."""
    operators: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By phase and name."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Read and written by the device's operators, by phase."""
    selected: list[str] = field(default_factory=list)
    """Phases in which a device was made the current one."""
    pinned: dict[int, Any] = field(default_factory=dict)
    """Storages in page-locked memory; kept alive, so that an address means one storage."""

    def wait(self, what: str) -> None:
        """Notes a wait of the code that is running."""
        owner, place = _culprit()
        self.waits[Wait(self.phase, owner, what, place)] += 1

    def pin(self, tensor: Tensor) -> Tensor:
        """Takes the tensor's memory for page-locked."""
        storage = tensor.untyped_storage()
        self.pinned[storage._cdata] = storage
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.pinned

    def copy(self, source: Tensor, direction: str, waits: bool) -> None:
        """Notes a copy between host and device."""
        self.copies[self.phase, direction] += 1
        if waits:
            self.wait(f"copy {direction} of {tuple(source.shape)}")


class Recorder(TorchDispatchMode):
    """Sees every operator before the fake tensors do, and answers for those that need values."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS_VALUES and isinstance(args[0], FakeTensor):
            if _on_gpu(args[0]):
                self.record.wait(str(func))
            known = getattr(args[0], "constant", None)
            if func is aten._local_scalar_dense.default and (_on_gpu(args[0]) or known is None):
                return _plausible(args[0].dtype)
            if func is aten.equal.default:
                return True
            if func is aten.nonzero.default:
                return torch.empty(1, args[0].dim(), dtype=torch.int64, device=args[0].device)
        elif func is aten.index.Tensor and any(_is_mask(index) for index in args[1]):
            self.record.wait("index by a mask")
            args = (args[0], [_one_place(index) if _is_mask(index) else index for index in args[1]])
        elif func is aten._to_copy.default:
            self._note_move(args[0], torch.device(kwargs.get("device") or args[0].device), kwargs)
        elif func is aten.copy_.default:
            self._note_copy(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, FakeTensor) and func not in _READS_VALUES:
                tensor.constant = None  # a known value may be changed by this operator
        out = func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            self.record.pin(out)
        self._count(func, args, kwargs, out)
        return out

    def _note_move(self, source: Tensor, device: torch.device, kwargs: dict[str, Any]) -> None:
        """`source.to(device)`: with `non_blocking`, what goes to the host goes to pinned memory."""
        if device.type == source.device.type:
            return
        asynchronous = kwargs.get("non_blocking", False)
        if device.type == "cuda":
            self.record.copy(source, "to the GPU", waits=not asynchronous or not self.record.is_pinned(source))
        else:
            self.record.copy(source, "to the host", waits=not asynchronous)

    def _note_copy(self, target: Tensor, source: Tensor, asynchronous: bool) -> None:
        if target.device.type == source.device.type:
            return
        host, direction = (source, "to the GPU") if _on_gpu(target) else (target, "to the host")
        self.record.copy(source, direction, waits=not asynchronous or not self.record.is_pinned(host))

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._schema.name.split("::")[-1]
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor) and _on_gpu(x)]
        if tensors and name not in _NO_WORK:
            self.record.operators[self.record.phase, str(func)] += 1
            self.record.bytes[self.record.phase] += sum(x.numel() * x.element_size() for x in tensors)


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool and _on_gpu(index)


def _one_place(mask: Tensor) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=mask.device)


def _plausible(dtype: torch.dtype) -> bool | float | int:
    """A value with which a healthy step goes on."""
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 0


def _culprit() -> tuple[str, str]:
    """(owner, file:line code) of the innermost frame that does not wait on another's behalf."""
    frames = [f for f in traceback.extract_stack() if not any(part in f.filename for part in _PASSED_OVER)]
    frame = frames[-1]
    name = str(Path(frame.filename).resolve())
    if "/site-packages/" in name:
        name = name.split("/site-packages/")[1]
        return name.split("/")[0], f"{name}:{frame.lineno} {frame.line}"
    return "triplane", f"{name.removeprefix(_ROOT + '/')}:{frame.lineno} {frame.line}"
