"""What the keys of a run config must be to each other and to the number of ranks."""

from collections.abc import Iterator

from triplane.launcher.config import RunConfig
from triplane.training.schedule import decay_steps, warmup_steps


def check(config: RunConfig, ranks: int | None) -> list[str]:
    """All that cannot work, a line each with its operands; `ranks` None leaves out what depends on it."""
    layout = list(_check_ranks(config, ranks)) if ranks is not None else []
    dp = None if layout else _dp(config, ranks)
    return [
        *layout,
        *_check_model(config),
        *_check_split(config),
        *_check_batch(config, dp),
        *_check_schedule(config),
        *config.data.problems(config.training.global_batch_size),
    ]


def resolve_dp(config: RunConfig, ranks: int) -> int:
    """Data-parallel ranks, `auto` resolved; for a config that passes `check` with these ranks."""
    dp = _dp(config, ranks)
    assert dp is not None and dp * config.parallel.tp * config.parallel.pp == ranks, (config.parallel, ranks)
    return dp


def grad_accum_steps(config: RunConfig, dp: int) -> int:
    """Micro-batches of each dp rank in one update."""
    sequences = dp * config.training.micro_batch_size
    assert config.training.global_batch_size % sequences == 0, (config.training, dp)
    return config.training.global_batch_size // sequences


def tokens_per_step(config: RunConfig) -> int:
    """Tokens in one update, over all ranks, until a phase of the data changes the length."""
    return config.training.global_batch_size * config.data.seq_len


def _dp(config: RunConfig, ranks: int | None) -> int | None:
    if config.parallel.dp != "auto":
        return config.parallel.dp
    return None if ranks is None else ranks // (config.parallel.tp * config.parallel.pp)


def _check_ranks(config: RunConfig, ranks: int) -> Iterator[str]:
    tp, pp, dp = config.parallel.tp, config.parallel.pp, config.parallel.dp
    if dp == "auto":
        if ranks % (tp * pp):
            yield f"tp ({tp}) x pp ({pp}) = {tp * pp} does not divide {ranks} ranks"
    elif dp * tp * pp != ranks:
        yield f"dp ({dp}) x tp ({tp}) x pp ({pp}) = {dp * tp * pp}, but {ranks} ranks"


def _check_model(config: RunConfig) -> Iterator[str]:
    model = config.model
    yield from _check_multiple("n_heads", model.n_heads, f"n_kv_heads ({model.n_kv_heads})", model.n_kv_heads)
    if model.head_dim % 2:
        yield f"head_dim ({model.head_dim}) is odd, but RoPE turns pairs; take {model.head_dim + 1}"


def _check_split(config: RunConfig) -> Iterator[str]:
    model, tp, pp = config.model, config.parallel.tp, config.parallel.pp
    for name in ("n_heads", "n_kv_heads", "hidden_dim", "vocab_size"):
        yield from _check_multiple(name, getattr(model, name), f"tp ({tp})", tp)
    if model.n_layers < pp:
        yield f"n_layers ({model.n_layers}) is less than pp ({pp}): a stage would have no layer"
    if config.training.precision == "bf16" and config.parallel.zero == 0:
        yield "precision bf16 needs zero = 1: ZeRO keeps the fp32 master weights"


def _check_batch(config: RunConfig, dp: int | None) -> Iterator[str]:
    micro = config.training.micro_batch_size
    product = f"micro_batch_size ({micro})" if dp is None else f"dp ({dp}) x micro_batch_size ({micro}) = {dp * micro}"
    for name in ("global_batch_size", "eval_sequences"):
        yield from _check_multiple(name, getattr(config.training, name), product, (dp or 1) * micro)


def _check_schedule(config: RunConfig) -> Iterator[str]:
    schedule, steps, stop = config.schedule, config.training.steps, config.training.stop_at_step
    if stop is not None and stop > steps:
        yield f"stop_at_step ({stop}) is after the last of {steps} steps"
    if (schedule.warmup_steps is None) == (schedule.warmup_tokens is None):
        given = "neither is" if schedule.warmup_steps is None else "both are"
        yield f"schedule: give one of warmup_steps and warmup_tokens, {given} given"
        return
    warmup, decay = warmup_steps(schedule, tokens_per_step(config)), decay_steps(schedule, steps)
    if warmup > steps:
        yield f"warm-up ({warmup} steps) is longer than the run ({steps} steps)"
    elif schedule.kind == "wsd" and warmup + decay > steps:
        yield f"warm-up ({warmup} steps) + wsd decay ({decay} steps) = {warmup + decay}, but {steps} steps"


def _check_multiple(name: str, value: int, operands: str, factor: int) -> Iterator[str]:
    if value % factor:
        after = value + -value % factor
        yield f"{name} ({value}) is not a multiple of {operands}; the next multiple is {after}"
