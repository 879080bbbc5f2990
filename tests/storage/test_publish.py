"""A command removes the leftovers of a killed one beside its target, and keeps the files of a running one."""

import subprocess
import sys
from pathlib import Path

import pytest

from triplane.storage.errors import CheckpointError
from triplane.storage.publish import publishing

WRITE = """
import sys
from pathlib import Path
from triplane.storage.publish import publishing
with publishing(Path(sys.argv[1])) as folder:
    (folder / "weights").write_bytes(bytes(1000))
    print("written", flush=True)
    sys.stdin.readline()
"""


def _writer(out: Path) -> subprocess.Popen[str]:
    """A command that has written its files and waits for a line."""
    command = [sys.executable, "-c", WRITE, str(out)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    return process


def test_the_next_command_removes_what_a_killed_one_left_and_nothing_of_a_running_one(tmp_path: Path) -> None:
    killed, running = _writer(tmp_path / "killed"), _writer(tmp_path / "running")
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.iterdir())) == 2
    with publishing(tmp_path / "third") as folder:
        assert len(list(tmp_path.iterdir())) == 2
        (folder / "weights").write_bytes(b"")
    running.communicate("end\n")
    assert running.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["running", "third"]


def test_a_leftover_that_cannot_be_removed_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".other.triplane-partial").write_text("no folder, so it cannot be locked")
    with publishing(tmp_path / "out") as folder:
        (folder / "weights").write_bytes(b"")
    assert "left by a command that was killed; it could not be removed: " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.triplane-partial", "out"]


def test_folders_that_were_made_for_a_failure_go_and_those_in_use_stay(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for out in ("mine/a/b/out", "new/out", "mine/out"):
        with pytest.raises(ZeroDivisionError), publishing(tmp_path / out):
            assert 1 / 0
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    with pytest.raises(ZeroDivisionError), publishing(tmp_path / "new/below/out"):
        assert (tmp_path / "new/theirs").write_text("") / 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["theirs"]


def test_a_place_where_nothing_can_be_written_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for out, reason in (("file/out", "cannot be written"), ("link", "exists"), ("x" * 300, "File name too long")):
        with pytest.raises(CheckpointError, match=reason), publishing(tmp_path / out):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
