"""Finds all problems of a run that can be known before a rank starts. Imports no torch.

`plan`, `train` and `submit` call it, once for all ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from triplane.config.checks import check
from triplane.config.preflight import check_run_dir, run_record
from triplane.data.open_tokenizer import open_tokenizer
from triplane.data.opening import Sources, open_sources
from triplane.data.sources import find_files
from triplane.hf.exportable import export_problems
from triplane.plan.amount import Amount
from triplane.plan.disk import disk_problems
from triplane.plan.estimate import work_of
from triplane.plan.memory import peak_memory
from triplane.plan.shares import pipeline
from triplane.storage.errors import TriplaneError, counted
from triplane.training.callbacks import tracking_problems
from triplane.training.config import RunConfig

_HIGH_LR = 0.1
_HIGH_INIT_STD = 1.0


@dataclass(frozen=True)
class Findings:
    """The result of `examine`."""

    problems: list[str]
    """Lines; a run with any does not start."""
    warnings: list[str]
    """Lines; the run starts anyway."""
    amount: Amount | None
    """None if it is unknown: a source is missing, or is tars that are not tokenized yet."""

    def notes(self) -> Iterator[str]:
        """Yields lines to show before the run starts."""
        if self.amount is not None:
            yield self.amount.describe()
        yield from (f"warning: {warning}" for warning in self.warnings)


def examine(
    config: RunConfig, ranks: int, *, allow_data_change: bool = False, allow_fresh_start: bool = False
) -> Findings:
    """Examines a run on `ranks` ranks. Reads files, writes none, and does not tokenize."""
    problems = [*check(config, ranks), *config.folder.problems(), *tracking_problems(config.tracking)]
    warnings = list(_odd_values(config))
    amount = tokenizer = None
    if any(source.is_tars for source in config.data.sources):
        problems += _tar_problems(config)
    else:
        if config.data.tokenizer is not None:
            warnings.append(f"data.tokenizer ({config.data.tokenizer}) is ignored: prepared corpora include their own")
        try:
            sources = open_sources(config.data, config.folder.corpora)
        except TriplaneError as error:
            problems += str(error).splitlines()
        else:
            if not list(config.data.problems()):
                amount = Amount.of(config, sources)
                warnings += [*amount.warnings(), *_held_out(config, sources)]
            tokenizer = sources.tokenizer
            # Comparing with the run folder makes sense only once model and data match.
            problems += list(_vocabulary(config, tokenizer.vocab_size, config.data.sources[0].corpus)) or (
                check_run_dir(
                    config,
                    run_record(config, sources),
                    allow_data_change=allow_data_change,
                    allow_fresh_start=allow_fresh_start,
                )
            )
    warnings += [f"it could not be exported: {problem}" for problem in export_problems(config.model, tokenizer)]
    problems += disk_problems(config)
    return Findings(problems, warnings, amount)


def memory_problem(config: RunConfig, ranks: int) -> str | None:
    """Returns why `ranks` ranks on this machine's CPUs cannot hold even the state of the run."""
    work = work_of(config, ranks)
    each = [peak_memory(work, rank, "cpu") for rank in pipeline(work)]
    state = sum(memory.weights + memory.gradients + memory.optimizer for memory in each) * ranks // len(each)
    available = psutil.virtual_memory().total
    if state <= available:
        return None
    return (
        f"weights, gradients and optimizer of {counted(ranks, 'rank')} need {state / 2**30:,.1f} GiB of memory, but "
        f"this machine has {available / 2**30:,.1f}; use a smaller model, or more machines"
    )


def _tar_problems(config: RunConfig) -> Iterator[str]:
    """Yields why tars cannot be tokenized when the run starts."""
    data = config.data
    tars = [source.corpus for source in data.sources if source.is_tars]
    if data.tokenizer is None:
        yield f"{tars[0]}: tars require data.tokenizer, the model file to tokenize them with"
    else:
        try:
            tokenizer = open_tokenizer(Path(data.tokenizer))
        except TriplaneError as error:
            yield f"data.tokenizer: {error}"
        else:
            yield from _vocabulary(config, tokenizer.vocab_size, data.tokenizer)
    try:
        find_files(tars, lambda rejection: None)
    except TriplaneError as error:
        yield from str(error).splitlines()


def _vocabulary(config: RunConfig, vocab_size: int, where: str) -> Iterator[str]:
    """Yields a mismatch of tokenizer and model. Imported weights may have more embeddings than there are tokens."""
    spare = config.model.vocab_size - vocab_size
    if spare < 0 or (spare and config.checkpoint.initial is None):
        yield (
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer of {where} has {vocab_size}; "
            f"set model.vocab_size={vocab_size}"
        )


def _held_out(config: RunConfig, sources: Sources) -> Iterator[str]:
    wanted = config.training.eval_sequences
    read = [corpus for source, corpus in zip(config.data.sources, sources.validation) if source.weight]
    held = sum(-(-corpus.tokens // config.data.seq_len) for corpus in read)
    if wanted > held:
        yield f"training.eval_sequences ({wanted}) is more than the {held} held out; validation reads all of them"


def _odd_values(config: RunConfig) -> Iterator[str]:
    for name, value, high, usual in (
        ("optimizer.lr", config.optimizer.lr, _HIGH_LR, "1e-5 to 1e-2"),
        ("model.init_std", config.model.init_std, _HIGH_INIT_STD, "0.02"),
    ):
        if value > high:
            yield f"{name} ({value:g}) is over {high:g}; {usual} is usual"
