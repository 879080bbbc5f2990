"""`triplane evaluate`, `generate`, `export`, `import`, and `inspect` for a checkpoint: a whole model in one process."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import tomli_w
from rich.console import Console

from triplane.checkpoint.average import last_checkpoints, write_average
from triplane.checkpoint.kept_tokenizer import read_tokenizer
from triplane.checkpoint.reader import Checkpoint
from triplane.config.preflight import beside_config, config_of, find_checkpoint
from triplane.data.baseline import unigram_loss
from triplane.data.opening import open_sources
from triplane.hf.export import export as export_weights
from triplane.hf.importing import import_hf
from triplane.launcher.api import Sampling, load
from triplane.launcher.trained_model import TrainedModel
from triplane.parallel.mesh import Axis
from triplane.storage.errors import CheckpointError, ConfigError, TriplaneError
from triplane.training.evaluation import TextLoss, evaluate_model, held_out, validation_losses
from triplane.training.feed import Feed
from triplane.training.hardware import DTYPES


def evaluate(run: str, sequences: int | None, corpora: list[str], *, average: bool) -> None:
    """Prints the validation loss, and a unigram model's, on `corpora` or else on those of the run."""
    trained = TrainedModel.open(run, average=average)
    data = trained.data(corpora)
    config = trained.config
    try:
        sources = open_sources(data, Path(run) if config is None else config.folder.corpora)
    except TriplaneError as error:
        advice = "" if corpora else "; or give a corpus to read in its place by --corpus"
        raise CheckpointError(f"{error}{advice}") from error
    trained.check_tokenizer(sources.tokenizer, data.sources[0].corpus)
    validation = held_out(data, sources.validation)
    model, device = trained.load()
    micro_batch_size = 1 if config is None else config.training.micro_batch_size
    feed = Feed(micro_batch_size=micro_batch_size, num_workers=0, local_ranks=1, dp=Axis(), device=device)
    every = sum(len(source.dataset) for source in validation)
    loss, by_source = validation_losses(evaluate_model(model), feed, validation, sequences=sequences or every)
    read = [number for number, source in enumerate(validation) if source.counts]
    unigram = unigram_loss(*([corpora[number] for number in read] for corpora in (sources.train, sources.validation)))
    _print(f"{trained.checkpoint.folder}: validation loss {_shown(loss)}")
    for name, its_loss in by_source.items() if len(by_source) > 1 else ():
        _print(f"  {name}: {_shown(its_loss)}")
    _print(f"unigram model of the same training data: {unigram:.4f} nats per token")


def _shown(loss: TextLoss) -> str:
    return f"{loss.nats:.4f} nats per token, {loss.bits_per_byte:.4f} bits per byte"


def generate(
    run: str,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    tokenizer_path: Path | None,
    average: bool,
) -> None:
    """Prints the prompt and its continuation, on a terminal as it is sampled."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"--prompt: not UTF-8 at character {error.start}; give text") from None
    loaded = load(run, tokenizer=tokenizer_path, average=average)
    options: Sampling = {"tokens": tokens, "temperature": temperature, "top_k": top_k, "seed": seed}
    console = _console()
    if not console.is_terminal:
        _print(prompt + loaded.generate(prompt, **options))
        return
    for piece in chain([prompt], loaded.stream(prompt, **options)):
        console.print(piece, markup=False, end="")
    console.print()


def export(run: str, out: Path, *, dtype: str, context: int | None, tokenizer_path: Path | None, average: bool) -> None:
    """Writes and verifies a Hugging Face folder."""
    trained = TrainedModel.open(run, average=average)
    if dtype not in DTYPES:
        raise CheckpointError(f"--dtype is {dtype}; give one of {', '.join(DTYPES)}")
    report = export_weights(
        trained.weights,
        trained.model,
        out,
        context=context or trained.context,
        tokenizer=trained.tokenizer(tokenizer_path),
        dtype=DTYPES[dtype],
        provenance=_provenance(trained) | ({"weights": "exponential average"} if average else {}),
        parent=trained.parent,
    )
    _print(f"{out}: {report}")


def _provenance(trained: TrainedModel) -> dict[str, str]:
    if trained.config is None:
        return {}
    state, config = trained.checkpoint.state, trained.config
    digests = beside_config(state["run"], trained.checkpoint.folder).corpus_digests
    mean = {"weights": _mean_of(steps)} if (steps := state.get("mean_of")) else {}
    return {
        "run": config.run_dir,
        "step": f"{state['step']:,}",
        **mean,
        "tokens seen": f"{state['tokens_seen']:,}",
        "corpora": ", ".join(f"{source.corpus} ({digest})" for source, digest in zip(config.data.sources, digests)),
        "seed": str(config.seed),
    }


def average(run: str, out: Path, last: int) -> None:
    """Writes a checkpoint of the mean weights of the last ones."""
    newest = find_checkpoint(run)
    kept = beside_config(Checkpoint(newest).state["run"], newest).tokenizer
    steps = write_average(last_checkpoints(newest, last), out, kept)
    _print(f"{out}: {_mean_of(steps)}")


def _mean_of(steps: Sequence[int]) -> str:
    return f"mean of steps {', '.join(f'{step:,}' for step in steps)}"


def import_folder(folder: Path, out: Path) -> None:
    """Writes and verifies a checkpoint of a Hugging Face folder's weights."""
    imported = import_hf(folder, out)
    _print(f"{out}: {imported.report}")
    if imported.no_tokenizer:
        _print(f"without a tokenizer: {imported.no_tokenizer}")
    for names in imported.left_out:
        _print(f"without {names}*, which is no part of the network here")
    _print(f'To train from it:\n\n[checkpoint]\ninitial = "{out}"\n')
    _print(tomli_w.dumps({"model": imported.model.as_tables()}))


def show_checkpoint(console: Console, path: str, verify: bool) -> None:
    """Prints the contents of a checkpoint; `verify` reads all of it."""
    checkpoint = Checkpoint(find_checkpoint(path))
    state, run = checkpoint.state, checkpoint.state["run"]
    console.print(f"{checkpoint.folder}: step {state['step']:,}, {state['tokens_seen']:,} tokens seen", markup=False)
    if (loss := state.get("validation_loss")) is not None:
        console.print(f"validation loss {loss:.4f} nats per token", highlight=False)
    if source := run.get("imported_from"):
        written_by = f"imported from {source}"
    else:
        written_by = f"written by {config_of(run, checkpoint.folder).parallel.describe()}"
    console.print(f"{written_by}; loads into every layout", markup=False)
    if steps := state.get("mean_of"):
        console.print(f"weights: {_mean_of(steps)}", highlight=False)
    kinds: dict[str, int] = {}
    for key in checkpoint.shapes:
        kind = key.partition("/")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    console.print(", ".join(f"{count} tensors {kind}" for kind, count in kinds.items()), highlight=False)
    console.print(f"{checkpoint.bytes / 2**20:.1f} MiB", highlight=False)
    if verify:
        checkpoint.verify()
        console.print("all checksums of tensors match")
        if kept := beside_config(run, checkpoint.folder).tokenizer:
            read_tokenizer(checkpoint.folder, kept)
            console.print("the tokenizer is unchanged")


def _print(text: str) -> None:
    _console().print(text, markup=False)


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, emoji=False)
