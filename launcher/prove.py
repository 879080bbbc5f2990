"""`triplane prove`: trains a small model under many layouts and compares each with one process."""

import json
import queue
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from triplane.launcher.config import load_config
from triplane.launcher.errors import LaunchError
from triplane.launcher.forked import RanksFailedError, run_ranks
from triplane.launcher.layouts import Case, full_proof, own_case, quick_proof
from triplane.model.compiled import has_compiler
from triplane.model.config import ModelConfig
from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.training.hardware import DTYPES
from triplane.training.proof import (
    Difference,
    Trace,
    difference,
    proof_engine,
    proof_model,
    train_on_mesh,
    train_plainly,
)

_STEPS = 10
_TIMEOUT_S = 300.0
_LINE = "{:<80} {:>5} {:>8} {:>8} {:>8} {:>9} {}"
_TOLERANCE = 1e-5
_BF16_ALLOWANCE = 2.0
"""How many times as far from fp32 as one bf16 process a bf16 layout may be: they round differently, by chance."""


@dataclass(frozen=True)
class Result:
    """A row of the table."""

    case: Case
    difference: Difference | None
    """None if it failed to run."""
    tolerance: Difference
    tokens_per_s: float
    error: str = ""

    @property
    def passed(self) -> bool:
        if self.difference is None:
            return False
        found, allowed = asdict(self.difference), asdict(self.tolerance)
        return all(value <= allowed[name] for name, value in found.items())


def prove(config: Path | None, ranks: int | None, quick: bool, json_path: Path | None) -> int:
    """Prints a line for each layout as it ends; returns the exit code."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = ranks or (torch.cuda.device_count() if device == "cuda" else 8)
    if device == "cuda" and ranks > torch.cuda.device_count():
        raise LaunchError(f"--ranks {ranks}, but {torch.cuda.device_count()} GPUs are here")
    compiler = device == "cuda" or has_compiler()
    if not compiler:
        print("no C++ compiler here: layouts with compile are left out")
    if device == "cuda":
        print("no fp32 kernel for a ring on a GPU: rings are proven in bf16")

    def runs_here(case: Case) -> bool:
        ring = case.layout.cp > 1 and case.layout.cp_method == "ring"
        return (compiler or not case.layout.compile) and not (device == "cuda" and ring and case.precision == "fp32")

    model, cases = proof_model(), []
    if config is not None:
        run = load_config(config)
        model = _shrunken(run.model)
        own = own_case(model, run.parallel, run.training.precision, ranks, runs_here)
        if own is None:
            print(f"{config}: its own layout needs more than {ranks} ranks, with two on each axis; it is left out")
        cases = [] if own is None else [own]
    cases += (quick_proof if quick else full_proof)(model, ranks, runs_here)
    results = _results(model, cases, device)
    if json_path is not None:
        json_path.write_text(json.dumps([_record(result) for result in results], indent=1) + "\n")
    passed = sum(result.passed for result in results)
    print(f"{passed} of {len(results)} layouts train the model that one process trains")
    return 0 if passed == len(results) else 1


def _results(model: ModelConfig, cases: list[Case], device: str) -> list[Result]:
    print(_LINE.format("layout", "ranks", "loss", "norm", "weights", "tokens/s", ""), flush=True)
    references = {tied: train_plainly(_with_head(model, tied), _STEPS) for tied in {case.tied for case in cases}}
    tolerances = {(tied, "fp32"): Difference(*[_TOLERANCE] * 4) for tied in references}
    results = []
    for case in cases:
        key = (case.tied, case.precision)
        if key not in tolerances:
            alone = Case(ParallelConfig(dp=1), *key)
            found, _ = _train(model, alone, references[case.tied], device)
            tolerances[key] = Difference(*(_BF16_ALLOWANCE * value for value in asdict(found).values()))
        results.append(_result(model, case, references[case.tied], tolerances[key], device))
        print(_line(results[-1]), flush=True)
    return results


def _result(model: ModelConfig, case: Case, one: Trace, tolerance: Difference, device: str) -> Result:
    try:
        found, tokens_per_s = _train(model, case, one, device)
    except (RanksFailedError, queue.Empty) as error:
        return Result(case, None, tolerance, 0.0, str(error) or f"no answer in {_TIMEOUT_S} s")
    return Result(case, found, tolerance, tokens_per_s)


def _train(model: ModelConfig, case: Case, one: Trace, device: str) -> tuple[Difference, float]:
    """The largest differences of any rank, and the slowest rank's tokens/s."""
    answers = run_ranks(
        case.layout,
        case.ranks,
        _rank,
        _with_head(model, case.tied),
        case,
        one,
        device=device,
        timeout_s=_TIMEOUT_S,
    )
    worst = [max(values) for values in zip(*(astuple(found) for found, _ in answers))]
    return Difference(*worst), min(rate for _, rate in answers)


def _rank(mesh: Mesh, model: ModelConfig, case: Case, one: Trace) -> tuple[Difference, float]:
    trace = train_on_mesh(proof_engine(mesh, model, case.layout, DTYPES[case.precision]), range(_STEPS))
    return difference(trace, one), trace.tokens_per_s


def _with_head(model: ModelConfig, tied: bool) -> ModelConfig:
    return model.model_copy(update={"tie_embeddings": tied})


def _shrunken(model: ModelConfig) -> ModelConfig:
    """A model with the features of `model` and the size of the proof's."""
    small = proof_model()
    kept = ("rope_base", "rope_scaling", "norm_eps", "tie_embeddings", "z_loss_weight")
    groups = min(small.n_heads, model.n_heads // model.n_kv_heads)
    n_kv_heads = small.n_heads // groups if small.n_heads % groups == 0 else small.n_kv_heads
    return small.model_copy(update={name: getattr(model, name) for name in kept} | {"n_kv_heads": n_kv_heads})


def _line(result: Result) -> str:
    layout, ranks = result.case.describe(), str(result.case.ranks)
    if result.difference is None:
        return _LINE.format(layout, ranks, "", "", "", "", f"FAILED\n{result.error}")
    found = [f"{value:.1e}" for value in (result.difference.loss, result.difference.norm, result.difference.weight)]
    return _LINE.format(layout, ranks, *found, f"{result.tokens_per_s:,.0f}", "ok" if result.passed else "DIFFERS")


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
