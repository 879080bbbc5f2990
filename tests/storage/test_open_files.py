"""The limit of open files is raised where it may be."""

import resource

import pytest

from triplane.storage.open_files import open_files_problem

ENDLESS = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("limits", "raised", "refused"),
    [
        ((256, 4096), (2096, 4096), False),
        ((256, ENDLESS), (2096, ENDLESS), False),
        ((256, 1024), None, True),
        ((ENDLESS, ENDLESS), None, False),
        ((4096, 4096), None, False),
    ],
)
def test_a_limit_is_raised_or_refused(
    limits: tuple[int, int], raised: tuple[int, int] | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: found.append(pair))
    assert (open_files_problem(2096) is not None) == refused
    assert found == ([] if raised is None else [raised])
