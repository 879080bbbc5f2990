"""Tokens/s of two ranks of one thread under each layout against one process of two threads, side by side.

    python benchmarks/layouts.py [--rounds 3] [--steps 3] [--sequences 32] [--only pp]

Trains a model of 6.5 M parameters on packed batches of 256 tokens a sequence through the engine, as training does, on
the CPU; and one with experts, of which a token passes as many. The layouts take turns, so that what else the machine
does falls on all of them.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.distributed as dist

from triplane.model.batch import Batch
from triplane.model.config import ModelConfig
from triplane.model.parts.balance import SequenceLoss
from triplane.model.parts.experts import Experts
from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.config import ParallelConfig
from triplane.parallel.engine import Engine
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import run_ranks
from triplane.training.optimizers.adamw import AdamW

_DENSE = ModelConfig.model_validate(
    {
        "vocab_size": 8192,
        "dim": 256,
        "n_layers": 6,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 64,
        "hidden_dim": 704,
        "tie_embeddings": True,
    }
)
_EXPERTS = _DENSE.model_copy(
    update={"feed_forward": Experts(n_experts=8, active=2, hidden_dim=352, balance=SequenceLoss())}
)
"""A token passes as many parameters as in the dense model."""
_SEQ_LEN = 256
_OPTIMIZER = AdamW()
_WARMUP_STEPS = 1
_DOCUMENT_TOKENS = 2048
"""Mean."""


@dataclass(frozen=True)
class Row:
    """A layout, and how the step is cut for it."""

    layout: ParallelConfig
    micro_batch_size: int
    threads: int = 1
    model: ModelConfig = _DENSE

    @property
    def ranks(self) -> int:
        assert isinstance(self.layout.dp, int)
        return self.layout.ranks_of_one * self.layout.dp

    def describe(self) -> str:
        return ("experts, " if self.model is _EXPERTS else "") + self.layout.describe()


def _rows() -> list[Row]:
    """The first is what one process of two threads is compared with, and the first of its model what two ranks are:
    plain torch, no ZeRO, no collectives."""
    return [
        Row(ParallelConfig(dp=1, zero=0), 4, threads=2),
        Row(ParallelConfig(dp=1, zero=1), 4, threads=2),
        *(Row(ParallelConfig(dp=2, zero=stage), 4) for stage in (0, 1, 2, 3)),
        *(Row(ParallelConfig(dp=2, dp_shard=shard, offload_optimizer=True), 4) for shard in (None, 2)),
        *(Row(ParallelConfig(dp=1, tp=2, sequence_parallel=split), 4) for split in (False, True)),
        *(Row(ParallelConfig(dp=1, pp=2, virtual_stages=stages), 1) for stages in (1, 2)),
        *(Row(ParallelConfig(dp=1, cp=2, cp_method=method), 4) for method in ("ulysses", "ring")),
        Row(ParallelConfig(dp=1, zero=0), 4, threads=2, model=_EXPERTS),
        *(Row(ParallelConfig(dp=2, ep=ep), 4, model=_EXPERTS) for ep in (1, 2)),
    ]


def _batch(sequences: int, seed: int) -> Batch:
    """Sequences of a stream of documents."""
    draw = torch.Generator().manual_seed(seed)
    size = sequences * _SEQ_LEN
    tokens = torch.randint(_DENSE.vocab_size, (size + 1,), generator=draw)
    starts = (torch.rand(size, generator=draw) < 1 / _DOCUMENT_TOKENS).nonzero().flatten().tolist()
    return Batch.build(tokens[:-1], tokens[1:], sorted({*range(0, size + 1, _SEQ_LEN), *starts}))


def _tokens_per_s(mesh: Mesh, row: Row, sequences: int, steps: int) -> float:
    torch.set_num_threads(row.threads)
    share = sequences // mesh.dp.size
    batches = [_batch(row.micro_batch_size, mesh.dp.rank + 2 * i) for i in range(share // row.micro_batch_size)]
    engine = Engine(
        row.model,
        row.layout,
        mesh,
        dtype=torch.float32,
        seq_len=_SEQ_LEN,
        optimizer=_OPTIMIZER,
    )
    engine.initialize(0)
    for step in range(_WARMUP_STEPS + steps):
        if step == _WARMUP_STEPS:
            dist.barrier()
            start_s = perf_counter()
        engine.forward_backward(batches)
        engine.step(_OPTIMIZER.lr)
    dist.barrier()
    return steps * sequences * _SEQ_LEN / (perf_counter() - start_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=8, help="in a step")
    parser.add_argument("--only", default="", help="leave out the layouts whose description lacks this")
    options = parser.parse_args()
    rows = [row for row in _rows() if row.threads > 1 or options.only in row.describe()]
    rates: dict[Row, list[float]] = {row: [] for row in rows}
    for number in range(options.rounds):
        for row in rows:
            answers = run_ranks(
                row.layout, row.ranks, _tokens_per_s, row, options.sequences, options.steps, timeout_s=120
            )
            rates[row].append(min(answers))
            print(
                f"round {number + 1}: {row.describe()}: {rates[row][-1]:,.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
    print(f"{options.sequences} sequences of {_SEQ_LEN} tokens a step, fp32\n")
    print("| layout | ranks x threads | micro-batch | tokens/s: median (lowest, highest) | of one process |")
    print("| --- | --- | --- | --- | --- |")
    medians = {row: statistics.median(found) for row, found in rates.items()}
    for row, found in rates.items():
        median = medians[row]
        one = medians[rows[0] if row.threads > 1 else next(other for other in rows if other.model is row.model)]
        print(
            f"| {row.describe()} | {row.ranks} x {row.threads} | {row.micro_batch_size} | "
            f"{median:,.0f} ({min(found):,.0f}, {max(found):,.0f}) | {median / one:.2f} |"
        )


if __name__ == "__main__":
    main()
