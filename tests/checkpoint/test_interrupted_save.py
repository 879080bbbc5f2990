"""Ranks killed by SIGKILL in each phase of a save: the checkpoint before it stands, and nothing else stays."""

from pathlib import Path

import pytest
from killed_saves import kill_a_save
from save_phases import PHASES

COMMITTED = ("after the rename", "in the deletion of an old one")


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_save_leaves_the_one_before(phase: str, tmp_path: Path) -> None:
    kill_a_save(tmp_path, phase=phase, phases=PHASES, committed=phase in COMMITTED)
