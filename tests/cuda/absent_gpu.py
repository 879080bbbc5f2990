"""A GPU that is not there: tensors on "cuda" that have a shape and no data, in a torch without CUDA.

`load_guard` must run before torch is imported, `pretend` before anything that asks torch whether it has CUDA.
"""

import contextlib
import ctypes
import importlib.util
import os
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cuda.recorder import Record

_NAME, _CAPABILITY, _MEMORY = "NVIDIA H100 80GB HBM3", (9, 0), 80 * 2**30


def load_guard(folder: Path) -> None:
    """Compiles guard.cpp into `folder` unless that is done, about 5 s, and loads it."""
    built = folder / "guard.so"
    if not built.exists():
        spec = importlib.util.find_spec("torch")
        assert spec is not None and spec.origin is not None
        torch = Path(spec.origin).parent
        part = folder / f"guard.{os.getpid()}"
        command = ["c++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{torch}/include", "-o", str(part)]
        command += [str(Path(__file__).with_name("guard.cpp")), f"-L{torch}/lib", "-ltorch_cpu", "-lc10"]
        subprocess.run([*command, f"-Wl,-rpath,{torch}/lib"], check=True)
        part.rename(built)
    ctypes.CDLL(str(built))


def pretend(record: "Record", devices: int = 8) -> None:
    """Gives torch so many GPUs of one kind; what would wait for one is noted in `record`."""
    import torch
    from torch._subclasses import fake_tensor

    fake_tensor.init_gpu_context = lambda *_: None  # type: ignore[assignment]
    os.environ["DS_ACCELERATOR"] = "cuda"
    _replace_facts(devices)
    _replace_waits(record)
    _replace_attention()
    torch.nn.Module._apply = _apply  # type: ignore[assignment]
    made = torch.tensor

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "cuda":
            return made(data, *args, device=device, **kwargs)  # type: ignore[misc]
        record.wait("torch.tensor of a host value on the GPU")
        from torch.utils._python_dispatch import _disable_current_modes

        with _disable_current_modes():
            like = made(data, *args, **kwargs)
        return torch.empty(like.shape, dtype=like.dtype, device=device)

    torch.tensor = tensor  # type: ignore[assignment]
    torch.Tensor.pin_memory = lambda self, *_: record.pin(self)  # type: ignore[method-assign,assignment]
    torch.Tensor.record_stream = lambda self, *_: None  # type: ignore[method-assign,assignment]


def _replace_facts(devices: int) -> None:
    """Replaces the facts that torch.cuda reports about the machine."""
    import torch
    from torch.cuda import nvtx

    properties = types.SimpleNamespace(
        total_memory=_MEMORY, name=_NAME, major=_CAPABILITY[0], minor=_CAPABILITY[1], multi_processor_count=132
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": devices,
        "current_device": 0,
        "get_device_name": _NAME,
        "get_device_capability": _CAPABILITY,
        "get_device_properties": properties,
        "mem_get_info": (_MEMORY, _MEMORY),
    }
    answers |= dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 0)
    answers |= dict.fromkeys(("_lazy_init", "empty_cache", "reset_peak_memory_stats"))
    answers |= dict.fromkeys(("manual_seed", "manual_seed_all", "seed", "seed_all"))
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    nvtx.range_push = nvtx.range_pop = lambda *_: None  # type: ignore[assignment]


def _replace_waits(record: "Record") -> None:
    """Streams and events, on which only a wait of the host means anything here."""
    import torch

    class Stream:
        device = torch.device("cuda", 0)
        cuda_stream = 1

        def __init__(self, *_: Any, **__: Any) -> None: ...
        def wait_stream(self, _: Any) -> None: ...
        def wait_event(self, _: Any) -> None: ...
        def synchronize(self) -> None:
            record.wait("Stream.synchronize")

        def query(self) -> bool:
            return True

        def record_event(self, *_: Any) -> "Event":
            return Event()

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def record(self, *_: Any) -> None: ...
        def wait(self, *_: Any) -> None: ...
        def synchronize(self) -> None:
            record.wait("Event.synchronize")

        def query(self) -> bool:
            return True

        def elapsed_time(self, _: Any) -> float:
            return 1.0

    only = Stream()
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = cuda.default_stream = lambda *_: only
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.set_device = lambda _: record.selected.append(record.phase)
    cuda.synchronize = lambda *_: record.wait("torch.cuda.synchronize")


def _replace_attention() -> None:
    """torch chooses a kernel by asking the device; this is what it chooses on a GPU of this kind."""
    import torch
    from torch.nn import functional

    attention = functional.scaled_dot_product_attention

    def chosen(q: Any, k: Any, v: Any, *args: Any, is_causal: bool = False, **kwargs: Any) -> Any:
        if q.device.type == "cuda" and q.dtype != torch.float32:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
        return attention(q, k, v, *args, is_causal=is_causal, **kwargs)  # type: ignore[misc]

    functional.scaled_dot_product_attention = chosen  # type: ignore[assignment]


def _apply(module: Any, function: Callable[[Any], Any], recurse: bool = True, seen: Any = None) -> Any:
    """nn.Module's own exchanges the content of parameters, which tensors without data refuse; this makes new ones."""
    import torch

    seen = {} if seen is None else seen
    for child in module.children() if recurse else ():
        _apply(child, function, recurse, seen)
    for name, old in module._parameters.items():
        if old is None:
            continue
        if id(old) not in seen:
            with torch.no_grad():
                new = function(old)
            if new is not old:
                new = torch.nn.Parameter(new, old.requires_grad)
                marks = {key: value for key, value in old.__dict__.items() if not hasattr(new, key)}
                new.__dict__.update(marks)
            seen[id(old)] = (old, new)  # the old one stays alive, so that its id means it alone
        module._parameters[name] = seen[id(old)][1]
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module
