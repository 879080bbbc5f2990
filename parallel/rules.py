"""Constraints between a model, its layout and its devices."""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from triplane.model.config import ModelConfig
from triplane.model.describe import expert_counts, layer_weights
from triplane.model.weights import Axis, Weight
from triplane.parallel.axes import shares_of
from triplane.parallel.config import ParallelConfig

_KEYS = {"dim": "dim", "head": "n_heads", "kv_head": "n_kv_heads", "hidden": "hidden_dim"}
_KEYS |= {"q_rank": "q_rank", "kv_rank": "kv_rank", "rope": "rope_dim"}
"""The config's names of a block's axes."""
_FP8_MULTIPLE = 16
"""The GPU's kernel requires both dims of a product to be multiples of it."""
_FP8_CAPABILITY = (8, 9)


class Devices(NamedTuple):
    """The devices that a process computes on."""

    gpus: int
    """0 for a CPU."""
    capability: tuple[int, int] | None
    """CUDA compute capability; None for a CPU."""


def layout_problems(model: ModelConfig, layout: ParallelConfig, precision: str) -> Iterator[str]:
    """Yields every problem as one line with its operands; `precision` as in the training config."""
    tp, pp, cp, zero = layout.tp, layout.pp, layout.cp, layout.zero
    layers = list(dict.fromkeys(model.pattern))
    weights = _weights(model)
    counts = dict.fromkeys((axis.name, axis.count) for weight in weights for axis in weight.axes)
    experts = expert_counts(model)
    for name, count in counts:
        if name in ("head", "hidden"):
            yield from multiple(_KEYS[name], count, f"tp ({tp})", tp)
    for attention in dict.fromkeys(layer.attention for layer in layers):
        assert attention is not None
        yield from attention.split_problems(tp)
    yield from _expert_problems(layout, experts)
    if layout.sequence_parallel and tp == 1:
        yield "sequence_parallel requires tp > 1: it splits tokens over the tp ranks"
    for name, count in counts:
        if name == "head" and cp > 1 and layout.cp_method == "ulysses" and count % (tp * cp) and count % tp == 0:
            yield (
                f'cp_method "ulysses" gives each of cp ({cp}) ranks a share of n_heads / tp ({count // tp}) heads, '
                f'which is not a whole number; use "ring"'
            )
    stages = pp * layout.virtual_stages
    if pp == 1 and stages > 1:
        yield f"virtual_stages ({stages}) requires pp > 1"
    if stages - 1 > model.n_layers:
        yield (
            f"pp ({pp}) x virtual_stages ({layout.virtual_stages}) = {stages} stages need at least {stages - 1} "
            f"layers, but n_layers is {model.n_layers}"
        )
    if layout.dp_shard and zero == 0:
        yield f"dp_shard ({layout.dp_shard}) requires zero > 0: stage 0 shares nothing"
    if layout.dp_shard and layout.dp != "auto":
        name = f"dp ({layout.dp}) x cp ({cp}) ="
        yield from multiple(name, layout.dp * cp, f"dp_shard ({layout.dp_shard})", layout.dp_shard)
    if zero == 0 and layout.offload_optimizer:
        yield "offload_optimizer requires zero > 0: replicated state stays on the GPU"
    if "selective" in layout.recompute_pattern and tp > 1 and not layout.sequence_parallel:
        yield (
            'recompute "selective" with tp requires sequence_parallel: the all-reduce of tp overwrites the products '
            "that would be kept"
        )
    if layout.compile and "selective" in layout.recompute_pattern and cp > 1 and layout.cp_method == "ring":
        yield (
            'compile and recompute "selective" cannot be combined with cp_method "ring", whose sends break the graph '
            'inside the block: nothing would be compiled; use recompute "full" or "none"'
        )
    if layout.fp8 and precision == "fp32":
        yield "fp8 requires precision bf16: fp32 weights would gain nothing"
    if layout.fp8:
        for axis in dict.fromkeys(axis for weight in weights if weight.in_fp8 for axis in weight.axes):
            shares = shares_of(axis, tp)
            split = f" x {'tp' if shares == tp else _KEYS[axis.name]} ({shares})" if shares > 1 else ""
            operands = f"{_FP8_MULTIPLE}{split}, which its kernels require"
            yield from multiple(f"fp8: {_width(axis)}", axis.size, operands, _FP8_MULTIPLE * shares)


@cache  # a search of layouts asks thousands of times
def _weights(model: ModelConfig) -> tuple[Weight, ...]:
    """Returns the weights of one layer of each kind."""
    return tuple(weight for layer in dict.fromkeys(model.pattern) for weight in layer_weights(model, layer))


def _expert_problems(layout: ParallelConfig, counts: tuple[int, ...]) -> Iterator[str]:
    """Yields why the ranks cannot share layers with so many experts."""
    ep = layout.ep
    if ep == 1:
        return
    if not counts:
        yield f"ep ({ep}) splits experts, and the model has none; set parallel.ep=1"
    for count in counts:
        yield from multiple("n_experts", count, f"ep ({ep})", ep)
    if layout.dp != "auto" and layout.dp * layout.cp % ep:
        yield f"ep ({ep}) does not divide dp ({layout.dp}) x cp ({layout.cp})"


def _width(axis: Axis) -> str:
    """Spells the size of an axis in the config's keys."""
    return f"{_KEYS[axis.name]} x head_dim" if axis.width > 1 else _KEYS[axis.name]


def device_problems(layout: ParallelConfig, precision: str, devices: Devices) -> Iterator[str]:
    """Yields every problem with these devices as one line; `precision` as in the training config."""
    if devices.gpus and precision == "fp32" and layout.cp > 1 and layout.cp_method == "ring":
        yield 'cp_method "ring" in fp32 has no kernel on a GPU; use precision bf16, or "ulysses"'
    if layout.fp8 and (devices.capability is None or devices.capability < _FP8_CAPABILITY):
        found = "a CPU" if devices.capability is None else "{}.{}".format(*devices.capability)
        least = "{}.{}".format(*_FP8_CAPABILITY)
        yield f"parallel.fp8 requires GPUs of compute capability {least} or more, not {found}; set parallel.fp8=false"


def token_multiple(layout: ParallelConfig) -> int:
    """Returns what a micro-batch's tokens must be a multiple of, so that all ranks get equal shares."""
    chunks = 2 * layout.cp if layout.cp_method == "ring" and layout.cp > 1 else layout.cp
    return chunks * (layout.tp if layout.sequence_parallel else 1)


def multiple(name: str, value: int, operands: str, factor: int) -> Iterator[str]:
    """Yields a problem if `value` is not a multiple of `factor`."""
    if value % factor:
        yield f"{name} ({value}) is not a multiple of {operands}; the next multiple is {value + -value % factor}"
