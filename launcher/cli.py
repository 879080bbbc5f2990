"""The command line. Each command imports its code when it runs, so that `--help` does not load torch."""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import typer

from triplane.launcher.arguments import (
    Account,
    AllowDataChange,
    AllowFreshStart,
    Chain,
    Container,
    Currency,
    Device,
    GpuKind,
    Gpus,
    Initial,
    Inputs,
    JobTime,
    JsonFile,
    ModelSize,
    Nodes,
    Overrides,
    Partition,
    Price,
    RanksPerNode,
    RunFolder,
    RunFolders,
    TextField,
)
from triplane.launcher.help import HELP_NAMES, Commands, show_version
from triplane.launcher.inspect_app import inspect_app
from triplane.launcher.mistake import mistake_of
from triplane.launcher.model_app import model_app
from triplane.launcher.streams import prepare_streams
from triplane.storage.errors import BusyError, ConfigError
from triplane.training.exits import Exit, leave

# Plain text is readable on any terminal; the boxes that typer draws by default cut words at 60 columns.
app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": HELP_NAMES},
)
tokenizer_app = typer.Typer(cls=Commands, no_args_is_help=True, help="Train a tokenizer.")
app.add_typer(model_app)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(inspect_app, name="inspect")


@app.callback()
def triplane(
    version: Annotated[
        bool, typer.Option("--version", help="Show the versions of triplane, torch and Python.", callback=show_version)
    ] = False,
) -> None:
    """Pretrain decoder-only language models, on a laptop or a cluster."""


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="Model file to write.")],
    vocab_size: Annotated[
        int | None,
        typer.Option(help="Number of token ids; by default what suits the amount of text.", min=1, show_default=False),
    ] = None,
    text_field: TextField = "text",
) -> None:
    """Train a lossless sentencepiece tokenizer (BPE with byte fallback)."""
    from triplane.launcher.corpus_commands import train_tokenizer

    train_tokenizer(inputs, out, vocab_size=vocab_size, text_field=text_field)


@app.command()
def prepare(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="Corpus folder to write.")],
    tokenizer: Annotated[Path, typer.Option(help="Sentencepiece model, tokenizer.json, or the folder of one.")],
    validation_fraction: Annotated[float, typer.Option(help="Fraction of documents to hold out.", metavar="F")] = 0.02,
    shard_tokens: Annotated[int, typer.Option(help="Tokens per shard.", min=1)] = 16_777_216,
    processes: Annotated[
        int, typer.Option(help="Tokenizing processes; 0: one per CPU. Does not affect the result.", min=0)
    ] = 0,
    text_field: TextField = "text",
    dedupe: Annotated[
        Literal["none", "exact", "near"], typer.Option(help="Drop exact duplicates of documents, or near ones too.")
    ] = "none",
    max_document_mib: Annotated[int, typer.Option(help="Drop and report longer documents.", min=1, metavar="N")] = 256,
) -> None:
    """Tokenize text into a corpus: WebDataset shards with an index and a manifest.

    After an interruption, the same command resumes from the last finished shard.
    """
    from triplane.launcher.corpus_commands import prepare

    prepare(
        inputs,
        out,
        tokenizer,
        validation_fraction=validation_fraction,
        shard_tokens=shard_tokens,
        processes=processes or len(os.sched_getaffinity(0)),
        text_field=text_field,
        dedupe=dedupe,
        max_document_bytes=max_document_mib << 20,
    )


@app.command()
def init(
    corpus: Annotated[str, typer.Argument(help="Corpus folder written by `triplane prepare`, or its URL.")],
    size: ModelSize = None,
    initial: Initial = None,
    gpus: Gpus = None,
    gpu: GpuKind = None,
    out: Annotated[Path, typer.Option(help="Config to write.", dir_okay=False)] = Path("config.toml"),
) -> None:
    """Write a config that trains on a corpus, with a reason for each value."""
    from triplane.plan.init import init

    amount = init(corpus, out, size=size, initial=initial, gpus=gpus, kind=gpu)
    typer.echo(f"{out}: {amount}; start it by `triplane train {out}`")


@app.command()
def config(
    reference: Annotated[bool, typer.Option("--reference", help="Print a markdown table of every key.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print a JSON schema, for editors.")] = False,
) -> None:
    """Describe every key of a run's config: type, bounds, default, meaning."""
    if reference == schema:
        raise ConfigError("config: give one of --reference and --schema")
    from triplane.launcher.config_command import show_reference, show_schema

    show_reference() if reference else show_schema()


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="TOML file such as configs/quickstart.toml, or text to train on.")],
    overrides: Overrides = None,
    allow_data_change: AllowDataChange = False,
    allow_fresh_start: AllowFreshStart = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check the shapes of a step on one rank of each kind; no memory.")
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option(help="Ranks in the dry run; by default as many as the layout needs.", min=1, show_default=False),
    ] = None,
    device: Device = "auto",
) -> None:
    """Train, or resume the run in the config's run folder.

    Starts the ranks on this machine, or runs as one rank under torchrun or srun. Given a folder or file of text,
    it first makes a tokenizer, a corpus and a config, by commands that it shows.
    """
    if ranks is not None and not dry_run:
        raise ConfigError("--ranks requires --dry-run: the layout (parallel.dp and so on) sets the ranks of a run")
    if config.suffix != ".toml":
        from triplane.launcher.from_text import config_of_text, is_text

        config = config_of_text(config, overrides or []) if is_text(config) else config
    if dry_run:
        from triplane.launcher.dry_run import dry_run as run_dry

        run_dry(config, overrides or [], ranks)
        leave(Exit.OK)
    from triplane.launcher.train import train

    raise typer.Exit(
        train(
            config,
            overrides or [],
            allow_data_change=allow_data_change,
            allow_fresh_start=allow_fresh_start,
            on_cpu=device == "cpu",
        )
    )


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(help="TOML file of a run.")],
    choices: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=V1,V2",
            help="Values of keys such as optimizer.lr=1e-3,3e-3; every combination is a variant.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the variants' run folders, by default RUN_DIR/sweep.", show_default=False),
    ] = None,
    device: Device = "auto",
) -> None:
    """Train variants of a run one after another, and compare their losses.

    Started again, it resumes variants that were interrupted, and trains none that is done. Exits with 1 if one failed.
    """
    from triplane.launcher.sweep import sweep

    raise typer.Exit(sweep(config, choices, out, on_cpu=device == "cpu"))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="TOML file of a run.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs.", min=1)] = 8,
    gpu: Annotated[
        str, typer.Option(help="Kind of GPU: a100, h100, h200, b200, l40s, mi300x, or a TOML file.")
    ] = "h100",
    search: Annotated[
        bool, typer.Option("--search", help="Rank every layout that fits, and explain why others do not.")
    ] = False,
    price: Price = None,
    currency: Currency = None,
    time_limit_days: Annotated[
        float | None, typer.Option(help="Fail if the run needs longer.", min=0, metavar="N", show_default=False)
    ] = None,
    json: JsonFile = None,
) -> None:
    """Check a run without a GPU, and estimate its memory, time and cost.

    Exits with 1 if there is a problem.
    """
    from triplane.plan.command import plan

    leave(
        plan(
            config,
            overrides or [],
            gpus=gpus,
            gpu_name=gpu,
            searching=search,
            price=price,
            currency=currency,
            time_limit_days=time_limit_days,
            json_path=json,
        )
    )


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="TOML file such as configs/8b.toml.")],
    overrides: Overrides = None,
    nodes: Nodes = "1",
    ranks_per_node: RanksPerNode = None,
    time: JobTime = None,
    partition: Partition = None,
    account: Account = None,
    container: Container = None,
    chain: Chain = None,
    allow_data_change: AllowDataChange = False,
    allow_fresh_start: AllowFreshStart = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and print the batch script.")] = False,
) -> None:
    """Check a run, copy code, config and environment into its folder, and queue it with Slurm.

    The job saves and requeues itself before its time limit or a preemption, and requeues itself after a crash.
    """
    from triplane.slurm.batch_script import Request
    from triplane.slurm.submit import submit

    request = Request(
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        time=time,
        partition=partition,
        account=account,
        container=container,
        chain=chain,
        allow_data_change=allow_data_change,
        allow_fresh_start=allow_fresh_start,
    )
    submit(config, overrides or [], request, dry_run=dry_run)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="Run folder, or a folder that contains some.")] = Path("runs"),
    watch: Annotated[
        bool, typer.Option("--watch", help="Show a live table with speed and time left until all are done.")
    ] = False,
) -> None:
    """Show the state of runs: step, loss, checkpoint, restarts, job."""
    if watch:
        from triplane.launcher.monitor.watch import watch as watch_runs

        watch_runs(folder)
        return
    from triplane.launcher.monitor.jobs import status

    status(folder)


@app.command()
def board(
    folder: Annotated[Path, typer.Argument(help="Run folder, or a folder that contains some.")] = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 to serve other machines.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.", min=0, max=65535)] = 6006,
) -> None:
    """Start TensorBoard on runs: Time Series has the metrics, Text the config, HParams what differs."""
    from triplane.launcher.monitor.board import board

    raise typer.Exit(board(folder, host, port))


@app.command()
def report(
    runs: RunFolders,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write, by default RUN/report.html, or comparison.html.", show_default=False, dir_okay=False
        ),
    ] = None,
) -> None:
    """Write a self-contained HTML report: curves, throughput, faults, samples, config; or compare runs."""
    from triplane.launcher.monitor.report import report

    report(runs, out)


@app.command()
def logs(
    run: RunFolder,
    rank: Annotated[int | None, typer.Option(help="Show this rank's log; by default the job's.", min=0)] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Keep showing new output until Ctrl-C.")] = False,
) -> None:
    """Show the log of a run's job, or of one of its ranks."""
    from triplane.launcher.monitor.jobs import logs

    logs(run, rank, follow)


@app.command()
def cancel(run: RunFolder) -> None:
    """Cancel the job of a run; a run without a job saves and exits."""
    from triplane.launcher.monitor.jobs import cancel

    cancel(run)


@app.command()
def resume(run: RunFolder) -> None:
    """Queue the last job of a run again, with its code and config."""
    from triplane.slurm.jobs import resume

    resume(run)


@app.command("check-nodes")
def check_nodes(
    run: RunFolder,
    bad_nodes: Annotated[
        Path | None, typer.Option(help="Append the names of outlier nodes to this file.", show_default=False)
    ] = None,
) -> None:
    """Compare the nodes of a job before it trains: devices, bandwidth, disk, clock, code.

    Start one process per rank, for example `srun --ntasks-per-node 8 triplane check-nodes RUN`.
    Exits with 3 if a node is an outlier.
    """
    from triplane.slurm.node_check import check_nodes

    leave(check_nodes(run, bad_nodes))


@app.command()
def prove(
    config: Annotated[
        Path | None, typer.Argument(help="TOML file of a run, to prove its features and layout.", show_default=False)
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(help="Maximum number of ranks; by default 8 on a CPU, else all GPUs.", min=1, show_default=False),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Prove only a few layouts that cover every pair of features.")
    ] = False,
    reshard: Annotated[
        bool, typer.Option("--reshard", help="Save under each of several layouts, and resume under each other one.")
    ] = False,
    json: JsonFile = None,
) -> None:
    """Prove that every layout trains the same model as one process: loss, gradient norm and weights of 10 steps.

    Trains a small model with every feature under each layout that fits. Exits with 1 if one differs.
    """
    if reshard:
        if config is not None or quick:
            raise ConfigError("--reshard has its own model and layouts; give neither a config nor --quick")
        from triplane.prove.reshard import prove_resharding

        leave(prove_resharding(ranks, json))
    from triplane.prove.command import prove

    leave(prove(config, ranks=ranks, quick=quick, json_path=json))


def main() -> None:
    """Runs a command; a user's mistake prints lines on stderr, no traceback, and exits with 2, or 75 to try later."""
    prepare_streams()
    try:
        sys.exit(app(standalone_mode=False))
    except Exception as error:
        mistake = mistake_of(error)
        if mistake is None:  # as Python prints it, but without the regular exit that gloo's threads may abort
            traceback.print_exc()
            leave(Exit.FAILED)
        rank = os.environ.get("RANK", "")
        prefix = f"triplane (rank {rank})" if rank.isdecimal() and int(rank) > 0 else "triplane"
        for line in mistake.splitlines():
            print(f"{prefix}: {line}", file=sys.stderr)
        leave(Exit.TRY_AGAIN if isinstance(error, BusyError) else Exit.MISTAKE)
