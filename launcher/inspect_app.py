"""The command line of `triplane inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from triplane.launcher.arguments import Overrides
from triplane.launcher.help import PathOrCommand

inspect_app = typer.Typer(
    cls=PathOrCommand,
    no_args_is_help=True,
    subcommand_metavar="PATH | data CONFIG --at STEP",
    help="Show a corpus, a run folder, a checkpoint, or a batch (write ./data for a folder named data).",
)


@inspect_app.command("path", hidden=True)
def inspect(
    path: Annotated[str, typer.Argument(help="Corpus, run folder or checkpoint; a path, or a checkpoint's URL.")],
    documents: Annotated[int, typer.Option(help="Corpus: also show this many documents.", min=0)] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare checksums.")] = False,
) -> None:
    """Show the contents of a corpus or a checkpoint."""
    from triplane.launcher.inspect_command import inspect

    inspect(path, documents, verify)


@inspect_app.command("data")
def inspect_data(
    config: Annotated[Path, typer.Argument(help="TOML file of a run.")],
    overrides: Overrides = None,
    at: Annotated[int, typer.Option(help="Step, counted from 1.", min=1)] = 1,
) -> None:
    """Show every document in the global batch of a step, decoded."""
    from triplane.launcher.inspect_command import inspect_data

    inspect_data(config, overrides or [], at)
