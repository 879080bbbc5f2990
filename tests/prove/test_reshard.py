"""`triplane prove --reshard` passes, and fails when a load forgets something."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from triplane.checkpoint.reader import Checkpoint
from triplane.parallel.placement import Fragment
from triplane.prove.reshard import prove_resharding


def test_each_pair_is_a_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert prove_resharding(2, tmp_path / "proof.json") == 0
    rows = json.loads((tmp_path / "proof.json").read_text())
    layouts = {row["saved_under"] for row in rows}
    assert len(layouts) == 5 and len(rows) == 4 * 2
    assert all(0 < max(row["difference"].values()) < 1e-5 for row in rows)
    printed = capfd.readouterr().out
    assert "  A one rank, zero 0\n" in printed
    assert "adamw, untied head, experts in groups; saved under:\n" in printed
    assert printed.endswith("8 of 8 checkpoints resume under another layout as one process continues\n")


def test_moments_that_are_not_loaded_are_seen(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fill = Checkpoint.fill

    def forget_moments(checkpoint: Checkpoint, fragments: Iterable[Fragment]) -> None:
        fill(checkpoint, [fragment for fragment in fragments if fragment.kind == "weight"])

    monkeypatch.setattr(Checkpoint, "fill", forget_moments)
    assert prove_resharding(2, None) == 1
    printed = capfd.readouterr().out
    assert printed.endswith("0 of 8 checkpoints resume under another layout as one process continues\n")
    assert printed.count("!") == 8
