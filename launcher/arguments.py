"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated, Literal

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
Device = Annotated[Literal["auto", "cpu"], typer.Option(help="auto: GPUs if available; cpu: never GPUs.")]
JsonFile = Annotated[
    Path | None, typer.Option(help="Also write the result to this file as JSON.", dir_okay=False, show_default=False)
]
RunFolder = Annotated[Path, typer.Argument(help="Run folder.")]
RunFolders = Annotated[list[Path], typer.Argument(help="Run folder, or several to compare.")]
Run = Annotated[str, typer.Argument(help="Run folder, checkpoint folder (newest) or checkpoint; path or URL.")]
RunTokenizer = Annotated[
    Path | None,
    typer.Option(help="Tokenizer file or folder, if the checkpoint contains none.", show_default=False),
]
Average = Annotated[bool, typer.Option("--average", help="Take the average of the weights that the run kept.")]
Nodes = Annotated[str, typer.Option(help="Number of nodes, or a range such as 2-4 to use what is free.")]
RanksPerNode = Annotated[
    int | None,
    typer.Option(
        help="Ranks per node; by default its GPUs, or what the layout needs.",
        min=1,
        metavar="N",
        show_default=False,
    ),
]
JobTime = Annotated[
    str | None,
    typer.Option(
        help="Time limit of each job: 8:00:00, or 1-12 for 36 hours; by default the partition's.",
        show_default=False,
    ),
]
Partition = Annotated[str | None, typer.Option(help="Slurm partition; by default the cluster's.", show_default=False)]
Account = Annotated[str | None, typer.Option(help="Slurm account to charge.", show_default=False)]
Container = Annotated[
    str | None,
    typer.Option(
        help="Start the ranks in this image, which has triplane's dependencies; requires pyxis.",
        show_default=False,
    ),
]
Chain = Annotated[
    int | None,
    typer.Option(help="Queue this many jobs, each after the last, where jobs cannot requeue themselves.", min=1),
]
Gpus = Annotated[int | None, typer.Option(help="Number of GPUs; by default a run on CPUs.", min=1, show_default=False)]
GpuKind = Annotated[str | None, typer.Option(help="Kind of GPU, as `triplane plan` takes it.", show_default=False)]
Price = Annotated[
    float | None, typer.Option(help="Price of a GPU hour; a rough guess by default.", min=0, show_default=False)
]
Currency = Annotated[
    str | None, typer.Option(help="Currency of --price, by default USD.", metavar="CODE", show_default=False)
]
Initial = Annotated[
    str | None,
    typer.Option(help="Checkpoint or run whose network and weights the run starts from.", show_default=False),
]
ModelSize = Annotated[
    Literal["1m", "10m", "125m", "1b", "8b"] | None,
    typer.Option(
        help="1m, 10m, 125m, 1b or 8b parameters; by default what the text suffices for, on CPUs 1m for minutes.",
        metavar="SIZE",
        show_default=False,
    ),
]
