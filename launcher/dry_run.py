"""`triplane train --dry-run`: runs one rank of each kind, out of any number, without memory or peers.

Tensors have shapes but no data ("meta"), and collectives return at once ("fake"), so that a laptop can run any rank of
a cluster. Excludes ZeRO, offload and compile, which need real memory.
"""

import multiprocessing
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from triplane.config.checks import check
from triplane.config.load import load_config
from triplane.model.batch import Batch
from triplane.model.weights import Weight
from triplane.parallel.engine import Engine
from triplane.parallel.groups import connected
from triplane.parallel.mesh import Mesh
from triplane.parallel.update import Each, Piece
from triplane.plan.estimate import work_of
from triplane.plan.shares import RankKind, Work, rank_kinds
from triplane.storage.errors import ConfigError
from triplane.training.config import RunConfig

_META = torch.device("meta")


def dry_run(path: Path, overrides: list[str], ranks: int | None) -> None:
    """Runs a step of a random rank of each kind, and prints a line for each; a wrong shape raises torch's error.

    With `ranks` None there are as many as the layout needs.
    """
    config = load_config(path, overrides)
    ranks = ranks or config.parallel.ranks_of_one * (1 if config.parallel.dp == "auto" else config.parallel.dp)
    if problems := check(config, ranks):
        raise ConfigError("\n".join(problems))
    work = work_of(config, ranks)
    if work.layout.ranks_of_one > 1:
        from triplane.parallel import megatron  # noqa: F401  3 s to import, once for the processes below
    print(f"{path}: {work.layout.describe()}; without ZeRO, offload and compile", flush=True)
    for kind in rank_kinds(work):
        on_a_stage = ranks // work.layout.pp
        rank = kind.pp_rank * on_a_stage + random.randrange(on_a_stage)
        # In a separate process: megatron-core supports one layout per process.
        with multiprocessing.get_context("fork").Pool(1) as pool:
            print(pool.apply(_step, (config, work, kind, rank, ranks)), flush=True)


class _Unused:
    """An optimizer for meta tensors, on which the fused ones refuse to work; no step is taken."""

    grad_clip = 1.0
    average_decay = None

    def moments(self, weight: Weight) -> dict[str, Each]:
        return {}

    def whole(self, weight: Weight) -> bool:
        return False

    def build(self, pieces: Sequence[Piece], mesh: Mesh) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD([piece.weight for piece in pieces])]


def _step(config: RunConfig, work: Work, kind: RankKind, rank: int, ranks: int) -> str:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    start_s = time.perf_counter()
    layout = work.layout.model_copy(update={"zero": 0, "offload_optimizer": False, "compile": False})
    dtype = torch.bfloat16 if work.bf16 else torch.float32
    # The pipeline schedule repeats itself after two rounds.
    micro_batches = min(work.micro_batches, 2 * layout.pp)
    # Never exited: the process ends, and fake groups warn when they are destroyed.
    mesh = connected(layout, _META, rank=rank, world_size=ranks, store=FakeStore()).__enter__()
    engine = Engine(
        config.model,
        layout,
        mesh,
        dtype=dtype,
        seq_len=config.data.seq_len,
        optimizer=_Unused(),
    )
    engine.forward_backward([_batch(work)] * micro_batches)
    parameters = sum(parameter.numel() for parameter in engine.local.module.parameters())
    seconds = time.perf_counter() - start_s
    return (
        f"rank {rank} of {ranks} ({kind.name}): {parameters:,} parameters, micro-batches forward and backward: "
        f"{micro_batches}, {seconds:.1f} s"
    )


def _batch(work: Work) -> Batch:
    tokens = work.micro_batch_size * work.seq_len
    nothing_T = torch.zeros(tokens, dtype=torch.int64)
    bounds = range(0, tokens + 1, work.seq_len)
    batch = Batch.build(nothing_T, nothing_T, bounds, sequences=work.micro_batch_size)
    # Attention reads the values of the bounds.
    return replace(batch.to(_META), bounds_int32=batch.bounds_int32)
