"""`triplane prove --reshard`: saves under each layout, loads under every other, and compares with one process."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from tempfile import TemporaryDirectory
from typing import Any

import torch

from triplane.checkpoint.folder import checkpoint_of
from triplane.model.config import ModelConfig
from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.mesh import Mesh
from triplane.prove.cases import Case, resharding_proofs
from triplane.prove.compare import TIMEOUT_S, Machine, measured, tolerances, worst
from triplane.prove.forked import RanksFailedError, run_ranks
from triplane.prove.reference import Difference, Trace, proof_model, train_plainly
from triplane.prove.resharding import train_between
from triplane.storage.files import write_whole
from triplane.storage.location import Location
from triplane.training.exits import Exit
from triplane.training.hardware import DTYPES

_CUT, _STEPS = 3, 6
"""Saves after `_CUT` steps, and compares over the rest."""
_WIDTH = 9


def prove_resharding(ranks: int | None, json_path: Path | None) -> int:
    """Prints a table for each network and optimizer; returns the exit code."""
    torch.set_num_threads(1)  # as in `prove`
    machine = Machine.here(ranks)
    rows = []
    for proof in resharding_proofs(proof_model(), machine.ranks, machine.runs):
        with TemporaryDirectory(prefix="triplane-reshard-") as folder:
            rows += _prove(proof, machine, Path(folder))
    if json_path is not None:
        write_whole(json_path, (json.dumps(rows, indent=1) + "\n").encode())
    passed = sum(row["passed"] for row in rows)
    print(f"{passed} of {len(rows)} checkpoints resume under another layout as one process continues")
    return Exit.OK if passed == len(rows) else Exit.FAILED


def _prove(proof: list[Case], machine: Machine, folder: Path) -> list[dict[str, Any]]:
    own, optimizer = proof[0].model(proof_model()), proof[0].optimizer
    cases = dict(zip(ascii_uppercase, proof))
    reference = train_plainly(own, _STEPS, optimizer=optimizer)
    allowed = tolerances(proof, proof_model(), steps=range(_CUT, _STEPS), machine=machine)
    network = ", ".join((f"{'tied' if own.tie_embeddings else 'untied'} head", *proof[0].options))
    print(f"{optimizer}, {network}; saved under:")
    for name, case in cases.items():
        print(f"  {name} {case.describe()}", flush=True)
        _run(machine, case, _save, own, case, folder / name)
    columns = " ".join(f"{name:>{_WIDTH}}" for name in cases)
    print(f"largest difference from one process, loaded under:\n   {columns}", flush=True)
    rows = []
    for name, case in cases.items():
        others = [other for other in cases if other != name]
        rounder = [cases[other] if cases[other].precision == "bf16" else case for other in others]
        saved = [(checkpoint_of(folder / other, _CUT), kept.precision) for other, kept in zip(others, rounder)]
        found, error = _load(own, case, reference=reference, saved=saved, machine=machine)
        for other, differing, rounding in zip(others, found, rounder):
            rows.append(_row(cases[other], case, found=differing, tolerance=allowed[rounding], error=error))
        shown = iter(rows[-len(others) :])
        cells = [f"{'':>{_WIDTH}}" if other == name else _cell(next(shown)) for other in cases]
        print(f"  {name} {' '.join(cells)}".rstrip(), *filter(None, [error]), sep="\n", flush=True)
    return rows


def _run(machine: Machine, case: Case, function: Any, *args: Any) -> list[Any]:
    return run_ranks(case.layout, case.ranks, function, *args, device=machine.device, timeout_s=TIMEOUT_S)


def _load(
    model: ModelConfig, case: Case, *, reference: Trace, saved: list[tuple[Location, str]], machine: Machine
) -> tuple[list[Difference | None], str]:
    """Returns the largest difference over ranks for each checkpoint, and the error if a rank failed.

    `saved` pairs a checkpoint with the precision to compare in.
    """
    try:
        ranks = _run(machine, case, _resume, model, case, reference, saved)
    except RanksFailedError as error:
        return [None] * len(saved), str(error)
    return [worst(found) for found in zip(*ranks)], ""


def _save(mesh: Mesh, model: ModelConfig, case: Case, folder: Path) -> None:
    train = _training(mesh, model, case)
    train(steps=range(_CUT), save=folder)


def _training(mesh: Mesh, model: ModelConfig, case: Case) -> Callable[..., Trace]:
    dtype = DTYPES[case.precision]
    return partial(train_between, mesh, model, case.layout, dtype=dtype, optimizer=case.optimizer)


def _resume(
    mesh: Mesh, model: ModelConfig, case: Case, reference: Trace, saved: list[tuple[Location, str]]
) -> list[Difference]:
    rest = reference.after(_CUT)
    train = _training(mesh, model, case)
    steps = range(_CUT, _STEPS)
    return [measured(train(steps=steps, load=path), rest, precision=precision, mesh=mesh) for path, precision in saved]


def _row(saved: Case, loaded: Case, *, found: Difference | None, tolerance: Difference, error: str) -> dict[str, Any]:
    return {
        "saved_under": saved.describe(),
        "loaded_under": loaded.describe(),
        "difference": None if found is None else asdict(found),
        "tolerance": asdict(tolerance),
        "passed": found is not None and found.within(tolerance),
        "error": error,
    }


def _cell(row: dict[str, Any]) -> str:
    if row["difference"] is None:
        return f"{'FAILED':>{_WIDTH}}"
    return f"{max(row['difference'].values()):>{_WIDTH - 1}.1e}{' ' if row['passed'] else '!'}"
