"""A start records which code runs, wherever it came from."""

import subprocess
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import triplane
from triplane.launcher import facts
from triplane.slurm.snapshot import commit_of_code


def test_code_without_an_installed_package_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    assert facts._own_version().startswith("triplane ")
    monkeypatch.setattr(facts, "version", absent)
    assert facts._own_version() == ""


def test_the_commit_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot keeps its own; code that a repository around it does not hold has none."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    module = tmp_path / "jobs/1/code/triplane/__init__.py"
    monkeypatch.setattr(triplane, "__file__", str(module))
    monkeypatch.setattr("triplane.slurm.snapshot.__file__", str(module.parent / "slurm/snapshot.py"))
    (module.parent / "slurm").mkdir(parents=True)
    assert commit_of_code() is None
    (tmp_path / "jobs/1/git.txt").write_text("commit 0123456789abcdef\nA subject")
    assert commit_of_code() == "0123456789ab"
