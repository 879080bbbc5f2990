"""`triplane train --dry-run`: the model of one rank of each kind, of any number, without memory and without peers.

Tensors have shapes and no content ("meta"), and collectives return at once ("fake"), so that a laptop takes the place
of any rank of a cluster. What stands on real memory is left out: ZeRO, offload and compile.
"""

import multiprocessing
import random
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from triplane.config.checks import check
from triplane.config.load import load_config
from triplane.model.batch import Batch
from triplane.parallel.engine import Engine
from triplane.parallel.groups import connected
from triplane.plan.estimate import work_of
from triplane.plan.shares import RankKind, Work, rank_kinds
from triplane.storage.errors import ConfigError
from triplane.training.config import RunConfig

_META = torch.device("meta")


def dry_run(path: Path, overrides: list[str], ranks: int | None) -> None:
    """Runs a step of a random rank of each kind, and prints a line for each; raises what a shape that is wrong raises.

    `ranks` None: as many as the layout needs.
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
        # In a process of its own: megatron-core has one layout in a process.
        with multiprocessing.get_context("fork").Pool(1) as pool:
            print(pool.apply(_step, (config, work, kind, rank, ranks)), flush=True)


def _step(config: RunConfig, work: Work, kind: RankKind, rank: int, ranks: int) -> str:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    start_s = time.perf_counter()
    layout = work.layout.model_copy(update={"zero": 0, "offload_optimizer": False, "compile": False})
    dtype = torch.bfloat16 if work.bf16 else torch.float32
    # After two rounds of a pipeline the schedule repeats itself.
    micro_batches = min(work.micro_batches, 2 * layout.pp)
    # Never left: the process ends, and fake groups warn when they are destroyed.
    mesh = connected(layout, _META, rank=rank, world_size=ranks, store=FakeStore()).__enter__()
    engine = Engine(
        config.model,
        layout,
        mesh,
        dtype=dtype,
        seq_len=config.data.seq_len,
        grad_clip=config.optimizer.grad_clip,
        make_optimizer=lambda placed: torch.optim.SGD([parameter for parameter, _ in placed]),
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
    batch = Batch.build(nothing_T, nothing_T, range(0, tokens + 1, work.seq_len))
    # Attention reads the bounds, as content.
    return replace(batch.to(_META), bounds_int32=batch.bounds_int32)
