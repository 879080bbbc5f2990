"""`triplane train --dry-run`: any rank of any number runs its step's shapes here, and a wrong shape is seen."""

import re
from pathlib import Path
from typing import Any

import pytest
from runs import small_run
from small_corpora import Prepared

from triplane.config.load import load_config
from triplane.config.toml import to_toml
from triplane.launcher.dry_run import dry_run
from triplane.parallel import megatron
from triplane.plan.estimate import work_of
from triplane.plan.shares import parameters, rank_kinds
from triplane.storage.errors import ConfigError


def config_file(prepared: Prepared, folder: Path, **layout: Any) -> Path:
    model = {"n_layers": 8, "head_dim": 16, "hidden_dim": 96}
    training = {"global_batch_size": 1024, "eval_sequences": 1024, "precision": "bf16"}
    path = folder / "run.toml"
    path.write_text(to_toml(small_run(prepared, folder / "run", model=model, training=training, parallel=layout)))
    return path


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ({"dp": 64}, 64),
        ({"tp": 4, "sequence_parallel": True, "pp": 4, "virtual_stages": 2, "dp": 8, "recompute": "selective"}, 128),
        ({"tp": 2, "cp": 2, "cp_method": "ring", "pp": 2, "dp": 8}, 64),
        ({"cp": 4, "dp": 8, "fp8": True}, 32),
        ({"tp": 2, "sequence_parallel": True, "dp": 8, "fp8": True}, 16),
    ],
)
def test_a_rank_of_each_kind_has_the_parameters_that_the_plan_counts(
    prepared: Prepared, tmp_path: Path, capfd: pytest.CaptureFixture[str], layout: dict[str, Any], ranks: int
) -> None:
    path = config_file(prepared, tmp_path, **layout)
    dry_run(path, [], ranks)
    printed = capfd.readouterr().out
    work = work_of(load_config(path), ranks)
    expected = [(kind.name, f"{parameters(work, kind):,}") for kind in rank_kinds(work)]
    assert re.findall(r"\((.+)\): ([\d,]+) parameters", printed) == expected
    assert not (tmp_path / "run").exists()


def test_a_wrong_shape_is_an_error(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "gather_tokens", lambda x_TD, mesh: x_TD)
    path = config_file(prepared, tmp_path, tp=2, sequence_parallel=True, dp=8)
    with pytest.raises(RuntimeError, match="broadcast"):
        dry_run(path, [], 16)


def test_a_layout_that_does_not_fit_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    path = config_file(prepared, tmp_path, tp=2, dp=8)
    with pytest.raises(ConfigError, match=r"dp \(8\) x tp \(2\) x pp \(1\) = 16, but 7 ranks"):
        dry_run(path, [], 7)
