"""How the command line shows its help and version. Imports no torch."""

import shutil
import sys
from typing import Any

import typer
from typer.core import TyperGroup

HELP_NAMES = ["-h", "--help"]
_COLUMNS = (40, 100)
"""The narrowest and widest help."""


class Commands(TyperGroup):
    """Treats `help COMMAND` as `COMMAND --help`, and shows help in the width of the terminal, with whole sentences."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        narrowest, widest = _COLUMNS
        ctx.terminal_width = max(narrowest, min(shutil.get_terminal_size().columns, widest))
        return super().parse_args(ctx, [*args[1:], "--help"] if args[:1] == ["help"] else args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        shown = [(name, command.help or "") for name, command in self.commands.items() if not command.hidden]
        with formatter.section("Commands"):
            formatter.write_dl([(name, text.partition("\n\n")[0].replace("\n", " ")) for name, text in shown])


class PathOrCommand(Commands):
    """Treats `inspect PATH` as `inspect path PATH`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "help", *HELP_NAMES):
            args = ["path", *args]
        return super().parse_args(ctx, args)


def show_version(wanted: bool) -> None:
    """Prints the versions and exits; the callback of `--version`."""
    if wanted:
        from importlib.metadata import version

        typer.echo(f"triplane {version('triplane')}, torch {version('torch')}, Python {sys.version.split()[0]}")
        raise typer.Exit
