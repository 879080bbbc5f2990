"""Compares the predictions of `triplane plan` with published measurements of H100 clusters.

    python benchmarks/plan.py           the tables of docs/plan.md
    python benchmarks/plan.py --fit     the constants, fitted anew to the rows marked "fitted"

Each program differs from ours in what it hides behind what; that is written down here, by program. Sources, read on
24 November 2026: Megatron-LM's images/model_table.png; mosaicml/llm-foundry's scripts/train/benchmarking/README.md;
huggingface/nanotron's docs/benchmark_summary.svg; pytorch/torchtitan's benchmarks/llama3_h100_202412_torchtitan.md.
Of models with experts, read on 28 November: Megatron-LM's megatron/core/transformer/moe/README.md (layout and result);
NVIDIA-NeMo/Automodel's docs/performance-summary.md and examples/benchmark/configs (recomputation, stages, and the gate
in nemo_automodel/components/moe); DeepSeek-V3's technical report, sections 2.1, 3.2 and table 1.
"""

import argparse
import math
import statistics
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from triplane.model.config import ModelConfig
from triplane.model.count import flops_per_token
from triplane.parallel.config import ParallelConfig
from triplane.plan.gpus import GPUS, Gpu
from triplane.plan.memory import kept_activations
from triplane.plan.rates import Program
from triplane.plan.shares import (
    RankKind,
    Stage,
    Work,
    layer_parameters,
    parameters,
    pipeline,
    table_parameters,
)
from triplane.plan.speed import speed

H100 = GPUS["h100"]
GRAND_TETON = H100.model_copy(update={"memory_gib": 94.0, "memory_gb_per_s": 2400})
"""torchtitan's: HBM2e, and a power limit of 500 W instead of 700 W."""
H800 = H100.model_copy(update={"node_gb_per_s": 200})

PROGRAMS = {
    # It overlaps all three kinds of traffic, in part.
    "Megatron-LM": Program(tp_hidden=0.42, pipeline_hides=True, gather_hidden=True, all_reduces=False),
    # FSDP.
    "llm-foundry": Program(gather_hidden=True, all_reduces=False, gradient_bytes=2),
    "nanotron": Program(all_reduces=False),
    # FSDP2. Its selective recomputation does every other product again.
    "torchtitan": Program(products=0.54, gather_hidden=True, pipeline_hides=True, all_reduces=False, again=0.5),
    "torchtitan, async": Program(
        products=0.54, gather_hidden=True, pipeline_hides=True, all_reduces=False, again=0.5, tp_hidden=0.42
    ),
    # FSDP2 that gathers and reduces once a step, as ZeRO 1 does. Its benchmarks' gate chooses experts in turn, so that
    # those of a token are on one rank or on neighbours, and DeepEP sends a row once to each machine.
    "NeMo Automodel": Program(gather_hidden=True, pipeline_hides=True, all_reduces=False, rows_sent=1),
    # DualPipe: rows travel, once to each of at most 4 machines, while another micro-batch computes.
    "DeepSeek": Program(gather_hidden=True, pipeline_hides=True, all_reduces=False, rows_sent=4, experts_hidden=True),
}


@dataclass(frozen=True)
class Row:
    """A published measurement."""

    program: str
    name: str
    work: Work
    mfu: float
    """FLOPs as ours, as a share of 989 TFLOP/s."""
    fitted: bool = False
    gpu: Gpu = H100
    memory_gib: float | None = None

    def predicted_mfu(self, program: Program) -> float:
        return speed(self.work, self.gpu, program).mfu


def llama(dim: int, n_layers: int, n_heads: int, hidden_dim: int, vocab_size: int, **keys: Any) -> ModelConfig:
    shape = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "head_dim": dim // n_heads}
    shape |= {"hidden_dim": hidden_dim, "vocab_size": vocab_size, "n_kv_heads": n_heads}
    return ModelConfig.model_validate(shape | keys)


def gpt(dim: int, n_layers: int, n_heads: int, vocab_size: int, tied: bool = False) -> ModelConfig:
    """Two matrices of 4 dim instead of a gated block's three: as many FLOPs as three of 8/3 dim."""
    return llama(dim, n_layers, n_heads, dim * 8 // 3 // 8 * 8, vocab_size, tie_embeddings=tied)


def megatron() -> Iterator[Row]:
    """Micro-batches and virtual stages are not published: two sequences without a pipeline, and one or two layers to
    a stage."""
    for size, dim, n_layers, n_heads, tp, pp, virtual, gpus, batch, tflops in (
        ("1.7B", 2048, 24, 16, 1, 1, 1, 48, 192, 408.8),
        ("7.1B", 4096, 30, 32, 2, 1, 1, 96, 192, 465.9),
        ("16B", 6144, 32, 48, 4, 1, 1, 192, 192, 489.1),
        ("32B", 7168, 48, 56, 8, 1, 1, 384, 192, 459.6),
        ("70B", 8192, 84, 64, 8, 2, 21, 768, 384, 419.7),
        ("119B", 10240, 92, 80, 8, 4, 23, 1536, 768, 420.5),
        ("177B", 12288, 96, 96, 8, 6, 8, 2304, 1152, 432.8),
        ("314B", 16384, 96, 128, 8, 8, 6, 3072, 1536, 474.4),
        ("462B", 18432, 112, 144, 8, 16, 7, 6144, 3072, 459.9),
    ):
        layout = ParallelConfig(tp=tp, sequence_parallel=tp > 1, pp=pp, virtual_stages=virtual, dp=48, compile=True)
        micro = 2 if pp == 1 else 1
        work = Work(
            model=gpt(dim, n_layers, n_heads, 131_072),
            layout=layout,
            dp=48,
            bf16=True,
            micro_batch_size=micro,
            micro_batches=batch // 48 // micro,
            seq_len=4096,
        )
        name = f"{size}, {gpus} GPUs, {layout.describe()}"
        yield Row("Megatron-LM", name, work, tflops / 989, fitted=size in ("1.7B", "16B", "177B"))


def foundry() -> Iterator[Row]:
    models = {
        "1B": gpt(2048, 24, 16, 50_368, tied=True),
        "3B": gpt(2560, 32, 20, 50_368, tied=True),
        "7B": gpt(4096, 32, 32, 50_368, tied=True),
        "13B": gpt(5120, 40, 40, 50_368, tied=True),
        "30B": gpt(7168, 48, 56, 50_368, tied=True),
        "70B": gpt(8192, 80, 64, 50_368, tied=True),
    }
    fitted = {("7B", 2048, 8), ("7B", 2048, 512), ("3B", 8192, 8), ("7B", 32_768, 8)}
    for size, seq_len, gpus, micro, micro_batches, zero, recompute, percent in (
        ("1B", 2048, 8, 14, 1, 3, "none", 41.82),
        ("1B", 2048, 128, 12, 1, 2, "none", 40.60),
        ("1B", 2048, 512, 12, 1, 2, "none", 36.65),
        ("1B", 8192, 8, 3, 4, 3, "none", 37.73),
        ("3B", 2048, 128, 8, 1, 2, "none", 42.43),
        ("3B", 2048, 512, 8, 1, 2, "none", 39.24),
        ("3B", 8192, 8, 3, 6, 3, "none", 40.31),
        ("7B", 2048, 8, 6, 1, 3, "none", 46.44),
        ("7B", 2048, 128, 6, 1, 3, "none", 45.71),
        ("7B", 2048, 256, 6, 1, 3, "none", 44.15),
        ("7B", 2048, 512, 6, 1, 3, "none", 42.20),
        ("7B", 8192, 8, 8, 2, 3, "full", 37.14),
        ("7B", 32_768, 8, 2, 2, 3, "full", 30.94),
        ("13B", 2048, 8, 2, 1, 3, "none", 39.79),
        ("13B", 2048, 128, 16, 1, 3, "full", 42.18),
        ("13B", 2048, 512, 16, 1, 3, "full", 41.12),
        ("30B", 2048, 128, 8, 1, 3, "full", 41.85),
        ("30B", 2048, 512, 8, 1, 3, "full", 40.27),
        ("70B", 2048, 128, 8, 1, 3, "full", 43.36),
        ("70B", 2048, 512, 8, 1, 3, "full", 41.25),
    ):
        layout = ParallelConfig.model_validate({"zero": zero, "recompute": recompute, "dp": gpus})
        work = Work(
            model=models[size],
            layout=layout,
            dp=gpus,
            bf16=True,
            micro_batch_size=micro,
            micro_batches=micro_batches,
            seq_len=seq_len,
        )
        again = ", recompute" if recompute == "full" else ""
        name = f"{size}, {gpus} GPUs, {seq_len:,} tokens x {micro}{again}"
        yield Row("llm-foundry", name, work, percent / 100, fitted=(size, seq_len, gpus) in fitted)


def nanotron() -> Iterator[Row]:
    """The best layout of each size and number of machines: a global batch of 256 sequences of 4,096 tokens."""
    models = {
        "3.6B": llama(3072, 28, 32, 8192, 131_072, tie_embeddings=True),
        "8.9B": llama(4096, 32, 32, 14_336, 131_072),
        "80B": llama(8192, 80, 64, 28_672, 131_072),
    }
    for size, nodes, dp, tp, pp, micro_batches, micro, zero, percent in (
        ("3.6B", 1, 4, 1, 2, 32, 2, 1, 46.68),
        ("3.6B", 2, 8, 1, 2, 16, 2, 1, 43.77),
        ("3.6B", 4, 16, 1, 2, 8, 2, 1, 40.39),
        ("3.6B", 8, 32, 1, 2, 8, 1, 1, 35.53),
        ("3.6B", 16, 32, 4, 1, 1, 8, 0, 34.59),
        ("3.6B", 32, 64, 4, 1, 1, 4, 0, 26.77),
        ("3.6B", 64, 128, 4, 1, 1, 2, 1, 10.49),
        ("8.9B", 1, 2, 1, 4, 128, 1, 1, 45.22),
        ("8.9B", 2, 4, 4, 1, 16, 4, 1, 43.94),
        ("8.9B", 4, 16, 1, 2, 16, 1, 1, 43.31),
        ("8.9B", 8, 32, 1, 2, 8, 1, 1, 39.50),
        ("8.9B", 16, 16, 8, 1, 2, 8, 0, 36.33),
        ("8.9B", 32, 32, 8, 1, 1, 8, 0, 32.71),
        ("8.9B", 64, 128, 4, 1, 1, 2, 0, 18.69),
        ("80B", 4, 1, 8, 4, 256, 1, 0, 14.76),
        ("80B", 8, 1, 4, 16, 256, 1, 0, 30.65),
        ("80B", 16, 1, 4, 32, 256, 1, 0, 34.29),
        ("80B", 32, 4, 4, 16, 64, 1, 1, 30.75),
        ("80B", 64, 32, 16, 1, 4, 2, 1, 17.79),
    ):
        layout = ParallelConfig.model_validate(
            {"tp": tp, "sequence_parallel": tp > 1, "pp": pp, "dp": dp, "zero": zero}
        )
        work = Work(
            model=models[size],
            layout=layout,
            dp=dp,
            bf16=True,
            micro_batch_size=micro,
            micro_batches=micro_batches,
            seq_len=4096,
        )
        name = f"{size}, {8 * nodes} GPUs, {layout.describe()}, {micro_batches} x {micro}"
        yield Row("nanotron", name, work, percent / 100, fitted=(size, nodes) in {("8.9B", 1), ("8.9B", 8)})


def torchtitan() -> Iterator[Row]:
    """Llama 3.1, 8,192 tokens. A pipeline has as many micro-batches as ranks, its default; interleaved: two stages."""
    models = {
        "8B": llama(4096, 32, 32, 14_336, 128_256, n_kv_heads=8),
        "70B": llama(8192, 80, 64, 28_672, 128_256, n_kv_heads=8),
        "405B": llama(16_384, 126, 128, 53_248, 128_256, n_kv_heads=8),
    }
    shard: dict[str, Any] = {"zero": 3, "recompute": "selective"}
    compiled, fp8 = {"compile": True}, {"compile": True, "fp8": True}
    tensor = fp8 | {"tp": 8, "sequence_parallel": True, "zero": 3, "recompute": "full"}
    pipelined = tensor | {"pp": 8, "zero": 2}
    for size, gpus, keys, micro, micro_batches, hidden, rate, gib in (
        ("8B", 8, shard, 2, 1, False, 5762, 82.4),
        ("8B", 8, shard | compiled, 2, 1, False, 6667, 77.0),
        ("8B", 8, shard | fp8, 2, 1, False, 8532, 76.8),
        ("8B", 128, shard, 2, 1, False, 5605, 67.0),
        ("8B", 128, shard | compiled, 2, 1, False, 6514, 62.0),
        ("8B", 128, shard | fp8, 2, 1, False, 8380, 61.8),
        ("70B", 256, tensor, 16, 1, False, 829, 71.9),
        ("70B", 256, tensor, 16, 1, True, 876, 67.6),
        ("405B", 512, pipelined, 4, 8, True, 100, 82.5),
        ("405B", 512, pipelined | {"virtual_stages": 2}, 4, 8, True, 128, 72.7),
    ):
        layout = ParallelConfig.model_validate(keys)
        dp = gpus // layout.ranks_of_one
        layout = layout.model_copy(update={"dp": dp})
        work = Work(
            model=models[size],
            layout=layout,
            dp=dp,
            bf16=True,
            micro_batch_size=micro,
            micro_batches=micro_batches,
            seq_len=8192,
        )
        mfu = rate * flops_per_token(models[size], 8192) / 989e12
        name = f"{size}, {gpus} GPUs, {layout.describe()}" + (", async" if hidden else "")
        program = "torchtitan, async" if hidden else "torchtitan"
        yield Row(program, name, work, mfu, size == "8B" and gpus == 8, GRAND_TETON, gib)


def experts() -> Iterator[Row]:
    """Models with experts, 4,096 tokens, equal loads. Kernels of Transformer Engine count as compiled blocks."""
    mixtral, qwen, deepseek = (published_model(name) for name in ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"))
    dense, sparse = deepseek["layers"]
    further = {"predict_further": deepseek.pop("predict_further")}
    kimi = deepseek | {
        "vocab_size": 163_840,
        "layers": [dense | {"repeat": 1}, sparse | {"repeat": 60}],
        "attention": deepseek["attention"] | {"n_heads": 64},
        "feed_forward": deepseek["feed_forward"] | {"n_experts": 384, "groups": 1, "active_groups": 1},
    }
    # Megatron-LM counts the FLOPs of whole attention, as we do; of the others the tokens are published.
    tokens = 468e12 / flops_per_token(ModelConfig.model_validate(mixtral), 4096)
    own = 1e12 / 180_000 / 3600  # hours of a GPU for 10^12 tokens
    mcore, automodel, again = "Megatron-LM", "NeMo Automodel", {"recompute": "full"}
    # Each of Automodel's pipelines runs 8 micro-batches, in larger batches several times, one after the other.
    for program, name, model, gpus, keys, micro, micro_batches, rate in (
        (mcore, "Mixtral 8x7B", mixtral, 64, {"ep": 8, "pp": 4, "virtual_stages": 8}, 1, 16, tokens),
        (automodel, "Qwen3 30B-A3B", qwen, 8, again | {"ep": 8}, 4, 16, 12_040),
        (automodel, "DeepSeek-V3", deepseek, 256, again | {"ep": 64, "pp": 4, "virtual_stages": 8}, 1, 8, 1002),
        (automodel, "DeepSeek-V3", deepseek, 1024, again | {"ep": 64, "pp": 4, "virtual_stages": 4}, 1, 8, 865),
        (automodel, "Kimi K2", kimi, 256, again | {"ep": 32, "pp": 8, "virtual_stages": 4}, 1, 8, 924),
        ("DeepSeek", "DeepSeek-V3", deepseek | further, 2048, {"ep": 64, "pp": 16, "fp8": True}, 1, 120, own),
    ):
        gpu = H800 if program == "DeepSeek" else H100
        layout = ParallelConfig.model_validate(keys | {"compile": True})
        dp = gpus // layout.ranks_of_one
        layout = layout.model_copy(update={"dp": dp})
        work = Work(
            model=ModelConfig.model_validate(model),
            layout=layout,
            dp=dp,
            bf16=True,
            micro_batch_size=micro,
            micro_batches=micro_batches,
            seq_len=4096,
        )
        mfu = rate * flops_per_token(work.model, 4096) / 989e12
        yield Row(program, f"{name}, {gpus} GPUs, {layout.describe()}", work, mfu, gpu=gpu)


def published_model(name: str) -> dict[str, Any]:
    """Returns the table `model` of one of our configs."""
    path = Path(__file__).parents[1] / "configs" / f"{name}.toml"
    model: dict[str, Any] = tomllib.loads(path.read_text())["model"]
    return model


def torchtitan_gib(row: Row) -> float:
    """Returns the peak of the fullest rank: FSDP2's shards and whole tensors, our count of activations, and the logits.

    Selective recomputation keeps every other product. Logits stand in bf16, fp32, as softmax and as gradient; a
    compiled loss saves one of these, but one that is split over tp is not compiled.
    """
    work, model, layout = row.work, row.work.model, row.work.layout
    compiled = layout.compile and layout.tp == 1
    alone = replace(work, layout=layout.model_copy(update={"pp": 1, "virtual_stages": 1, "recompute": "none"}))
    again = kept_activations(alone, RankKind("one block", 0, (Stage(range(1), embedding=False, head=False),)))
    found = []
    for rank in pipeline(work):
        owned = parameters(work, rank)
        # Under a pipeline weights stay gathered and gradients whole until the step ends.
        state = 16 * owned / work.replicas + (6 * owned if layout.pp > 1 else 4 * layer_parameters(work, 0))
        activations: float = kept_activations(work, rank)
        if layout.recompute == "selective":
            attention = model.attention
            products = 3 * model.dim + (attention.n_heads + 2 * attention.n_kv_heads) * attention.head_dim
            products += 2 * model.feed_forward.hidden_dim
            kept = 2 * model.dim + products / 2
            activations = 2 * work.tokens * (len(rank.layers) * kept + 2 * model.dim)
        logits = work.tokens * table_parameters(work) / model.dim * (14 if compiled else 18) * rank.has_head
        found.append(state + activations + max(logits, again))
    return max(found) / 2**30


def rows() -> list[Row]:
    return [*megatron(), *foundry(), *nanotron(), *torchtitan()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the constants and print them")
    if parser.parse_args().fit:
        fit()
    else:
        print(tables(), end="")


def tables() -> str:
    """Markdown."""
    lines = ["| program | run | MFU, published | predicted | off by |", "| --- | --- | --- | --- | --- |"]
    errors: dict[bool, list[float]] = {True: [], False: []}
    for row in rows():
        predicted = row.predicted_mfu(PROGRAMS[row.program])
        error = predicted / row.mfu - 1
        errors[row.fitted].append(abs(error))
        mark = " (fitted)" if row.fitted else ""
        lines.append(
            f"| {row.program.partition(',')[0]} | {row.name} | {100 * row.mfu:.1f} % | {100 * predicted:.1f} % | "
            f"{100 * error:+.0f} %{mark} |"
        )
    lines.append("")
    for fitted, found in errors.items():
        over = sum(error > 0.25 for error in found)
        lines.append(
            f"{'Fitted' if fitted else 'Predicted'}: {len(found)} rows, median error "
            f"{100 * statistics.median(found):.1f} %, {over} over 25 %.  "
        )
    lines += ["", *experts_table()]
    lines += ["", "| torchtitan's run | GiB, published | predicted | off by |", "| --- | --- | --- | --- |"]
    for row in rows():
        if row.memory_gib is not None:
            gib = torchtitan_gib(row)
            error = 100 * (gib / row.memory_gib - 1)
            lines.append(f"| {row.name} | {row.memory_gib:.1f} | {gib:.1f} | {error:+.0f} % |")
    return "\n".join(lines) + "\n"


def experts_table() -> Iterator[str]:
    yield "| program | run | tokens/s per GPU, published | predicted | off by |"
    yield "| --- | --- | --- | --- | --- |"
    errors = []
    for row in experts():
        predicted, per_mfu = row.predicted_mfu(PROGRAMS[row.program]), 989e12 / flops_per_token(row.work.model, 4096)
        errors.append(abs(predicted / row.mfu - 1))
        yield (
            f"| {row.program} | {row.name} | {row.mfu * per_mfu:,.0f} | {predicted * per_mfu:,.0f} | "
            f"{100 * (predicted / row.mfu - 1):+.0f} % |"
        )
    yield ""
    yield f"Predicted: {len(errors)} rows, median error {100 * statistics.median(errors):.1f} %."


def fit() -> None:
    """Turns one constant after the other until the fitted rows' errors, in logarithms, stop to fall."""
    shared = ("products", "attention", "memory", "network", "hop_s")
    own = {
        "Megatron-LM": ("tp_hidden",),
        "torchtitan": ("products", "fused", "fp8_products"),
    }
    programs = dict(PROGRAMS)
    data = [row for row in rows() if row.fitted]
    knobs = [("", name) for name in shared] + [(program, name) for program, names in own.items() for name in names]

    def turned(program: str, name: str, factor: float) -> dict[str, Program]:
        held = {other for other, names in own.items() if name in names}
        return {
            key: replace(value, **{name: min(getattr(value, name) * factor, 1.0)})
            if key == program or (not program and key not in held)
            else value
            for key, value in programs.items()
        }

    def loss(candidates: dict[str, Program]) -> float:
        return sum(abs(math.log(row.predicted_mfu(candidates[row.program]) / row.mfu)) ** 1.5 for row in data)

    best, step = loss(programs), 0.2
    while step > 0.005:
        improved = False
        for program, name in knobs:
            for factor in (1 + step, 1 / (1 + step)):
                candidate = turned(program, name, factor)
                if (found := loss(candidate)) < best - 1e-6:
                    programs, best, improved = candidate, found, True
        step = step if improved else step / 2
    for program, names in {"nanotron": shared, **{key: names for key, names in own.items() if names}}.items():
        print(program, {name: float(f"{getattr(programs[program], name):.3g}") for name in names})
    print(f"loss {best:.4f}")


if __name__ == "__main__":
    main()
