"""The command line. Each command imports what it needs when it runs, so that `--help` needs no torch."""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from triplane.storage.errors import BusyError, ConfigError, TriplaneError
from triplane.training.exits import Exit, leave

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
tokenizer_app = typer.Typer(no_args_is_help=True, help="Train a tokenizer.")
app.add_typer(tokenizer_app, name="tokenizer")


class _PathOrCommand(TyperGroup):
    """`inspect PATH` is `inspect path PATH`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["path", *args]
        return super().parse_args(ctx, args)


inspect_app = typer.Typer(
    cls=_PathOrCommand,
    no_args_is_help=True,
    subcommand_metavar="PATH | data CONFIG --at STEP",
    help="Show what is in a corpus, a run folder or a checkpoint, or in a batch (a folder named data is ./data).",
)
app.add_typer(inspect_app, name="inspect")

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
    typer.Argument(metavar="KEY.PATH=VALUE", help="Replace values of the file.", show_default=False),
]
AllowDataChange = Annotated[
    bool,
    typer.Option(
        "--allow-data-change", help="Go on with a corpus that is not what the run read; recorded in history.jsonl."
    ),
]
AllowFreshStart = Annotated[
    bool,
    typer.Option("--allow-fresh-start", help="Begin anew if all checkpoints of the run are damaged; else it refuses."),
]
JsonFile = Annotated[
    Path | None, typer.Option(help="Write what is printed here too, as JSON.", dir_okay=False, show_default=False)
]
RunFolder = Annotated[Path, typer.Argument(help="A run folder.")]
Run = Annotated[
    str, typer.Argument(help="A run folder or folder of checkpoints, of which the newest is taken, or one; or its URL.")
]
RunTokenizer = Annotated[
    Path | None,
    typer.Option(help="A tokenizer's file or folder, where the checkpoint holds none.", show_default=False),
]


@app.callback()
def triplane() -> None:
    """Pretrain decoder-only language models, on a laptop or a cluster."""


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="The model file to write.")],
    vocab_size: Annotated[int, typer.Option(help="Number of token ids.", min=1)] = 32_768,
    text_field: TextField = "text",
) -> None:
    """Train a sentencepiece tokenizer (BPE with byte fallback) that gives every text back exactly."""
    from triplane.launcher.corpus_commands import train_tokenizer

    train_tokenizer(inputs, out, vocab_size, text_field)


@app.command()
def prepare(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="The corpus folder to write.")],
    tokenizer: Annotated[Path, typer.Option(help="A sentencepiece model, a tokenizer.json, or their folder.")],
    validation_fraction: Annotated[float, typer.Option(help="Share of the documents held out.")] = 0.02,
    shard_tokens: Annotated[int, typer.Option(help="Tokens in a shard.", min=1)] = 16_777_216,
    processes: Annotated[int, typer.Option(help="Tokenizing processes, 0: one a CPU; same result.", min=0)] = 0,
    text_field: TextField = "text",
    dedupe: Annotated[
        Literal["none", "exact", "near"], typer.Option(help="Leave out copies of a document, or near copies too.")
    ] = "none",
    max_document_mib: Annotated[int, typer.Option(help="Leave out, and name, longer documents.", min=1)] = 256,
) -> None:
    """Tokenize text into a corpus: WebDataset shards with an index and a manifest.

    After an interruption, the same command goes on from the last finished shard.
    """
    from triplane.launcher.corpus_commands import prepare

    processes = processes or len(os.sched_getaffinity(0))
    prepare(
        inputs, out, tokenizer, validation_fraction, shard_tokens, processes, text_field, dedupe, max_document_mib << 20
    )


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A TOML file such as configs/quickstart.toml.")],
    overrides: Overrides = None,
    allow_data_change: AllowDataChange = False,
    allow_fresh_start: AllowFreshStart = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only run a step's shapes through one rank of each kind; takes no memory.")
    ] = False,
    ranks: Annotated[
        int | None, typer.Option(help="Of the dry run; what the layout needs by default.", min=1, show_default=False)
    ] = None,
    device: Annotated[
        Literal["auto", "cpu"], typer.Option(help="auto: GPUs if there are any; cpu: although there are.")
    ] = "auto",
) -> None:
    """Train, or go on with the run that the config's run folder holds.

    Starts its own ranks on this machine, or is one of the ranks that torchrun or srun started.
    """
    if dry_run:
        from triplane.launcher.dry_run import dry_run as run_dry

        run_dry(config, overrides or [], ranks)
        leave(Exit.OK)
    if ranks is not None:
        raise ConfigError("--ranks is for --dry-run: a run has the ranks that its layout needs, parallel.dp and so on")
    from triplane.launcher.train import train

    raise typer.Exit(train(config, overrides or [], allow_data_change, allow_fresh_start, device == "cpu"))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A run's TOML file.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="How many.", min=1)] = 8,
    gpu: Annotated[
        str, typer.Option(help="Their kind: a100, h100, h200, b200, l40s, mi300x, or a TOML file.")
    ] = "h100",
    search: Annotated[
        bool, typer.Option("--search", help="Rank every layout that fits, and say why others do not.")
    ] = False,
    price: Annotated[
        float | None, typer.Option(help="Of a GPU for an hour; a rough guess by default.", min=0, show_default=False)
    ] = None,
    time_limit_days: Annotated[
        float | None, typer.Option(help="What the run may take; more is a problem.", min=0, show_default=False)
    ] = None,
    json: JsonFile = None,
) -> None:
    """Say what is wrong with a run before a GPU is taken, and what it takes: memory, time, money. Needs no GPU.

    Exits with 1 if something is wrong.
    """
    from triplane.plan.command import plan

    leave(plan(config, overrides or [], gpus, gpu, search, price, time_limit_days, json))


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="A TOML file such as configs/8b.toml.")],
    overrides: Overrides = None,
    nodes: Annotated[str, typer.Option(help="A number, or a range such as 2-4: as many as are free.")] = "1",
    ranks_per_node: Annotated[
        int | None, typer.Option(help="By default a node's GPUs, or what the layout needs.", min=1, show_default=False)
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            help="Limit of each job: 8:00:00, or 1-12 for 36 hours; by default the partition's.", show_default=False
        ),
    ] = None,
    partition: Annotated[
        str | None, typer.Option(help="By default the cluster's default one.", show_default=False)
    ] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's account that is charged.", show_default=False)] = None,
    container: Annotated[
        str | None,
        typer.Option(
            help="Start the ranks in this image, which has triplane's dependencies; needs pyxis.", show_default=False
        ),
    ] = None,
    chain: Annotated[
        int | None,
        typer.Option(help="Queue this many jobs, one after another, where jobs may not requeue themselves.", min=1),
    ] = None,
    allow_data_change: AllowDataChange = False,
    allow_fresh_start: AllowFreshStart = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and print the batch script.")] = False,
) -> None:
    """Check a run, copy code, config and environment into its folder, and queue it with Slurm.

    Warned of its time limit or of a preemption, the job saves and goes back into the queue; so it does after a crash.
    """
    from triplane.slurm.batch_script import Request
    from triplane.slurm.submit import submit

    allowed = (allow_data_change, allow_fresh_start)
    request = Request(nodes, ranks_per_node, time, partition, account, container, chain, *allowed)
    submit(config, overrides or [], request, dry_run)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="A run folder, or a folder with some below it.")] = Path("runs"),
    watch: Annotated[
        bool, typer.Option("--watch", help="A live table with speed and time left, until all are done or Ctrl-C.")
    ] = False,
) -> None:
    """Show where runs stand: step, loss, checkpoint, restarts, job."""
    if watch:
        from triplane.launcher.monitor.watch import watch as watch_runs

        watch_runs(folder)
        return
    from triplane.launcher.monitor.jobs import status

    status(folder)


@app.command()
def board(
    folder: Annotated[Path, typer.Argument(help="A run folder, or a folder with some below it.")] = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to serve at; 0.0.0.0 for other machines.")] = "localhost",
    port: Annotated[int, typer.Option(help="0: a free one.", min=0, max=65535)] = 6006,
) -> None:
    """Start TensorBoard on runs: Custom Scalars groups what one looks at first, Text has the config."""
    from triplane.launcher.monitor.board import board

    raise typer.Exit(board(folder, host, port))


@app.command()
def report(
    run: RunFolder,
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write, by default RUN/report.html.", show_default=False, dir_okay=False),
    ] = None,
) -> None:
    """Write a page on a run that needs no network: curves, throughput, memory, faults, data, samples, config."""
    from triplane.launcher.monitor.report import report

    report(run, out)


@app.command()
def logs(
    run: RunFolder,
    rank: Annotated[int | None, typer.Option(help="Of this rank; by default that of the job.", min=0)] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on showing what is written, until Ctrl-C.")] = False,
) -> None:
    """Show the log of a run's job, or of one of its ranks."""
    from triplane.launcher.monitor.jobs import logs

    logs(run, rank, follow)


@app.command()
def cancel(run: RunFolder) -> None:
    """End the job of a run for good; a run without a job is asked to save and leave."""
    from triplane.launcher.monitor.jobs import cancel

    cancel(run)


@app.command()
def resume(run: RunFolder) -> None:
    """Queue the last job of a run again, with the code and config that it had."""
    from triplane.slurm.jobs import resume

    resume(run)


@app.command("check-nodes")
def check_nodes(
    run: RunFolder,
    bad_nodes: Annotated[
        Path | None, typer.Option(help="Append the names of nodes out of line here.", show_default=False)
    ] = None,
) -> None:
    """Compare the nodes of a job before it trains: devices, bandwidth, disk, clock, code.

    Started for each rank, as by `srun --ntasks-per-node 8 triplane check-nodes RUN`.
    Exits with 3 if a node is out of line.
    """
    from triplane.slurm.node_check import check_nodes

    leave(check_nodes(run, bad_nodes))


@app.command()
def prove(
    config: Annotated[
        Path | None, typer.Argument(help="A run's TOML file: prove its features and its layout.", show_default=False)
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Processes at most; 8 on a CPU, else the GPUs.", min=1, show_default=False)
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few layouts in which every pair of features occurs.")
    ] = False,
    reshard: Annotated[
        bool, typer.Option("--reshard", help="Save under each of some layouts, and train on under each other.")
    ] = False,
    json: JsonFile = None,
) -> None:
    """Show that every layout trains the model that one process trains: loss, gradient norm and weights of 10 steps.

    A small model with every feature is trained under each layout that fits. Exits with 1 if one differs.
    """
    if reshard:
        if config is not None or quick:
            raise ConfigError("--reshard has a model and layouts of its own; give neither a config nor --quick")
        from triplane.prove.reshard import prove_resharding

        leave(prove_resharding(ranks, json))
    from triplane.prove.command import prove

    leave(prove(config, ranks, quick, json))


@app.command()
def evaluate(
    run: Run,
    sequences: Annotated[int | None, typer.Option(help="Validation sequences to read; all by default.", min=1)] = None,
) -> None:
    """Measure the loss on the validation split, beside that of a unigram model."""
    from triplane.launcher.model_commands import evaluate

    evaluate(run, sequences)


@app.command()
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    tokens: Annotated[int, typer.Option(help="The most tokens to add.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from this many likeliest tokens.", min=1)] = 50,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    tokenizer: RunTokenizer = None,
) -> None:
    """Continue a prompt."""
    from triplane.launcher.model_commands import generate

    generate(run, prompt, tokens, temperature, top_k, seed, tokenizer)


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    dtype: Annotated[str, typer.Option(help="Of the weights: bf16 or fp32.")] = "bf16",
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens that clients may give it; by default the longest it was trained on.", min=1, show_default=False
        ),
    ] = None,
    tokenizer: RunTokenizer = None,
) -> None:
    """Write a Hugging Face folder, published only once its logits equal ours."""
    from triplane.launcher.model_commands import export

    export(run, out, dtype, context, tokenizer)


@app.command("import")
def import_(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A Hugging Face folder of a Llama, Mistral, Qwen2, or another family with their structure."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The checkpoint to write, for checkpoint.initial.")],
) -> None:
    """Make a checkpoint of a Hugging Face folder's weights, which appears only once its logits equal the folder's."""
    from triplane.launcher.model_commands import import_folder

    import_folder(folder, out)


@inspect_app.command("path", hidden=True)
def inspect(
    path: Annotated[str, typer.Argument(help="A corpus, a run folder or a checkpoint; for the latter a URL too.")],
    documents: Annotated[int, typer.Option(help="Corpus: show this many first documents.", min=0)] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare checksums.")] = False,
) -> None:
    """Show what is in a corpus or a checkpoint."""
    from triplane.launcher.inspect_command import inspect

    inspect(path, documents, verify)


@inspect_app.command("data")
def inspect_data(
    config: Annotated[Path, typer.Argument(help="A run's TOML file.")],
    overrides: Overrides = None,
    at: Annotated[int, typer.Option(help="The step, counted from 1.", min=1)] = 1,
) -> None:
    """Show every document that the global batch of a step holds, decoded."""
    from triplane.launcher.inspect_command import inspect_data

    inspect_data(config, overrides or [], at)


def main() -> None:
    """The entry point: a user's mistake is a line on stderr, no traceback, and exit code 2, or 75: try again later."""
    try:
        sys.exit(app(standalone_mode=False))
    except Exception as error:
        mistake = _mistake(error)
        if mistake is None:  # printed as Python would, but gloo's threads must not see the exit that follows
            traceback.print_exc()
            leave(Exit.FAILED)
        rank = os.environ.get("RANK", "0")
        prefix = "triplane" if rank == "0" else f"triplane (rank {rank})"
        for line in mistake.splitlines():
            print(f"{prefix}: {line}", file=sys.stderr)
        leave(Exit.TRY_AGAIN if isinstance(error, BusyError) else Exit.MISTAKE)


def _mistake(error: Exception) -> str | None:
    """What a user can mend, a line a problem; None if it is not the user's."""
    if isinstance(error, TriplaneError):
        return str(error)
    if isinstance(error, typer.TyperException):
        message = error.format_message()  # none where all of the help was shown
        return message and f"{message.rstrip('.')}; see --help"
    # A rank that loses a file has crashed, and may be started again.
    if isinstance(error, OSError) and error.filename is not None and sys.argv[1:2] != ["train"]:
        return f"{error.filename}: {error.strerror}"
    return None
