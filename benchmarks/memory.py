"""The memory that `triplane plan` predicts beside what real ranks take, by part.

    python benchmarks/memory.py

A small model is trained for one step on gloo ranks under each layout, while torch's profiler records each allocation
of torch's CPU allocator. Prints Markdown for docs/plan.md. What threads of gloo free the profiler does not see, so
that layouts which communicate in forward and backward come out a few per cent too large. Takes a minute.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from triplane.launcher.forked import run_ranks
from triplane.launcher.plan.memory import Memory, peak_memory
from triplane.launcher.plan.shares import Work, pipeline
from triplane.model.batch import Batch
from triplane.model.config import ModelConfig
from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.config import ParallelConfig
from triplane.parallel.engine import Engine
from triplane.parallel.mesh import Mesh
from triplane.training.config import OptimizerConfig
from triplane.training.optimizer import adamw

MODEL = ModelConfig(vocab_size=4096, dim=128, n_layers=6, n_heads=8, n_kv_heads=4, head_dim=16, hidden_dim=384)
SEQ_LEN, MICRO_BATCH_SIZE = 256, 4
LAYOUTS: list[tuple[dict[str, Any], int, bool]] = [
    ({"zero": 0}, 2, False),
    ({}, 2, True),
    ({}, 1, True),
    ({"recompute": "selective"}, 2, True),
    ({"recompute": "full"}, 2, True),
    ({"dp": 2}, 2, True),
    ({"dp": 2, "zero": 2}, 2, True),
    ({"dp": 2, "zero": 3}, 2, True),
    ({"tp": 2}, 2, True),
    ({"tp": 2, "sequence_parallel": True}, 2, True),
    ({"tp": 2, "sequence_parallel": True, "recompute": "selective"}, 2, True),
    ({"pp": 2, "dp": 2}, 4, True),
    ({"pp": 2, "dp": 2, "zero": 2}, 4, True),
    ({"pp": 4}, 8, True),
    ({"pp": 2, "virtual_stages": 2}, 4, True),
    ({"cp": 2}, 2, True),
    ({"cp": 2, "cp_method": "ring"}, 2, True),
]
"""(keys of the layout, micro-batches in a step, whether in bf16 or in fp32)"""


@dataclass(frozen=True)
class Measured:
    """Bytes on one rank."""

    weights: int
    state: int
    """Weights and the optimizer's, before the step; with ZeRO 3 also the buffers that it makes at the start."""
    peak: int


def measured(mesh: Mesh, layout: ParallelConfig, micro_batches: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """The fields of Measured, of this rank's first step."""
    options = {"activities": [ProfilerActivity.CPU], "profile_memory": True}
    with profile(**options) as record:
        engine = Engine(MODEL, layout, mesh, dtype, SEQ_LEN, 1.0, lambda each: adamw(OptimizerConfig(), each))
        engine.initialize(seed=0)
        batches = [_batch() for _ in range(micro_batches)]
        with record_function("step"):
            engine.forward_backward(batches)
            engine.step(1e-3)
    events = record.profiler.kineto_results.events()
    (step,) = (event for event in events if event.name() == "step")
    allocated = state = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        if event.start_ns() < step.start_ns():
            state = allocated
        peak = max(peak, allocated)
    weights = sum(p.numel() * p.element_size() for p in engine.local.module.parameters())
    return weights, state, peak


def _batch() -> Batch:
    tokens_T = torch.randint(MODEL.vocab_size, (MICRO_BATCH_SIZE * SEQ_LEN,))
    return Batch.build(tokens_T, tokens_T.roll(-1), range(0, len(tokens_T) + 1, SEQ_LEN))


def compare(keys: dict[str, Any], micro_batches: int, bf16: bool) -> Iterator[tuple[str, Measured, Memory]]:
    """Each pipeline rank of a layout: its name, what it took and what was predicted."""
    layout = ParallelConfig(**({"dp": 1} | keys))
    assert isinstance(layout.dp, int)
    dtype = torch.bfloat16 if bf16 else torch.float32
    found = run_ranks(layout, layout.ranks_of_one * layout.dp, measured, layout, micro_batches, dtype)
    work = Work(MODEL, layout, layout.dp, bf16, MICRO_BATCH_SIZE, micro_batches, SEQ_LEN)
    for kind in pipeline(work):
        rank = kind.pp_rank * layout.tp * layout.cp * layout.dp
        stage = f", stage {kind.pp_rank}" if layout.pp > 1 else ""
        precision = "bf16" if bf16 else "fp32"
        name = f"{layout.describe()}, {precision}, {micro_batches} micro-batches{stage}"
        yield name, Measured(*found[rank]), peak_memory(work, kind, "cpu")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| layout | weights and optimizer | gradients, activations, temporary | peak |\n| --- | --- | --- | --- |")
    for keys, micro_batches, bf16 in LAYOUTS:
        for name, found, predicted in compare(keys, micro_batches, bf16):
            state = predicted.weights + predicted.optimizer
            pairs = ((found.state, state), (found.peak - found.state, predicted.total - state))
            pairs += ((found.peak, predicted.total),)
            cells = (f"{a / 1e6:.1f}, {b / 1e6:.1f} ({100 * (b / a - 1):+.1f} %)" for a, b in pairs)
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
