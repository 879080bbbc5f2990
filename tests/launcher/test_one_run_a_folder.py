"""Two runs in one folder would write over each other: the second is refused, where the file system can tell."""

import errno
import fcntl
import os
from multiprocessing import get_context
from pathlib import Path

import pytest

from triplane.launcher.train import alone_in
from triplane.storage.errors import BusyError
from triplane.storage.locks import locked_folder


def _refused(folder: Path) -> None:
    with (
        pytest.raises(BusyError, match=r"run: in use by another process: wait for it to end"),
        alone_in(folder),
    ):
        pass


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with locked_folder(run, wait=False):
        other = get_context("fork").Process(target=_refused, args=(run,))
        other.start()
        other.join()
    assert other.exitcode == 0
    with alone_in(run):
        assert run.is_dir()


def test_without_locks_a_run_starts_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with alone_in(tmp_path):
        assert capsys.readouterr().err.startswith(f"triplane: {tmp_path}: this file system has no locks: make sure")
