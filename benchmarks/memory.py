"""The memory that `triplane plan` predicts beside what real ranks take, by part.

    python benchmarks/memory.py

A small model is trained for one step on gloo ranks under each layout, while torch's profiler records each allocation
of torch's CPU allocator. Prints Markdown for docs/plan.md. What threads of gloo free the profiler does not see, so
that layouts which communicate in forward and backward come out a few per cent too large. Takes a minute.
"""

import argparse
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from triplane.model.batch import Batch
from triplane.model.config import ModelConfig
from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.config import ParallelConfig
from triplane.parallel.engine import Engine
from triplane.parallel.mesh import Mesh
from triplane.plan.memory import kept_activations, peak_memory
from triplane.plan.shares import RankKind, Stage, Work, pipeline
from triplane.prove.forked import run_ranks
from triplane.training.optimizers.adamw import AdamW

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
    ({"dp": 2, "zero": 3}, 2, False),
    ({"dp": 2, "zero": 3, "recompute": "full"}, 1, True),
    ({"pp": 2, "dp": 2, "zero": 3}, 4, True),
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

    state: int
    """Weights and the optimizer's, before the step."""
    gradients: int
    """Before the last micro-batch."""
    activations: int
    """Activations that the blocks keep for the last micro-batch, and their output."""
    peak: int


def measured(mesh: Mesh, layout: ParallelConfig, micro_batches: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The fields of Measured, of this rank's first step."""
    options = {"activities": [ProfilerActivity.CPU], "profile_memory": True}
    with profile(**options) as record:
        engine = Engine(
            MODEL,
            layout,
            mesh,
            dtype=dtype,
            seq_len=SEQ_LEN,
            optimizer=AdamW(),
        )
        engine.initialize(seed=0)
        for stage in engine.local.stages:
            stage.hidden = _marked(stage.hidden)  # type: ignore[method-assign]
        batches = [_batch() for _ in range(micro_batches)]
        with record_function("step"):
            engine.forward_backward(batches)
            engine.step(1e-3)
    events = record.profiler.kineto_results.events()
    memory = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    totals = list(accumulate(size for _, size in memory))

    def allocated(when_ns: int) -> int:
        return totals[bisect_right(memory, when_ns, key=lambda event: event[0]) - 1]

    (step,) = (event for event in events if event.name() == "step")
    blocks = max((event for event in events if event.name() == "blocks"), key=lambda event: event.start_ns())
    state, before = allocated(step.start_ns()), allocated(blocks.start_ns())
    return state, before - state, allocated(blocks.start_ns() + blocks.duration_ns()) - before, max(totals)


def _marked(hidden: Callable[..., Any]) -> Callable[..., Any]:
    def marked(*args: Any) -> Any:
        with record_function("blocks"):
            return hidden(*args)

    return marked


def _batch() -> Batch:
    tokens_T = torch.randint(MODEL.vocab_size, (MICRO_BATCH_SIZE * SEQ_LEN,))
    return Batch.build(tokens_T, tokens_T.roll(-1), range(0, len(tokens_T) + 1, SEQ_LEN))


def compare(keys: dict[str, Any], micro_batches: int, bf16: bool) -> Iterator[tuple[str, Measured, Measured]]:
    """Each pipeline rank of a layout: its name, what it took and what was predicted."""
    layout = ParallelConfig(**({"dp": 1} | keys))
    assert isinstance(layout.dp, int)
    dtype = torch.bfloat16 if bf16 else torch.float32
    found = run_ranks(layout, layout.ranks_of_one * layout.dp, measured, layout, micro_batches, dtype)
    work = Work(
        model=MODEL,
        layout=layout,
        dp=layout.dp,
        bf16=bf16,
        micro_batch_size=MICRO_BATCH_SIZE,
        micro_batches=micro_batches,
        seq_len=SEQ_LEN,
    )
    for kind in pipeline(work):
        rank = kind.pp_rank * layout.tp * layout.cp * layout.dp
        stage = f", stage {kind.pp_rank}" if layout.pp > 1 else ""
        precision = "bf16" if bf16 else "fp32"
        name = f"{layout.describe()}, {precision}, {micro_batches} micro-batches{stage}"
        yield name, Measured(*found[rank]), _predicted(work, kind)


def _predicted(work: Work, kind: RankKind) -> Measured:
    memory = peak_memory(work, kind, "cpu")
    blocks = RankKind("", kind.pp_rank, (Stage(kind.layers, embedding=True, head=False),))
    split = work.layout.tp if work.layout.sequence_parallel else 1
    output = work.tokens // split * work.model.dim * work.element_bytes
    activations = kept_activations(work, blocks, "cpu") + output
    return Measured(memory.weights + memory.optimizer, memory.gradients, activations, memory.total)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| layout | weights and optimizer | gradients | activations of a micro-batch | peak |")
    print("| --- | --- | --- | --- | --- |")
    for keys, micro_batches, bf16 in LAYOUTS:
        for name, found, predicted in compare(keys, micro_batches, bf16):
            pairs = zip(astuple(found), astuple(predicted))
            cells = (
                _cell(a, b) if keys.get("pp", 1) == 1 or column in (0, 3) else "" for column, (a, b) in enumerate(pairs)
            )
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _cell(found: int, predicted: int) -> str:
    text = f"{found / 1e6:.1f}, {predicted / 1e6:.1f}"
    return f"{text} ({100 * (predicted / found - 1):+.1f} %)" if found > 1e6 else text


if __name__ == "__main__":
    main()
