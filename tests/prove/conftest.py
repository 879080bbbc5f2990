"""Proves single cases."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from triplane.parallel.config import ParallelConfig
from triplane.prove import command as prove_module
from triplane.prove.cases import Case
from triplane.prove.command import Result
from triplane.prove.compare import Machine, tolerances
from triplane.prove.reference import proof_model, reference_trace

MACHINE = Machine("cpu", 8, compiler=False)


@pytest.fixture(scope="module")
def proven() -> Callable[..., Result]:
    """Proves one case; computes references and bounds once, before a bug is planted."""
    known = cache(lambda model, optimizer="adamw": reference_trace(model, prove_module._FEW_STEPS, optimizer))
    exact, rounding, tied, large = (
        Case(ParallelConfig(dp=1), tied=tied, precision=precision, large=large)
        for tied, precision, large in (
            (False, "fp32", False),
            (False, "bf16", False),
            (True, "fp32", False),
            (False, "fp32", True),
        )
    )
    allowed = tolerances([exact, rounding], proof_model(), steps=range(prove_module._FEW_STEPS), machine=MACHINE)
    bounds = {case.precision: bound for case, bound in allowed.items()}
    for case in (exact, tied, large):
        known(case.model(proof_model()))

    def prove_case(
        tied: bool = False,
        precision: str = "fp32",
        large: bool = False,
        options: tuple[str, ...] = (),
        optimizer: str = "adamw",
        **layout: Any,
    ) -> Result:
        parallel = ParallelConfig(**({"dp": 1, "timeout_s": 20.0} | layout))
        case = Case(parallel, tied=tied, precision=precision, large=large, options=options, optimizer=optimizer)
        model = case.model(proof_model())
        return prove_module._result(
            model, case, reference=known(model, optimizer), tolerance=bounds[precision], machine=MACHINE
        )

    return prove_case
