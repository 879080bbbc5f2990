"""Constraints among the keys of a run config, and between them and the number of ranks."""

from collections.abc import Iterator
from itertools import pairwise
from math import ceil

from triplane.model.describe import model_weights
from triplane.parallel.rules import layout_problems, multiple, token_multiple
from triplane.storage.errors import counted
from triplane.training.config import RunConfig
from triplane.training.schedule import decay_steps, warmup_steps


def check(config: RunConfig, ranks: int | None) -> list[str]:
    """Returns all problems, a line each with its operands; with `ranks` None only those that do not depend on it."""
    layout = list(_check_ranks(config, ranks)) if ranks is not None else []
    dp = None if layout else _dp(config, ranks)
    parallel = config.parallel if dp is None else config.parallel.model_copy(update={"dp": dp})
    return [
        *layout,
        *_check_model(config),
        *layout_problems(config.model, parallel, config.training.precision),
        *_check_batch(config, dp),
        *_check_optimizer(config),
        *_check_schedule(config),
        *_check_checkpoints(config),
        *_check_data(config),
    ]


def tokens_per_step(config: RunConfig) -> int:
    """Returns the tokens in one update, over all ranks, until a phase changes the length or the ramp the size."""
    return config.training.global_batch_size * config.data.seq_len


def _dp(config: RunConfig, ranks: int | None) -> int | None:
    if config.parallel.dp != "auto":
        return config.parallel.dp
    return None if ranks is None else ranks // config.parallel.ranks_of_one


def _check_ranks(config: RunConfig, ranks: int) -> Iterator[str]:
    layout, replica = config.parallel, config.parallel.ranks_of_one
    axes = f"tp ({layout.tp}) x pp ({layout.pp})" + (f" x cp ({layout.cp})" if layout.cp > 1 else "")
    if layout.dp == "auto":
        if ranks % replica:
            yield f"{axes} = {replica} does not divide {counted(ranks, 'rank')}"
    elif layout.dp * replica != ranks:
        yield f"dp ({layout.dp}) x {axes} = {layout.dp * replica}, but {counted(ranks, 'rank')}"
    if config.profile.start_step is not None and max(config.profile.ranks) >= ranks:
        yield f"profile.ranks has {max(config.profile.ranks)}, but the last of {counted(ranks, 'rank')} is {ranks - 1}"


def _check_model(config: RunConfig) -> Iterator[str]:
    yield from config.model.problems()
    lengths = [config.data.seq_len, *(phase.seq_len or config.data.seq_len for phase in config.data.phases)]
    yield from config.model.length_problems(max(lengths))


def _check_batch(config: RunConfig, dp: int | None) -> Iterator[str]:
    layout, micro = config.parallel, config.training.micro_batch_size
    product = f"micro_batch_size ({micro})" if dp is None else f"dp ({dp}) x micro_batch_size ({micro}) = {dp * micro}"
    yield from _check_ramp(config)
    if config.training.noise_scale_every_steps and (least := min(size for _, size in config.training.batch_sizes)) < 2:
        yield f"noise_scale_every_steps compares half a batch with a whole one, but global_batch_size is {least}"
    read = [*_batch_sizes(config), ("eval_sequences", config.training.eval_sequences)]
    for name, sequences in read:
        yield from multiple(name, sequences, product, (dp or 1) * micro)
    for seq_len in {config.data.seq_len, *(phase.seq_len or config.data.seq_len for phase in config.data.phases)}:
        tokens = f"micro_batch_size ({micro}) x seq_len ({seq_len})"
        shares = token_multiple(layout)
        ring = layout.cp > 1 and layout.cp_method == "ring"
        split = f"tp ({layout.tp}) x " if layout.sequence_parallel else ""
        split += f"{'2 x ' if ring else ''}cp ({layout.cp}) = {shares}"
        yield from multiple(tokens, micro * seq_len, split, shares)
        if layout.fp8:  # the product for weight gradients contracts over them; sequence parallelism gathers them before
            yield from multiple(tokens, micro * seq_len, f"16 x cp ({layout.cp}), for fp8", 16 * layout.cp)
    for name, sequences in read:
        micro_batches = sequences // ((dp or 1) * micro)
        if layout.virtual_stages > 1 and micro_batches < layout.pp:
            yield (
                f"virtual_stages needs at least pp ({layout.pp}) micro-batches, but {name} ({sequences}) / "
                f"({product}) is {micro_batches}"
            )


def _batch_sizes(config: RunConfig) -> list[tuple[str, int]]:
    """Returns the batch sizes, by their keys."""
    ramp = enumerate(config.training.batch_ramp)
    later = [(f"batch_ramp[{number}].global_batch_size", phase.global_batch_size) for number, phase in ramp]
    return [("global_batch_size", config.training.global_batch_size), *later]


def _check_ramp(config: RunConfig) -> Iterator[str]:
    for number, ((before, _), (after, _)) in enumerate(pairwise(config.training.batch_sizes)):
        if after <= before:
            yield f"batch_ramp[{number}]: after_steps ({after}) is not after {before}, where the previous size starts"


def _check_data(config: RunConfig) -> Iterator[str]:
    data, training = config.data, config.training
    yield from data.problems()
    for name, sequences in _batch_sizes(config):
        yield from multiple(name, sequences, f"data.lanes ({data.lanes})", data.lanes)
    for number, phase in enumerate(data.phases):
        start, step = phase.from_sequence, training.updates(phase.from_sequence)
        if start in data.length_changes and step.denominator > 1:
            yield (
                f"data.phases[{number}]: seq_len changes at from_sequence ({start}), within step {ceil(step):,}; the "
                f"next begins at {training.sequences(ceil(step))}"
            )


def _check_optimizer(config: RunConfig) -> Iterator[str]:
    yield from config.optimizer.problems(model_weights(config.model).values())
    if config.parallel.offload_optimizer and config.optimizer.kind != "adamw":
        yield f'offload_optimizer requires optimizer.kind "adamw", not "{config.optimizer.kind}"'
    if config.parallel.uses_deepspeed and config.optimizer.average_decay is not None:
        yield (
            f"average_decay ({config.optimizer.average_decay}) with offload_optimizer requires zero = 3, not "
            f"{config.parallel.zero}: DeepSpeed keeps no average"
        )


def _check_schedule(config: RunConfig) -> Iterator[str]:
    schedule, steps, stop = config.schedule, config.training.steps, config.training.stop_at_step
    if stop is not None and stop > steps:
        yield f"stop_at_step ({stop}) is after the last of {counted(steps, 'step')}"
    if (schedule.warmup_steps is None) == (schedule.warmup_tokens is None):
        given = "neither is" if schedule.warmup_steps is None else "both are"
        yield f"schedule: give one of warmup_steps and warmup_tokens, {given} given"
        return
    warmup = warmup_steps(schedule, config.training, config.data.seq_len)
    decay = decay_steps(schedule, steps)
    if warmup > steps:
        yield f"warm-up ({warmup} steps) is longer than the run ({steps} steps)"
    elif schedule.kind == "wsd" and warmup + decay > steps:
        yield f"warm-up ({warmup} steps) + wsd decay ({decay} steps) = {warmup + decay}, but {steps} steps"


def _check_checkpoints(config: RunConfig) -> Iterator[str]:
    rules, evaluated = config.checkpoint, config.training.eval_every_steps
    saved = f"checkpoint.every_steps ({rules.every_steps})"
    if rules.keep_every:
        yield from multiple("checkpoint.keep_every", rules.keep_every, saved, rules.every_steps)
    if rules.keep_best:  # each checkpoint needs a loss
        yield from multiple(
            "keep_best: checkpoint.every_steps", rules.every_steps, f"eval_every_steps ({evaluated})", evaluated
        )
