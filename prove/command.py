"""`triplane prove`: trains a small model under many layouts and compares each with one process."""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from triplane.config.load import load_config
from triplane.model.config import Layer, ModelConfig
from triplane.model.parts.attention import Attention
from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.prove.cases import Case, full_proof, network_proof, own_case, quick_proof
from triplane.prove.compare import TIMEOUT_S, Machine, tolerances, train_case, worst
from triplane.prove.forked import RanksFailedError, run_ranks
from triplane.prove.reference import SEQ_LEN, Difference, Trace, proof_model, reference_trace
from triplane.storage.errors import LaunchError
from triplane.storage.files import write_whole
from triplane.training.exits import Exit

_STEPS, _FEW_STEPS, _LARGE_STEPS = 10, 3, 2
"""Steps of a row; few with --quick and for networks, which is enough to meet each kind of batch."""
_LINE = "{:<7} {:>5} {:>8} {:>8} {:>8} {:>9}  {}"


@dataclass(frozen=True)
class Result:
    """A row of the table."""

    case: Case
    difference: Difference | None
    """None if the case failed to run."""
    tolerance: Difference
    tokens_per_s: float
    error: str = ""

    @property
    def passed(self) -> bool:
        return self.difference is not None and self.difference.within(self.tolerance)


def prove(config: Path | None, *, ranks: int | None, quick: bool, json_path: Path | None) -> int:
    """Prints a line for each layout as soon as it is trained; returns the exit code."""
    torch.set_num_threads(1)  # another thread may hold a lock of MKL's as ranks fork, and they wait for it for ever
    machine = Machine.here(ranks)
    model, cases = proof_model(), []
    if config is not None:
        run = load_config(config)
        model = _shrunken(run.model)
        precision = run.training.precision
        own = own_case(model, run.parallel, precision, ranks=machine.ranks, runs_here=machine.runs)
        if own is None:
            print(f"{config}: its own layout requires more than {machine.ranks} ranks, with two on each axis; skipped")
        cases = [] if own is None else [own]
    cases += (quick_proof if quick else full_proof)(model, machine.ranks, machine.runs)
    if config is None:
        cases += network_proof(model, machine.ranks, machine.runs, quick=quick)
    results = _results(model, cases, machine, steps=_FEW_STEPS if quick else _STEPS)
    if json_path is not None:
        write_whole(json_path, (json.dumps([_record(result) for result in results], indent=1) + "\n").encode())
    passed = sum(result.passed for result in results)
    print(f"{passed} of {len(results)} layouts train the model that one process trains")
    return Exit.OK if passed == len(results) else Exit.FAILED


def _results(model: ModelConfig, cases: list[Case], machine: Machine, *, steps: int) -> list[Result]:
    print(_LINE.format("", "ranks", "loss", "norm", "weights", "tokens/s", "layout"), flush=True)
    references: dict[tuple[ModelConfig, str], Trace] = {}
    try:
        networks = [case for case in cases if case.options]
        allowed = tolerances(networks, model, steps=range(_FEW_STEPS), machine=machine)
        others = [case for case in cases if not case.options]
        allowed |= tolerances(others, model, steps=range(steps), machine=machine)
    except RanksFailedError as error:
        raise LaunchError(f"the bf16 process to compare layouts with failed: {str(error)[-200:]}") from error
    if any(case.layout.compile for case in cases):
        import torch._inductor.compile_fx  # noqa: F401  before the ranks fork: a second for each
    results = []
    for case in cases:
        own = case.model(model)
        key = own, case.optimizer
        if key not in references:
            count = _LARGE_STEPS if case.large else _FEW_STEPS if case.options else steps
            references[key] = reference_trace(own, count, case.optimizer)
        results.append(_result(own, case, reference=references[key], tolerance=allowed[case], machine=machine))
        print(_line(results[-1]), flush=True)
    return results


def _result(model: ModelConfig, case: Case, *, reference: Trace, tolerance: Difference, machine: Machine) -> Result:
    result = partial(Result, case, tolerance=tolerance)
    try:
        answers = run_ranks(
            case.layout, case.ranks, train_case, model, case, reference, device=machine.device, timeout_s=TIMEOUT_S
        )
    except RanksFailedError as error:
        return result(difference=None, tokens_per_s=0.0, error=str(error))
    return result(difference=worst(found for found, _ in answers), tokens_per_s=min(rate for _, rate in answers))


def _shrunken(model: ModelConfig) -> ModelConfig:
    """Returns a model with the features of `model` and about the size of the proof's."""
    small = proof_model()
    hidden = {"hidden_dim": small.feed_forward.hidden_dim}

    def attention(part: Attention) -> Attention:
        window = None if part.window is None else min(part.window, SEQ_LEN // 4)
        own = part.shrunken(small.attention.n_heads, small.attention.head_dim)
        return own.model_copy(update={"window": window})

    def layer(own: Layer) -> Layer:
        return own.model_copy(
            update={
                "attention": own.attention and attention(own.attention),
                "feed_forward": own.feed_forward and own.feed_forward.model_copy(update=hidden),
            }
        )

    period = len(model.pattern)
    return model.model_copy(
        update={
            "vocab_size": small.vocab_size,
            "dim": small.dim,
            "n_layers": max(1, round(small.n_layers / period)) * period,
            "init_std": small.init_std,
            "attention": attention(model.attention),
            "feed_forward": model.feed_forward.model_copy(update=hidden),
            "layers": tuple(layer(own) for own in model.layers),
        }
    )


def _line(result: Result) -> str:
    layout, ranks = result.case.describe(), str(result.case.ranks)
    if result.difference is None:
        return _LINE.format("FAILED", ranks, "", "", "", "", f"{layout}\n{result.error}")
    found = [f"{value:.1e}" for value in (result.difference.loss, result.difference.norm, result.difference.weight)]
    return _LINE.format("ok" if result.passed else "DIFFERS", ranks, *found, f"{result.tokens_per_s:,.0f}", layout)


def _record(result: Result) -> dict[str, Any]:
    return {
        "layout": result.case.describe(),
        "ranks": result.case.ranks,
        "tied": result.case.tied,
        "precision": result.case.precision,
        "difference": None if result.difference is None else asdict(result.difference),
        "tolerance": asdict(result.tolerance),
        "tokens_per_s": result.tokens_per_s,
        "passed": result.passed,
        "error": result.error,
    }
