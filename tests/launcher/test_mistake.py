"""Whose fault an error is."""

import errno
import os

import pytest

from triplane.launcher.mistake import mistake_of


def test_a_full_disk_of_another_file_is_not_blamed_on_the_output(capfd: pytest.CaptureFixture) -> None:
    with open("/dev/full", "w") as full:
        saved = os.dup(1)
        os.dup2(full.fileno(), 1)
        blamed = mistake_of(OSError(errno.ENOSPC, "of another file"))
        os.dup2(saved, 1)
        os.close(saved)
    assert blamed is mistake_of(OSError(errno.ENOSPC, "of another file")) is None
    assert capfd.readouterr() == ("", "")
