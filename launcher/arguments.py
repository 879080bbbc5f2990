"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

Inputs = Annotated[
    list[str],
    typer.Argument(
        help="Folders, files, patterns or URLs of text, .jsonl, .parquet, .arrow or .tar, or `python-stdlib`.",
        show_default=False,
    ),
]
TextField = Annotated[str, typer.Option(help="JSON field or table column that holds the text.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.PATH=VALUE", help="Override values of the config file.", show_default=False),
]
AllowDataChange = Annotated[
    bool,
    typer.Option("--allow-data-change", help="Resume with a corpus that has changed; recorded in history.jsonl."),
]
AllowFreshStart = Annotated[
    bool,
    typer.Option("--allow-fresh-start", help="Start over if all checkpoints are damaged, instead of failing."),
]
JsonFile = Annotated[
    Path | None, typer.Option(help="Also write the result to this file as JSON.", dir_okay=False, show_default=False)
]
RunFolder = Annotated[Path, typer.Argument(help="Run folder.")]
Run = Annotated[str, typer.Argument(help="Run folder, checkpoint folder (newest) or checkpoint; path or URL.")]
RunTokenizer = Annotated[
    Path | None,
    typer.Option(help="Tokenizer file or folder, if the checkpoint contains none.", show_default=False),
]
