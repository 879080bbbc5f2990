"""Decides which layouts this machine can prove, and how far each may be from one process."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace

import torch

from triplane.model.config import ModelConfig
from triplane.parallel.config import ParallelConfig
from triplane.parallel.devices import missing_to_compile
from triplane.parallel.mesh import Mesh
from triplane.prove.cases import Case
from triplane.prove.forked import run_ranks
from triplane.prove.reference import (
    Difference,
    Trace,
    largest_difference,
    proof_engine,
    train_on_mesh,
    typical_difference,
)
from triplane.prove.rounding import SEEDS, bound, differences_of_seeds
from triplane.storage.errors import LaunchError
from triplane.training.hardware import DTYPES

TIMEOUT_S = 300.0
_FP32 = Difference(loss=1e-5, norm=2e-6, weight=1e-5, moment=1e-5)
"""The norm, relative, is exact to 1e-6 however large a tensor is."""
_FP32_OPTIONS = replace(_FP32, norm=2e-5)
"""Some networks amplify rounding: norms of small outputs ten times (OLMo 2's at the proof's initial weights)."""


@dataclass(frozen=True)
class Machine:
    """The machine that runs the proofs."""

    device: str
    ranks: int
    """Most ranks of a layout."""
    compiler: bool

    @classmethod
    def here(cls, ranks: int | None) -> "Machine":
        """Returns this machine, and reports what it cannot prove."""
        gpus = torch.cuda.device_count()
        missing = missing_to_compile(on_gpu=gpus > 0)
        machine = cls("cuda" if gpus else "cpu", ranks or gpus or 8, compiler=missing is None)
        if gpus and machine.ranks > gpus:
            raise LaunchError(f"--ranks {ranks}, but this machine has {gpus} GPUs; give {gpus} or fewer")
        if missing is not None:
            print(f"torch.compile lacks {missing}: skipping layouts with compile")
        if gpus:
            print("ring attention has no fp32 kernel on a GPU: proving rings in bf16")
        return machine

    def runs(self, case: Case) -> bool:
        """Whether this machine can run a case that fits the model."""
        ring = case.layout.cp > 1 and case.layout.cp_method == "ring"
        return (self.compiler or not case.layout.compile) and not (
            self.device == "cuda" and ring and case.precision == "fp32"
        )


def tolerances(cases: Sequence[Case], model: ModelConfig, *, steps: range, machine: Machine) -> dict[Case, Difference]:
    """Returns the allowed distance of each case from one fp32 process over `steps`."""
    allowed = {case: _FP32_OPTIONS if case.options else _FP32 for case in cases}
    rounded = [case for case in cases if case.precision == "bf16"]
    alone, timeout_s = ParallelConfig(dp=1), TIMEOUT_S * len(SEEDS)
    for own in dict.fromkeys(case.model(model) for case in rounded):
        (found,) = run_ranks(alone, 1, differences_of_seeds, own, steps, device=machine.device, timeout_s=timeout_s)
        allowed |= dict.fromkeys((case for case in rounded if case.model(model) == own), bound(found, len(rounded)))
    return allowed


def measured(trace: Trace, reference: Trace, *, precision: str, mesh: Mesh) -> Difference:
    """Returns the distance of this rank's trace from one fp32 process, measured as in `tolerances`. Collective."""
    if precision == "bf16":
        return typical_difference(trace, reference, mesh.device)
    return largest_difference(trace, reference)


def worst(found: Iterable[Difference]) -> Difference:
    """Returns the largest difference of each kind."""
    return Difference(*(max(values) for values in zip(*map(astuple, found))))


def train_case(mesh: Mesh, model: ModelConfig, case: Case, reference: Trace) -> tuple[Difference, float]:
    """Trains the steps of `reference` on this rank; returns the distance from it, and tokens/s."""
    seed = reference.seed
    engine = proof_engine(mesh, model, case.layout, dtype=DTYPES[case.precision], seed=seed, optimizer=case.optimizer)
    trace = train_on_mesh(engine, range(len(reference.losses)), seed=seed)
    return measured(trace, reference, precision=case.precision, mesh=mesh), trace.tokens_per_s
