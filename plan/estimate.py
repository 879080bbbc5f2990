"""Estimates a run on a number of GPUs: memory of each kind of rank, time of a step and of the whole run."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

from triplane.config.checks import check
from triplane.parallel.config import ParallelConfig
from triplane.plan.gpus import RESERVED_GIB, Gpu
from triplane.plan.memory import Memory, peak_memory
from triplane.plan.shares import Work, rank_kinds
from triplane.plan.speed import Speed, speed
from triplane.training.config import RunConfig


@dataclass(frozen=True)
class Estimate:
    """Memory and time of one layout."""

    work: Work
    memory: dict[str, Memory]
    """Peak memory by kind of rank."""
    speed: Speed
    """Speed of a step in the first data phase."""
    total_s: float
    """Time of all remaining steps."""

    @property
    def peak_gib(self) -> float:
        """Peak memory of the fullest rank."""
        return max(memory.total for memory in self.memory.values()) / 2**30

    def fits(self, gpu: Gpu) -> bool:
        return self.peak_gib + RESERVED_GIB <= gpu.memory_gib


def beyond_layout(config: RunConfig) -> set[str]:
    """Returns the problems of a config that no layout can solve, and that no estimate depends on."""
    alone = {
        "parallel": ParallelConfig(),
        "training": config.training.model_copy(update={"micro_batch_size": 1, "precision": "auto"}),
    }
    return set(check(config.model_copy(update=alone), 1))


def work_of(config: RunConfig, gpus: int) -> Work:
    """Returns the work of a rank; the layout must fit `gpus` ranks."""
    layout, training = config.parallel, config.training
    dp = gpus // layout.ranks_of_one
    layout = layout.model_copy(update={"dp": dp})
    micro_batches = training.global_batch_size // (dp * training.micro_batch_size)
    return Work(
        model=config.model,
        layout=layout,
        dp=dp,
        bf16=training.precision != "fp32",
        micro_batch_size=training.micro_batch_size,
        micro_batches=micro_batches,
        seq_len=config.data.seq_len,
        optimizer=config.optimizer,
    )


def estimate(config: RunConfig, gpus: int, gpu: Gpu, *, done_steps: int = 0) -> Estimate:
    """Estimates a run; memory is for its longest sequences."""
    work = work_of(config, gpus)
    left = list(phases(config, done_steps))  # none of a finished run
    longest = replace(work, seq_len=max((seq_len for _, seq_len in left), default=work.seq_len))
    memory = {rank.name: peak_memory(longest, rank) for rank in rank_kinds(longest)}
    lengths = {work.seq_len, *(seq_len for _, seq_len in left)}
    speeds = {seq_len: speed(replace(work, seq_len=seq_len), gpu) for seq_len in lengths}
    total_s = sum(steps * speeds[seq_len].step_s for steps, seq_len in left)
    return Estimate(work=work, memory=memory, speed=speeds[work.seq_len], total_s=total_s)


def phases(config: RunConfig, done_steps: int = 0) -> Iterator[tuple[float, int]]:
    """Yields, for each data phase, its steps after `done_steps` and its sequence length."""
    size, end = config.training.global_batch_size, config.training.steps
    starts = [(start / size, seq_len) for start, _, seq_len in config.data.timeline()]
    for (start, seq_len), (stop, _) in pairwise([*starts, (cast(float, end), 0)]):
        steps = min(stop, end) - max(start, done_steps)
        if steps > 0:
            yield steps, seq_len


def tokens_of(config: RunConfig, done_steps: int = 0) -> int:
    """Returns the tokens read after `done_steps`."""
    size = config.training.global_batch_size
    return round(sum(steps * size * seq_len for steps, seq_len in phases(config, done_steps)))
