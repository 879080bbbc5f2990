"""`triplane plan`: checks a run and estimates its memory, time and cost, without a GPU."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from triplane.config.checks import check, tokens_per_step
from triplane.config.load import load_config
from triplane.config.preflight import done_steps
from triplane.model.count import count_parameters, flops_per_token
from triplane.parallel.rules import Devices, device_problems
from triplane.plan.disk import checkpoint_bytes, kept_checkpoints
from triplane.plan.estimate import Estimate, beyond_layout, estimate, tokens_of, work_of
from triplane.plan.gate import Findings, examine
from triplane.plan.gpus import GPUS, RESERVED_GIB, Gpu, find_gpu
from triplane.plan.search import Search, changes, nearest, search
from triplane.plan.show import Show
from triplane.storage.errors import ConfigError
from triplane.storage.files import write_whole
from triplane.training.config import RunConfig
from triplane.training.exits import Exit

_DAY_S = 86_400


def plan(
    path: Path,
    overrides: list[str],
    *,
    gpus: int,
    gpu_name: str,
    searching: bool,
    price: float | None,
    currency: str | None,
    time_limit_days: float | None,
    json_path: Path | None,
) -> int:
    """Prints the plan, then all problems; returns the exit code, 1 if there are any."""
    if currency is not None and not currency.strip():
        raise ConfigError(f'--currency "{currency}": empty; give a code, such as EUR')
    if currency is not None and price is None:
        raise ConfigError(f"--currency {currency}: give the price of a GPU hour in it, by --price")
    config, gpu = load_config(path, overrides), find_gpu(gpu_name)
    gate = examine(config, gpus)
    found = gate.problems
    show = Show()
    done = done_steps(config)
    valid_layout = set(check(config, gpus)) <= beyond_layout(config)
    layout = work_of(config, gpus).layout if valid_layout else config.parallel
    show.text(f"{path} on {gpus} x {gpu_name}: {layout.describe()}\n")
    show.facts(_facts(config, done, gate))
    record: dict[str, Any] = {"config": str(path), "overrides": overrides, "gpus": gpus, "gpu": gpu_name}
    record |= _figures(config, done)
    answer = estimate(config, gpus, gpu, done_steps=done) if valid_layout else None
    if answer is not None:
        per_hour, unit = (gpu.price_per_hour, gpu.currency) if price is None else (price, currency or "USD")
        cost = answer.total_s / 3600 * gpus * per_hour
        source = ", a guess: set yours with --price" if price is None and gpu_name.lower() in GPUS else ""
        show.memory(answer, gpu)
        show.speed(answer)
        show.text()
        at = f"at {_money(f'{per_hour:g}', unit)} for a GPU hour{source}"
        show.facts(_outcome(answer, gpus) | {"cost": f"{_money(f'{cost:,.0f}', unit)} {at}"})
        record["estimate"] = _record(answer) | {"cost": cost, "currency": unit}
        found += _limits(answer, gpu, time_limit_days)
        capability = (8, 0) if gpu.fp8_tflops is None else (8, 9)
        found += device_problems(config.parallel, config.training.precision, Devices(gpus, capability))
    fits, hint = answer is not None and answer.fits(gpu), None
    if searching or not fits:
        results = search(config, gpus, gpu)
        if searching:
            show.search(results, [changes(config, layout.config) for layout in results.found])
            record["search"] = [
                {"overrides": changes(config, layout.config)} | _record(layout.estimate) for layout in results.found
            ]
        if not fits:
            hint = _advice(config, gpus, results)
    show.warnings(gate.warnings)
    show.problems(found, hint)
    if json_path is not None:
        record |= {"problems": found, "warnings": gate.warnings, "hint": hint}
        write_whole(json_path, (json.dumps(record, indent=1) + "\n").encode())
    return Exit.FAILED if found else Exit.OK


def _figures(config: RunConfig, done: int) -> dict[str, float]:
    flops, tokens = flops_per_token(config.model, config.data.seq_len), tokens_of(config)
    return {
        "parameters": count_parameters(config.model),
        "flops_per_token": flops,
        "tokens": tokens,
        "flops": flops * tokens,
        "steps_done": done,
        "checkpoint_bytes": checkpoint_bytes(config),
        "checkpoints": kept_checkpoints(config),
    }


def _facts(config: RunConfig, done: int, gate: Findings) -> dict[str, str]:
    figures, steps = _figures(config, done), config.training.steps
    one, count = figures["checkpoint_bytes"] / 2**30, int(figures["checkpoints"])
    ramp = "".join(f", then {size * config.data.seq_len:,}" for _, size in config.training.batch_sizes[1:])
    return {
        "parameters": f"{figures['parameters']:,}",
        "FLOPs per token": f"{figures['flops_per_token']:.4g}",
        "tokens": f"{figures['tokens']:.4g} in {steps:,} steps of {tokens_per_step(config):,}{ramp}",
        "total FLOPs": f"{figures['flops']:.4g}",
        "checkpoints": f"{one:,.1f} GiB each, at most {count} at once: {one * count:,.1f} GiB",
        **({"text": gate.amount.describe()} if gate.amount else {}),
        **({"done": f"{done:,} steps, in {config.run_dir}"} if done else {}),
    }


def _outcome(answer: Estimate, gpus: int) -> dict[str, str]:
    speed, hours = answer.speed, answer.total_s / 3600
    return {
        "MFU": f"{100 * speed.mfu:.1f} %",
        "tokens/s": f"{speed.tokens_per_s:,.0f}, {speed.tokens_per_s / gpus:,.0f} per GPU",
        "to the end": f"{_duration(answer.total_s)}, {hours * gpus:,.0f} GPU hours",
    }


def _money(amount: str, currency: str) -> str:
    return f"${amount}" if currency == "USD" else f"{amount} {currency}"


def _limits(answer: Estimate, gpu: Gpu, time_limit_days: float | None) -> list[str]:
    found = []
    for name, memory in answer.memory.items():
        need, room = memory.total / 2**30, gpu.memory_gib - RESERVED_GIB
        if need > room:
            found.append(f"{name}: {need:,.1f} GiB, but a GPU has {room:,.1f} (and {RESERVED_GIB} for CUDA and NCCL)")
    if time_limit_days is not None and answer.total_s > time_limit_days * _DAY_S:
        tokens = answer.speed.tokens_per_s * time_limit_days * _DAY_S
        found.append(
            f"{_duration(answer.total_s)} to the end, but --time-limit-days is {time_limit_days:g}, enough for "
            f"{tokens:.3g} tokens: use more GPUs, or reduce training.steps"
        )
    return found


def _advice(config: RunConfig, gpus: int, results: Search) -> str:
    if not results.found:
        most = f"; most often: {results.refused[0].reason}" if results.refused else ""
        return f"no layout of this model and batch fits {gpus} of these GPUs{most}"
    return f"the nearest layout that fits: {' '.join(changes(config, nearest(config, results.found).config))}"


def _record(answer: Estimate) -> dict[str, Any]:
    return {
        "memory_bytes": {name: asdict(memory) | {"total": memory.total} for name, memory in answer.memory.items()},
        "speed": asdict(answer.speed) | {"step_s": answer.speed.step_s},
        "total_s": answer.total_s,
    }


def _duration(seconds: float) -> str:
    return f"{seconds / _DAY_S:,.1f} days" if seconds >= _DAY_S else f"{seconds / 3600:,.1f} hours"
