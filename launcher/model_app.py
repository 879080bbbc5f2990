"""The commands on a trained model: its command line."""

from pathlib import Path
from typing import Annotated

import typer

from triplane.launcher.arguments import Average, Run, RunTokenizer
from triplane.launcher.help import Commands

model_app = typer.Typer(cls=Commands)


@model_app.command()
def evaluate(
    run: Run,
    sequences: Annotated[int | None, typer.Option(help="Validation sequences to read; all by default.", min=1)] = None,
    corpus: Annotated[list[str] | None, typer.Option(help="Corpora to read in place of the run's.")] = None,
    average: Average = False,
) -> None:
    """Measure the validation loss, and that of a unigram model as a baseline."""
    from triplane.launcher.model_commands import evaluate

    evaluate(run, sequences, corpus or [], average=average)


@model_app.command()
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    tokens: Annotated[int, typer.Option(help="Maximum number of tokens to add.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 always picks the most likely token.", min=0, metavar="T")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample from this many most likely tokens.", min=1)] = 50,
    seed: Annotated[
        int, typer.Option(help="The same seed gives the same text.", min=0, max=2**63 - 1, metavar="N")
    ] = 0,
    tokenizer: RunTokenizer = None,
    average: Average = False,
) -> None:
    """Continue a prompt."""
    from triplane.launcher.model_commands import generate

    generate(
        run,
        prompt,
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        tokenizer_path=tokenizer,
        average=average,
    )


@model_app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    dtype: Annotated[str, typer.Option(help="Type of the weights: bf16 or fp32.")] = "bf16",
    context: Annotated[
        int | None,
        typer.Option(
            help="Context length in tokens; by default the longest it was trained on.", min=1, show_default=False
        ),
    ] = None,
    tokenizer: RunTokenizer = None,
    average: Average = False,
) -> None:
    """Write a Hugging Face folder, published only once its logits equal ours."""
    from triplane.launcher.model_commands import export

    export(run, out, dtype=dtype, context=context, tokenizer_path=tokenizer, average=average)


@model_app.command()
def average(
    run: Run,
    out: Annotated[Path, typer.Argument(help="Checkpoint to write.")],
    last: Annotated[int, typer.Option(help="Checkpoints, the newest and those before it.", min=2, metavar="N")] = 5,
) -> None:
    """Write a checkpoint with the mean of the weights of a run's last checkpoints.

    It holds no moments: evaluate, export or sample it, or start a run from it by checkpoint.initial.
    """
    from triplane.launcher.model_commands import average

    average(run, out, last)


@model_app.command("import")
def import_(
    folder: Annotated[
        Path,
        typer.Argument(help="Hugging Face folder of one of 39 families, such as Llama, Qwen 3 or GPT-2."),
    ],
    out: Annotated[Path, typer.Argument(help="Checkpoint to write, for checkpoint.initial.")],
) -> None:
    """Write a checkpoint with a Hugging Face folder's weights, published only once its logits equal the folder's."""
    from triplane.launcher.model_commands import import_folder

    import_folder(folder, out)
