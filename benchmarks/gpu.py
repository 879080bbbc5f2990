"""All that needs a GPU, in one call: the quick proof, the flash kernels, and how fast and how large the 1B model is.

    python benchmarks/gpu.py [--ranks N]

Prints Markdown for README.md. It is meant to take under eight minutes on one H100; `triplane prove` is the full proof.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from triplane.config.load import load_config
from triplane.model.batch import Batch
from triplane.model.config import ModelConfig
from triplane.model.count import flops_per_token
from triplane.parallel.config import ParallelConfig
from triplane.parallel.engine import Engine
from triplane.parallel.mesh import Mesh
from triplane.prove.command import prove
from triplane.prove.forked import run_ranks
from triplane.training.hardware import peak_flops_per_s, peak_memory_gib
from triplane.training.optimizers.adamw import AdamW

SEQ_LEN = 4096
WARMUP_STEPS, STEPS = 4, 8
VARIANTS: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (4, {"recompute": "selective"}),
    (8, {"recompute": "full"}),
    (2, {"compile": True}),
    (4, {"compile": True, "recompute": "selective"}),
    (4, {"compile": True, "recompute": "selective", "fp8": True}),
]
"""(sequences in a micro-batch, keys of the layout)"""
TEXTS = ("whole sequences", "packed documents")
"""Each takes another kernel; training reads packed documents, unless they are as long as its sequences."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    ranks = parser.parse_args().ranks
    print(f"## {torch.cuda.get_device_name()} x {ranks}, torch {torch.__version__}, {time.strftime('%d %B %Y')}\n")
    model = load_config(Path(__file__).parents[1] / "configs" / "1b.toml").model
    (kernels,) = run_ranks(ParallelConfig(), 1, both_kernels, model, device="cuda", timeout_s=300)
    for text, names in zip(TEXTS, kernels):
        print(f"attention, {text}: {', '.join(sorted(names))}")
    print(
        "\n| 1B, bf16 | sequences of 4,096 | text | tokens/s | MFU | peak GiB |\n| --- | --- | --- | --- | --- | --- |"
    )
    for sequences, keys in VARIANTS:
        layout = ParallelConfig(**keys)
        (rows,) = run_ranks(layout, 1, both_speeds, model, layout, sequences, device="cuda", timeout_s=400)
        for text, row in zip(TEXTS, rows):
            print(f"| {layout.describe()} | {sequences} | {text} | {row}", flush=True)
    print("\n```")
    code = prove(None, ranks=ranks, quick=True, json_path=None)
    print("```")
    raise SystemExit(code)


def batch(model: ModelConfig, sequences: int, packed: bool) -> Batch:
    """Random tokens; packed: two documents of unequal length in each sequence."""
    tokens_T = torch.randint(model.vocab_size, (sequences * SEQ_LEN,))
    starts = range(0, len(tokens_T), SEQ_LEN)
    cuts = (start + cut for start in starts for cut in ((0, SEQ_LEN // 3) if packed else (0,)))
    return Batch.build(tokens_T, tokens_T.roll(-1), [*cuts, len(tokens_T)]).to(torch.device("cuda"))


def engine(mesh: Mesh, model: ModelConfig, layout: ParallelConfig) -> Engine:
    """With random weights that the GPU draws: the run's own come from one core, in ten seconds."""
    built = Engine(
        model,
        layout,
        mesh,
        dtype=torch.bfloat16,
        seq_len=SEQ_LEN,
        optimizer=AdamW(),
    )
    for fragment in built.optimizer.fragments():
        if fragment.kind == "weight" and len(fragment.shape) > 1:
            fragment.data.normal_(std=model.init_std)
        elif fragment.kind == "weight":
            fragment.data.fill_(1.0)
    built.optimizer.loaded(step=0)
    return built


def both_kernels(mesh: Mesh, model: ModelConfig) -> list[set[str]]:
    """Returns the kernels for each kind of text."""
    return [attention_kernels(mesh, model, packed) for packed in (False, True)]


def attention_kernels(mesh: Mesh, model: ModelConfig, packed: bool) -> set[str]:
    """Names of the GPU kernels of attention in one step of two layers."""
    small = model.model_copy(update={"n_layers": 2})
    built, read = engine(mesh, small, ParallelConfig(dp=1)), [batch(small, 1, packed)]
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        built.forward_backward(read)
        torch.cuda.synchronize()
    names = {event.key for event in record.key_averages()}
    kernels = {name.split("<")[0] for name in names if "flash" in name or "fmha" in name or "attention" in name}
    assert kernels, f"no fused attention kernel among {sorted(names)}"
    return kernels


def speed(mesh: Mesh, model: ModelConfig, layout: ParallelConfig, sequences: int) -> str:
    """Tokens/s, MFU and peak memory of one rank on whole sequences, two micro-batches a step; or why there are none."""
    return _speed(mesh, engine(mesh, model, layout), sequences, packed=False)


def both_speeds(mesh: Mesh, model: ModelConfig, layout: ParallelConfig, sequences: int) -> list[str]:
    """Returns the speed of one engine on each kind of text."""
    built, rows = engine(mesh, model, layout), []
    for packed in (False, True):
        torch.cuda.reset_peak_memory_stats(mesh.device)
        rows.append(_speed(mesh, built, sequences, packed))
    return rows


def _speed(mesh: Mesh, built: Engine, sequences: int, packed: bool) -> str:
    try:
        read = [batch(built.config, sequences, packed) for _ in range(2)]
        for step in range(WARMUP_STEPS + STEPS):
            if step == WARMUP_STEPS:
                torch.cuda.synchronize()
                start_s = time.perf_counter()
            built.forward_backward(read)
            built.step(1e-4)
        torch.cuda.synchronize()
    except torch.OutOfMemoryError as error:
        return f"out of memory: {str(error).splitlines()[0]} | | |"
    tokens_per_s = 2 * STEPS * sequences * SEQ_LEN / (time.perf_counter() - start_s)
    peak = peak_flops_per_s(mesh.device, torch.bfloat16)
    mfu = f"{100 * tokens_per_s * flops_per_token(built.config, SEQ_LEN) / peak:.1f} %" if peak else "-"
    return f"{tokens_per_s:,.0f} | {mfu} | {peak_memory_gib(mesh.device):.1f} |"


if __name__ == "__main__":
    main()
