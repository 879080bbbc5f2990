"""Chooses the config of a run from its corpus: the size of the network, how long to train it, and how."""

import math
from dataclasses import dataclass
from typing import Any

from triplane.model.config import ModelConfig
from triplane.model.count import count_parameters, flops_per_token
from triplane.parallel.config import ParallelConfig
from triplane.plan.amount import MOST_EPOCHS
from triplane.plan.gpus import Gpu
from triplane.plan.search import search
from triplane.plan.sizes import SIZES, Choice, network
from triplane.storage.errors import ConfigError
from triplane.training.config import RunConfig
from triplane.training.units import format_count

_TOKENS_PER_PARAMETER = 20
_MOST_WARMUP_STEPS = 2000
_MOST_EVAL_SEQUENCES = 512
_CPU_MICRO_BATCH = 8
_CONTINUED_SEQ_LEN = 1024
_FIRST_TOKENS = 2_000_000
"""Tokens of a first run on CPUs, of no size in particular."""

Table = dict[str, Choice]
_FIRST_MODEL: Table = {
    "tie_embeddings": Choice(False, "a small model learns more with a head of its own"),
    "embedding_scale": Choice(50.0, "1 / init_std: embeddings begin at the scale of what norms return"),
}
_FIRST_RECIPE: dict[str, Table] = {
    "optimizer": {
        "kind": Choice("muon", "learns most a step from little text"),
        "lr": Choice(1e-2, "of the matrices of blocks, as in configs/quickstart.toml"),
        "adamw_lr": Choice(5e-3, "of tables and vectors"),
    },
    "schedule": {
        "kind": Choice("wsd", "warm-up, then the full rate, then a linear decay"),
        "decay_fraction": Choice(0.6, "of the steps"),
        "final_lr_fraction": Choice(0.0, "the rate ends at nothing"),
    },
}
"""What the trials of benchmarks/README.md, "Learning", found for minutes on CPUs."""


@dataclass(frozen=True)
class Text:
    """A prepared corpus."""

    corpus: str
    vocab_size: int
    train_tokens: int
    validation_tokens: int


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind."""

    gpus: int
    kind: str
    gpu: Gpu


@dataclass(frozen=True)
class Start:
    """A checkpoint that the run starts from."""

    checkpoint: str
    model: ModelConfig


def choose(
    text: Text, run_dir: str, *, size: str | None, start: Start | None, cluster: Cluster | None
) -> dict[str, Table]:
    """Returns the tables of a config, that of the top level under ""; raises ConfigError if no layout fits."""
    first = size is None and cluster is None
    name, table, seq_len = _of_checkpoint(start) if start else _of_size(text, size, first=first)
    data = {
        "sources": Choice([{"corpus": text.corpus}], f"{format_count(text.train_tokens)} tokens to train on"),
        "seq_len": seq_len,
    }
    tables = {
        "": {"run_dir": Choice(run_dir, "checkpoints, metrics and logs")},
        "model": table,
        "data": data,
        **_recipe(_model(table), text, seq_len.value, cluster=cluster, first=first),
    }
    if first and start is None:
        tables |= {name: tables[name] | measured for name, measured in _FIRST_RECIPE.items()}
    if start is not None:
        rate = tables["optimizer"]["lr"]
        tables["training"]["steps"] = Choice(tables["training"]["steps"].value, "a first try; raise it by hand")
        gentle = f"a tenth of {rate.why}, so that the weights keep what they know"
        tables["optimizer"]["lr"] = Choice(float(f"{rate.value / 10:.2g}"), gentle)
        tables["checkpoint"]["initial"] = Choice(start.checkpoint, "asked for by --initial")
    return tables | _layout(tables, name, cluster) if cluster else tables


def _of_size(text: Text, size: str | None, *, first: bool) -> tuple[str, Table, Choice]:
    """Returns the name and table of a new network, and the length of sequences."""
    if first:
        name, why = next(iter(SIZES)), "trained in minutes; --size 10m takes hours on CPUs"
    else:
        name, why = (size, "asked for by --size") if size else _fitting(text)
    table = network(name, text.vocab_size) | (_FIRST_MODEL if first else {})
    parameters = format_count(count_parameters(_model(table)))
    table["dim"] = Choice(table["dim"].value, f"of size {name}, {parameters} parameters: {why}")
    return name, table, Choice(SIZES[name].seq_len, f"context of size {name}")


def _of_checkpoint(start: Start) -> tuple[str, Table, Choice]:
    """Returns the name and table of its network, and the length of sequences."""
    own = start.model.as_tables()
    table = {key: Choice(value, f"of {start.checkpoint}") for key, value in own.items()}
    windows = [layer.attention.window or 0 for layer in start.model.pattern if layer.attention]
    wanted = max(_CONTINUED_SEQ_LEN, *windows)
    longest = min(wanted, start.model.longest or wanted)
    return start.checkpoint, table, Choice(longest, "raise it to what the checkpoint was trained on, if memory allows")


def values(tables: dict[str, Table]) -> dict[str, Any]:
    """Returns the config without the reasons."""
    nested = {name: {key: choice.value for key, choice in table.items()} for name, table in tables.items()}
    return nested.pop("") | nested


def _fitting(text: Text) -> tuple[str, str]:
    """Returns the largest size that the corpus suffices for."""
    need = {name: _TOKENS_PER_PARAMETER * count_parameters(_model(network(name, text.vocab_size))) for name in SIZES}
    enough = [name for name, tokens in need.items() if tokens <= MOST_EPOCHS * text.train_tokens]
    if enough:
        return enough[-1], f"the largest with {_TOKENS_PER_PARAMETER} tokens a parameter in {MOST_EPOCHS} epochs"
    return next(iter(need)), "the smallest, as there is little text"


def _model(table: Table) -> ModelConfig:
    return ModelConfig.model_validate({key: choice.value for key, choice in table.items()})


def _recipe(model: ModelConfig, text: Text, seq_len: int, *, cluster: Cluster | None, first: bool) -> dict[str, Table]:
    parameters, most = count_parameters(model), MOST_EPOCHS * text.train_tokens
    tokens = min(_TOKENS_PER_PARAMETER * parameters, most, _FIRST_TOKENS if first else most)
    flops = flops_per_token(model, seq_len) * tokens
    ranks = cluster.gpus if cluster else 1
    batch_tokens = 0.2920 * flops**0.3271
    batch = ranks * 2 ** max(0, round(math.log2(batch_tokens / seq_len / ranks)))
    steps = max(1, tokens // (batch * seq_len))
    held = -(-text.validation_tokens // seq_len)
    micro = min(batch, _CPU_MICRO_BATCH)
    unit = batch if cluster else micro
    # A fiftieth of all sequences, twenty times, at a third of the time of a sequence in training: an eighth.
    evaluated = min(held, _MOST_EVAL_SEQUENCES, steps * batch // 50)
    amount = f"{_TOKENS_PER_PARAMETER} for each parameter (Hoffmann et al. 2022)"
    if tokens == _FIRST_TOKENS and first:
        amount = "what CPUs train in minutes; --size 1m for 20 for each parameter"
    if tokens == most:
        amount = f"{MOST_EPOCHS} epochs, after which text adds little (Muennighoff et al. 2023)"
    often = Choice(-(-steps // 20), "20 times in the run")
    return {
        "optimizer": {
            "kind": Choice("adamw", "what the rule for the rate was fitted to"),
            "lr": Choice(
                float(f"{0.3118 * flops**-0.1250:.2g}"),
                f"0.3118 C^-0.125 for C = {flops:.2g} FLOPs (DeepSeek LLM 2024)",
            ),
        },
        "schedule": {
            "kind": Choice("cosine", "down to a tenth over the whole run (Hoffmann et al. 2022)"),
            "warmup_steps": Choice(
                min(_MOST_WARMUP_STEPS, -(-steps // 20), steps - 1),
                "a twentieth of the steps, at most the 2000 of DeepSeek LLM",
            ),
        },
        "training": {
            "steps": Choice(steps, f"{format_count(tokens)} tokens: {amount}"),
            "global_batch_size": Choice(
                batch, f"a power of two for each rank, near {format_count(batch_tokens)} tokens: 0.292 C^0.3271"
            ),
            "micro_batch_size": Choice(micro, "enough to keep a CPU busy"),
            "eval_every_steps": often,
            "eval_sequences": Choice(max(1, evaluated // unit) * unit, f"of {held:,}; at most an eighth of the time"),
            "sample_every_steps": Choice(-(-steps // 5), "5 times in the run"),
            "log_every_steps": Choice(max(1, min(10, steps // 100)), "a hundred points or more"),
        },
        "checkpoint": {"every_steps": often},
    }


def _layout(tables: dict[str, Table], name: str, cluster: Cluster) -> dict[str, Table]:
    """Returns the tables that the fastest layout changes."""
    training = tables["training"] | {"precision": Choice("bf16", "GPUs multiply it fastest; master weights stay fp32")}
    config = RunConfig.model_validate(values(tables | {"training": training}))
    found = search(config, cluster.gpus, cluster.gpu).found
    where = f"{cluster.gpus} x {cluster.kind}"
    if not found:
        raise ConfigError(f"no layout of {name} fits {where}: give more --gpus or a smaller model")
    best = found[0]
    speed = best.estimate.speed
    why = f"fastest of {len(found):,} layouts on {where}: MFU {speed.mfu:.0%}, {best.estimate.peak_gib:.0f} GiB"
    plain = ParallelConfig().model_dump()
    changed = {key: value for key, value in best.config.parallel.model_dump().items() if value != plain[key]}
    micro = Choice(best.config.training.micro_batch_size, f"of the {why}")
    fields = ParallelConfig.model_fields
    return {
        "training": training | {"micro_batch_size": micro},
        "parallel": {
            key: Choice(value, why if key == "dp" else (fields[key].description or "").partition(".")[0])
            for key, value in changed.items()
        },
        "data": tables["data"] | {"num_workers": Choice(2, "loaders beside each GPU")},
    }
