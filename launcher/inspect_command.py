"""`triplane inspect`: shows the contents of a path or of a batch."""

from pathlib import Path

from rich.console import Console

from triplane.config.checks import check
from triplane.config.load import load_config
from triplane.data.inspect import describe_batch
from triplane.data.opening import open_sources, training_plan
from triplane.launcher.corpus_commands import show_corpus
from triplane.storage.errors import ConfigError, counted


def inspect(path: str, documents: int, verify: bool) -> None:
    """Prints the contents of a corpus, a run's newest checkpoint, or a checkpoint."""
    console = Console(highlight=False, soft_wrap=True)
    if Path(path, "train").exists():
        show_corpus(console, Path(path), documents, verify)
        return
    from triplane.launcher.model_commands import show_checkpoint  # imports torch

    show_checkpoint(console, path, verify)


def inspect_data(path: Path, overrides: list[str], step: int) -> None:
    """Prints what a run that starts with this config reads in `step`."""
    config = load_config(path, overrides)
    if step > config.training.steps:
        raise ConfigError(
            f"{path}: --at {step:,}, but the run has {counted(config.training.steps, 'step')}; give one of them"
        )
    if problems := check(config, None):
        raise ConfigError("\n".join(problems))
    sources = open_sources(config.data, config.folder.corpora)
    plan = training_plan(config.data, sources.train, config.seed, config.folder.packing)
    size, first = config.training.batch_size(step), config.training.sequences(step - 1)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"step {step:,}: sequences {first:,} to {first + size:,} of {config.data.seq_len_at(first):,} tokens, seed "
        f"{config.seed}"
    )
    for source, digest, epochs in zip(config.data.sources, sources.digests, plan.epochs(first)):
        console.print(f"{source.corpus} ({digest[:12]}): {epochs:.4f} epochs before this step", markup=False)
    names = [source.corpus for source in config.data.sources]
    for line in describe_batch(
        plan,
        names=names,
        corpora=sources.train,
        tokenizer=sources.tokenizer,
        positions=range(first, first + size),
    ):
        console.print(line, markup=False)
