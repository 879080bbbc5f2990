"""Knows the device: published peak FLOP/s for MFU, the faster precision of a CPU, memory; picks its FlashAttention."""

import re
import time
from importlib.util import find_spec
from typing import Literal

import torch
from torch.nn import functional as F

Precision = Literal["fp32", "bf16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""By their names in configs and commands."""

_PEAK_FLOPS = {
    # Dense bf16, from NVIDIA's and AMD's data sheets, by words in the device's name; the more specific first.
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}


def peak_flops_per_s(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns the published peak of one rank; None unless it is a known GPU in bf16.

    A measured one depends on what else runs: on a busy CPU the MFU would be too high.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return data_sheet_flops_per_s(torch.cuda.get_device_name(device))


def data_sheet_flops_per_s(name: str) -> float | None:
    """Returns the dense bf16 peak of the GPU with this name; None if it is unknown or a MIG slice."""
    words = set(re.split(r"[\s-]+", name))
    if "MIG" in words:
        return None
    return next((peak for known, peak in _PEAK_FLOPS.items() if set(known.split()) <= words), None)


def faster_precision(device: torch.device) -> Precision:
    """Returns bf16 on a GPU, and on a CPU whichever multiplies matrices faster."""
    if device.type == "cuda":
        return "bf16"
    bf16, fp32 = (_time_of_product(dtype) for dtype in (torch.bfloat16, torch.float32))
    return "bf16" if bf16 < fp32 else "fp32"


def _time_of_product(dtype: torch.dtype) -> float:
    """Returns the best time of a few products of matrices that fill a CPU."""
    a, b = torch.randn(1024, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
    best_s = float("inf")
    for _ in range(5):
        start_s = time.perf_counter()
        F.linear(a, b)
        best_s = min(best_s, time.perf_counter() - start_s)
    return best_s


def newest_flash_attention(device: torch.device) -> str | None:
    """Activates the newest FlashAttention that is installed and runs on this GPU.

    Returns a line that says so, or why one that is installed cannot be used; None if there is only torch's own.

    Call it before the first attention: what is compiled keeps the kernel that it was compiled with.
    """
    if device.type != "cuda":
        return None
    from torch.nn.attention import activate_flash_attention_impl

    major, _ = torch.cuda.get_device_capability(device)
    for name, module, majors in (("FA4", "flash_attn.cute", (9, 10)), ("FA3", "flash_attn_interface", (9,))):
        if major not in majors:
            continue
        try:
            if find_spec(module) is not None:
                activate_flash_attention_impl(name)
                return f"attention runs on {name}, which is installed here"
        except ModuleNotFoundError as error:
            if error.name != module.partition(".")[0]:  # its package is there
                return _unusable(name, error)
        except Exception as error:  # built for another torch, or without what it is built on
            return _unusable(name, error)
    return None


def _unusable(name: str, error: Exception) -> str:
    return f"{name} is installed but cannot be used: {type(error).__name__}: {error}; attention runs on torch's own"


def room_for_weights(parameters: int, free_bytes: int | None) -> tuple[str, Precision, str | None]:
    """Returns the device type and precision for a whole model, and why they are not fp32 on the GPU.

    `free_bytes` is the GPU's; None without a GPU. A fifth is reserved for activations.
    """
    if free_bytes is None:
        return "cpu", "fp32", None
    room, gib = 0.8 * free_bytes, 2**30
    if 4 * parameters <= room:
        return "cuda", "fp32", None
    free = f"its fp32 weights take {4 * parameters / gib:.1f} GiB, of which the GPU has {free_bytes / gib:.1f} free"
    if 2 * parameters <= room:
        return "cuda", "bf16", f"in bf16: {free}"
    return "cpu", "fp32", f"on the CPU: {free}"


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak memory of this rank: of the GPU, or of the host without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
