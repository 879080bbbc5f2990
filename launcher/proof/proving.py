"""What the tables of `triplane prove` share: what this machine can run, and how far from one process is the same."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch

from triplane.launcher.errors import LaunchError
from triplane.launcher.forked import run_ranks
from triplane.launcher.proof.layouts import Case
from triplane.model.compiled import has_compiler
from triplane.model.config import ModelConfig
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.training.hardware import DTYPES
from triplane.training.proof import Difference, Trace, difference, proof_engine, train_on_mesh

TIMEOUT_S = 300.0
_TOLERANCE = 1e-5
_BF16_ALLOWANCE = 2.0
"""How many times as far from fp32 as one bf16 process a bf16 layout may be: they round differently, by chance."""


@dataclass(frozen=True)
class Machine:
    """Where the proofs run."""

    device: str
    ranks: int
    """At most."""
    compiler: bool

    @classmethod
    def here(cls, ranks: int | None) -> "Machine":
        """This one; tells what it cannot prove."""
        gpus = torch.cuda.device_count()
        machine = cls("cuda" if gpus else "cpu", ranks or gpus or 8, bool(gpus) or has_compiler())
        if gpus and machine.ranks > gpus:
            raise LaunchError(f"--ranks {ranks}, but {gpus} GPUs are here")
        if not machine.compiler:
            print("no C++ compiler here: layouts with compile are left out")
        if gpus:
            print("no fp32 kernel for a ring on a GPU: rings are proven in bf16")
        return machine

    def runs(self, case: Case) -> bool:
        """Whether it can run a case that fits the model."""
        ring = case.layout.cp > 1 and case.layout.cp_method == "ring"
        return (self.compiler or not case.layout.compile) and not (
            self.device == "cuda" and ring and case.precision == "fp32"
        )


def tolerance(model: ModelConfig, precision: str, one: Trace, machine: Machine) -> Difference:
    """How far a layout may be from `one`."""
    if precision == "fp32":
        return Difference(*[_TOLERANCE] * 4)
    alone = Case(ParallelConfig(dp=1), model.tie_embeddings, precision)
    answers = run_ranks(alone.layout, 1, train_case, model, alone, one, device=machine.device, timeout_s=TIMEOUT_S)
    return Difference(*(_BF16_ALLOWANCE * value for value in astuple(answers[0][0])))


def worst(found: Iterable[Difference]) -> Difference:
    """The largest of each kind."""
    return Difference(*(max(values) for values in zip(*map(astuple, found))))


def train_case(mesh: Mesh, model: ModelConfig, case: Case, one: Trace) -> tuple[Difference, float]:
    """This rank's part of the steps that `one` has taken: how far it is from that, and its tokens/s."""
    engine = proof_engine(mesh, model, case.layout, DTYPES[case.precision])
    trace = train_on_mesh(engine, range(len(one.losses)))
    return difference(trace, one), trace.tokens_per_s
