"""Estimates a run on a number of GPUs: memory of each kind of rank, time of a step and of the whole run."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

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
    """Speed of a step of the largest batch in the first data phase."""
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
    """Returns the work of a rank in the largest batch; the layout must fit `gpus` ranks."""
    layout, training = config.parallel, config.training
    dp = gpus // layout.ranks_of_one
    layout = layout.model_copy(update={"dp": dp})
    largest = max(size for _, size in training.batch_sizes)
    return Work(
        model=config.model,
        layout=layout,
        dp=dp,
        bf16=training.precision != "fp32",
        micro_batch_size=training.micro_batch_size,
        micro_batches=largest // (dp * training.micro_batch_size),
        seq_len=config.data.seq_len,
        optimizer=config.optimizer,
    )


def estimate(config: RunConfig, gpus: int, gpu: Gpu, *, done_steps: int = 0) -> Estimate:
    """Estimates a run; memory is for its longest sequences."""
    work = work_of(config, gpus)
    left = list(phases(config, done_steps))  # none of a finished run
    longest = replace(work, seq_len=max((phase.seq_len for phase in left), default=work.seq_len))
    memory = {rank.name: peak_memory(longest, rank) for rank in rank_kinds(longest)}
    each = work.dp * work.micro_batch_size
    works = [replace(work, seq_len=phase.seq_len, micro_batches=phase.size // each) for phase in left]
    speeds = {one: speed(one, gpu) for one in {work, *works}}
    total_s = sum(phase.steps * speeds[one].step_s for phase, one in zip(left, works))
    return Estimate(work=work, memory=memory, speed=speeds[work], total_s=total_s)


class Phase(NamedTuple):
    """Steps of one batch size and sequence length."""

    steps: float
    """May end within a step."""
    size: int
    """Sequences of a step."""
    seq_len: int


def phases(config: RunConfig, done_steps: int = 0) -> Iterator[Phase]:
    """Yields the phases after `done_steps`."""
    training, end = config.training, config.training.steps
    lengths = [(training.updates(start), seq_len) for start, _, seq_len in config.data.timeline()]
    sizes = [(Fraction(before), size) for before, size in training.batch_sizes]
    cuts = sorted({Fraction(done_steps), Fraction(end), *(start for start, _ in [*lengths, *sizes])})
    for start, stop in pairwise(cuts):
        if done_steps <= start and stop <= end:
            size, seq_len = ([value for at, value in known if at <= start][-1] for known in (sizes, lengths))
            yield Phase(float(stop - start), size, seq_len)


def tokens_of(config: RunConfig, done_steps: int = 0) -> int:
    """Returns the tokens read after `done_steps`."""
    return round(sum(steps * size * seq_len for steps, size, seq_len in phases(config, done_steps)))
