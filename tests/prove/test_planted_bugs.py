"""The proof fails where an axis or a part is broken."""

from collections.abc import Callable
from typing import Any

import pytest
from planted_bugs import BUGS

from triplane.prove.command import Result


@pytest.mark.parametrize(
    ("bug", "layout"), BUGS, ids=[f"{bug.__name__[1:]}-{number}" for number, (bug, _) in enumerate(BUGS)]
)
def test_a_planted_bug_is_caught(
    bug: Callable[[pytest.MonkeyPatch], None],
    layout: dict[str, Any],
    proven: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bug(monkeypatch)
    result = proven(**layout)
    assert not result.passed
    assert result.difference is None or result.difference.largest > 5e-6
