"""The proof passes for layouts that cover every pair of features."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from triplane.prove.command import prove


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("compiler")
def test_every_pair_of_features_trains_the_same_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captures and differentiates graphs as in a run, without the minutes that compiling them to C++ takes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    code = prove(None, ranks=8, quick=True, json_path=tmp_path / "proof.json")
    printed = capsys.readouterr().out
    assert code == 0, "\n".join(line for line in printed.splitlines() if not line.startswith("ok"))
    rows = json.loads((tmp_path / "proof.json").read_text())
    assert len(rows) >= 15
    assert all(row["passed"] for row in rows)
    assert f"{len(rows)} of {len(rows)} layouts" in printed


def test_a_proof_holds_the_same_rows_in_every_process() -> None:
    program = (
        "from triplane.prove.cases import network_proof, quick_proof; from triplane.prove.reference import proof_model;"
        "[print(case) for proof in (quick_proof(proof_model(), 4, lambda case: True),"
        " network_proof(proof_model(), 4, lambda case: True, quick=True)) for case in proof]"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


@pytest.mark.parametrize(
    ("isa", "layout"),
    [
        ("AVX2", "tp 2 x pp 2 x dp 2, zero 1, offload, tied, bf16"),
        ("AVX512_CORE", "dp 8, zero 3, recompute full, bf16"),
    ],
)
def test_rounding_alone_is_no_difference_on_cpus_without_bf16_products(isa: str, layout: str) -> None:
    """Runs in another process, since oneDNN reads its cap once; the tests above cover this machine's own set."""
    program = (
        "from triplane.prove import command as p; from triplane.prove.cases import full_proof;"
        "p._STEPS = 4;"
        "p.network_proof = lambda *a, **named: [];"
        f"p.full_proof = lambda *a: [c for c in full_proof(*a) if c.describe() == '{layout}'];"
        "raise SystemExit(p.prove(None, ranks=8, quick=False, json_path=None))"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"  {layout}\n1 of 1 layouts" in done.stdout
