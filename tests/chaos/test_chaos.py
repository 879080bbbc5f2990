"""Twelve faults in two runs of real processes: the first keeps its layout and ends with the same bytes."""

import os
from pathlib import Path

import pytest
from chaos.program import chaos
from small_corpora import Prepared

FAULTS = 12
SEED = int(os.environ.get("CHAOS_SEED", "0"))


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_every_fault_leaves_no_trace(prepared: Prepared, tmp_path: Path) -> None:
    print(f"seed {SEED}")
    survived = [recovery for run in chaos(prepared, tmp_path, SEED, FAULTS) for recovery in run]
    for kind, seconds in survived:
        print(f"{kind}: {seconds:.1f} s")
    assert len(survived) == FAULTS
    assert len({recovery.kind for recovery in survived}) == FAULTS
