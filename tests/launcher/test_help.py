"""Help, version and completion, on terminals of any width."""

import os
import pty
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer.main
from commands import triplane

from triplane.launcher.cli import app
from triplane.training.run_log import record_event

CONFIGS = Path(__file__).parents[2] / "configs"


def _commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the words of each command that help shows, and its first sentence."""
    for name, command in group.commands.items():
        if not command.hidden:
            yield (*path, name), " ".join(command.help.partition("\n\n")[0].split())
            yield from _commands(command, (*path, name)) if hasattr(command, "commands") else ()


COMMANDS = dict(_commands(typer.main.get_command(app)))


@pytest.mark.parametrize("columns", [40, 60])
def test_help_fits_narrow_terminals(columns: int, tmp_path: Path) -> None:
    whole = triplane("-h", cwd=tmp_path, COLUMNS=str(columns))
    for words, sentence in COMMANDS.items():
        if len(words) == 1:
            assert sentence in " ".join(whole.stdout.split())
        shown = triplane(*words, "-h", cwd=tmp_path, COLUMNS=str(columns))
        assert shown.returncode == 0, shown.stderr
        assert sentence in " ".join(shown.stdout.split())
        assert max(map(len, shown.stdout.splitlines())) <= columns and "\N{HORIZONTAL ELLIPSIS}" not in shown.stdout
    assert ("inspect", "data") in COMMANDS and ("train",) in COMMANDS


def test_help_is_asked_for_in_three_ways(tmp_path: Path) -> None:
    for words in ((), ("train",), ("inspect",), ("inspect", "data")):
        shown = {
            triplane(*line, cwd=tmp_path).stdout for line in ((*words, "-h"), (*words, "--help"), ("help", *words))
        }
        assert len(shown) == 1 and shown.pop().startswith(" ".join(("Usage: triplane", *words)))
    unknown = triplane("help", "trian", cwd=tmp_path)
    assert unknown.returncode == 2 and "No such command 'trian'" in unknown.stderr


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    shown = triplane("--version", cwd=tmp_path)
    assert shown.stdout.startswith(f"triplane {version('triplane')}, torch {version('torch')}, Python 3.")
    assert shown.returncode == 0 and shown.stdout.count("\n") == 1


def test_the_shell_completes_commands_and_options(tmp_path: Path) -> None:
    for line, found in (("triplane pre", ["prepare"]), ("triplane plan --gp", ["--gpus", "--gpu"])):
        words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        completed = triplane(cwd=tmp_path, _TRIPLANE_COMPLETE="complete_bash", **words)
        assert completed.stdout.split() == found, completed.stderr


def test_a_plan_keeps_words_and_figures_on_a_narrow_terminal(tmp_path: Path) -> None:
    for layout, options, columns in (("70b", ("--gpus", 256), 4), ("1b", ("--search",), 2)):
        arguments = (CONFIGS / f"{layout}.toml", *options, f"run_dir={tmp_path}/run")
        shown = [triplane("plan", *arguments, cwd=tmp_path, COLUMNS=width).stdout for width in ("40", "200")]
        assert "\N{HORIZONTAL ELLIPSIS}" not in shown[0]
        memory = [text.partition("peak GiB")[2].splitlines() for text in shown]
        for part in ("weights", "gradients", "optimizer", "activations", "temporary", "total"):
            narrow, wide = (next(line.split() for line in lines if line.startswith(f"{part} ")) for lines in memory)
            assert narrow == wide and len(narrow) == columns


def test_status_drops_the_columns_that_do_not_fit(tmp_path: Path) -> None:
    record_event(tmp_path, "start", 0, layout="dp 2", ranks=2, precision="fp32")
    (tmp_path / "config.toml").write_text("training = { steps = 100 }\n")
    child, master = pty.fork()
    if not child:
        os.environ["COLUMNS"] = "40"
        os.chdir(tmp_path)
        os.execv(sys.executable, [sys.executable, "-m", "triplane", "status", "."])
    os.waitpid(child, 0)
    lines = os.read(master, 1 << 16).decode().splitlines()
    assert lines[0].split() == ["run", "state", "step", "loss", "checkpoint"] and len(lines) == 2
    assert max(map(len, lines)) <= 40
    assert "restarts  last update" in triplane("status", ".", cwd=tmp_path, COLUMNS="40").stdout
