"""The GPUs known to `triplane plan`, and files that describe others."""

import tomllib
from pathlib import Path

from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from triplane.config.explain import explain
from triplane.storage.errors import ConfigError

RESERVED_GIB = 3.0
"""Memory reserved on each GPU: the CUDA context, NCCL's buffers, fragmentation."""


class Gpu(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """A kind of GPU and its machine; rates are from data sheets."""

    memory_gib: PositiveFloat
    bf16_tflops: PositiveFloat
    """Dense matrix products, 10^12 FLOP/s."""
    fp8_tflops: PositiveFloat | None = None
    """None: fp8 is not supported."""
    memory_gb_per_s: PositiveFloat
    """Bandwidth of its own memory, 10^9 bytes/s."""
    node_gb_per_s: PositiveFloat
    """Bandwidth to the other GPUs of its machine, one way."""
    network_gb_per_s: PositiveFloat
    """Bandwidth of the machine's network, one way, per GPU."""
    gpus_per_node: PositiveInt = 8
    price_per_hour: NonNegativeFloat
    """Default price. Those below are guesses."""
    currency: str = Field(default="USD", min_length=1)
    """Currency of the price."""


GPUS = {
    "a100": Gpu(
        memory_gib=79.2,
        bf16_tflops=312,
        memory_gb_per_s=2039,
        node_gb_per_s=300,
        network_gb_per_s=25,
        price_per_hour=1.5,
    ),
    "h100": Gpu(
        memory_gib=79.2,
        bf16_tflops=989,
        fp8_tflops=1979,
        memory_gb_per_s=3350,
        node_gb_per_s=450,
        network_gb_per_s=50,
        price_per_hour=2.5,
    ),
    "h200": Gpu(
        memory_gib=139.8,
        bf16_tflops=989,
        fp8_tflops=1979,
        memory_gb_per_s=4800,
        node_gb_per_s=450,
        network_gb_per_s=50,
        price_per_hour=3.0,
    ),
    "b200": Gpu(
        memory_gib=178.0,
        bf16_tflops=2250,
        fp8_tflops=4500,
        memory_gb_per_s=7700,
        node_gb_per_s=900,
        network_gb_per_s=50,
        price_per_hour=5.0,
    ),
    "l40s": Gpu(
        memory_gib=44.4,
        bf16_tflops=362,
        fp8_tflops=733,
        memory_gb_per_s=864,
        node_gb_per_s=32,
        network_gb_per_s=25,
        price_per_hour=1.0,
    ),
    "mi300x": Gpu(
        memory_gib=191.5,
        bf16_tflops=1307,
        fp8_tflops=2615,
        memory_gb_per_s=5300,
        node_gb_per_s=448,
        network_gb_per_s=50,
        price_per_hour=2.5,
    ),
}


def find_gpu(name: str) -> Gpu:
    """Finds a kind by name, or reads one from a TOML file. Raises ConfigError with the known kinds."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    path = Path(name)
    if path.suffix != ".toml":
        raise ConfigError(
            f"--gpu {name}: unknown; choose from {', '.join(sorted(GPUS))}, or give a TOML file with "
            f"{', '.join(Gpu.model_fields)}"
        )
    try:
        return Gpu.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"--gpu {path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--gpu {path}: not TOML: {error}") from None
    except ValidationError as error:
        lines = [f"--gpu {path}: {'.'.join(key)}: {problem}" for key, problem in explain(error, Gpu).items()]
        raise ConfigError("\n".join(lines)) from None
