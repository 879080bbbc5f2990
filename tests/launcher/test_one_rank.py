"""A run on one rank, which no other process watches."""

from pathlib import Path

import pytest
from commands import triplane
from runs import small_run
from small_corpora import Prepared

from triplane.config.toml import to_toml
from triplane.launcher import run


def test_its_errors_are_in_a_log_of_the_start_too(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run(prepared, tmp_path / "run", parallel={"dp": 1})
    (tmp_path / "small.toml").write_text(to_toml(config))

    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(run, "run_rank", fail)
    results = [triplane("train", "small.toml", cwd=tmp_path) for _ in range(2)]
    for number, result in enumerate(results, start=1):
        assert result.returncode == 1
        assert (tmp_path / "run" / "logs" / f"rank_0.{number}.log").read_text() in result.stderr
        assert "RuntimeError: planted" in result.stderr
    shown = triplane("logs", "run", "--rank", 0, cwd=tmp_path)
    assert "rank_0.2.log" in shown.stdout and "RuntimeError: planted" in shown.stdout


def test_another_kind_of_optimizer_starts_from_the_weights_alone(prepared: Prepared, tmp_path: Path) -> None:
    for kind, changes in (("adamw", {"stop_at_step": 4}), ("muon", {})):
        config = small_run(
            prepared, tmp_path / "run", training=changes, parallel={"zero": 0}, optimizer={"kind": kind, "lr": 1e-2}
        )
        (tmp_path / f"{kind}.toml").write_text(to_toml(config))
    assert triplane("train", "adamw.toml", cwd=tmp_path).returncode == 0
    refused = triplane("train", "muon.toml", cwd=tmp_path)
    assert refused.returncode == 2
    step = tmp_path / "run" / "checkpoints" / "step_4"
    assert refused.stderr.startswith(f"triplane: {step} holds no momentum, which [optimizer] asks for"), refused
    assert refused.stderr.count("\n") == 1
    started = triplane("train", "muon.toml", "run_dir=new", f"checkpoint.initial={step}", cwd=tmp_path)
    assert started.returncode == 0, started.stderr
    assert f"starting from {step}" in started.stdout
