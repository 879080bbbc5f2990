"""Opens the corpora of a data config, and plans the order in which to read them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from triplane.data.cache import Cache
from triplane.data.config import DataConfig, SourceConfig
from triplane.data.corpus import Corpus
from triplane.data.cuts import Even
from triplane.data.packing import packing
from triplane.data.plan import Phase, StoredPlan, TrainingPlan
from triplane.data.raw import ensure_corpus
from triplane.data.tokenizer import Tokenizer
from triplane.storage.errors import DataError, TriplaneError


@dataclass(frozen=True)
class Sources:
    """The opened corpora of a config, in its order."""

    train: list[Corpus]
    validation: list[Corpus]
    tokenizer: Tokenizer

    @property
    def digests(self) -> list[str]:
        """Digest of the training split of each source."""
        return [corpus.digest for corpus in self.train]


def open_sources(config: DataConfig, tokenized: Path) -> Sources:
    """Opens all corpora; raises DataError with a line per source that is missing, damaged or differently tokenized.

    First tokenizes tars into folders in `tokenized` unless that is done. That may take hours, so call it before the
    ranks wait for each other.
    """
    problems: list[str] = []
    train: list[Corpus] = []
    validation: list[Corpus] = []
    tokenizers: list[Tokenizer] = []
    cache = Cache.of(config)
    for source in config.sources:
        try:
            folder = _corpus_folder(config, source, tokenized)
            splits = Corpus.open_splits(folder, cache)
            tokenizer = splits[0].open_tokenizer()
        except TriplaneError as error:
            problems.append(str(error))
            continue
        tokenizers.append(tokenizer)
        for corpora, corpus in zip((train, validation), splits):
            corpora.append(corpus)
            if corpus.tokenizer_digest != tokenizer.digest:
                problems.append(
                    f"{corpus.location}: tokenized with {corpus.tokenizer_digest[:12]} and not, like the other split, "
                    f"with {tokenizer.digest[:12]}; prepare the corpus again"
                )
        if tokenizer.digest != tokenizers[0].digest:
            problems.append(
                f"{folder}: its tokenizer is {tokenizer.digest[:12]}, but that of {config.sources[0].corpus} is "
                f"{tokenizers[0].digest[:12]}; prepare all sources with one tokenizer"
            )
    if problems:
        raise DataError("\n".join(problems))
    return Sources(train, validation, tokenizers[0])


def _corpus_folder(config: DataConfig, source: SourceConfig, tokenized: Path) -> str:
    if not source.is_tars:
        return source.corpus
    if config.tokenizer is None:
        raise DataError(f"{source.corpus}: tars need data.tokenizer, a sentencepiece model or tokenizer.json")
    processes = len(os.sched_getaffinity(0))
    return str(ensure_corpus([source.corpus], tokenized, Path(config.tokenizer), processes=processes))


def find_tokenizer(config: DataConfig, tokenized: Path) -> Tokenizer:
    """Opens the tokenizer that all sources share."""
    train, _ = Corpus.open_splits(_corpus_folder(config, config.sources[0], tokenized), Cache.of(config))
    return train.open_tokenizer()


def training_plan(config: DataConfig, corpora: Sequence[Corpus], seed: int, packed: Path) -> TrainingPlan:
    """Returns the order in which a run reads; plans of best-fit packing are stored in the folder `packed`."""
    if config.packing == "best_fit":
        run = config.run_tokens // config.seq_len
        cuts = [packing(corpus, config.seq_len, run=run, folder=packed) for corpus in corpora]
        phases = [
            Phase(start=start, weights=weights, cuts=cuts, seq_len=seq_len)
            for start, weights, seq_len in config.timeline()
        ]
    else:
        phases = [
            Phase(
                start=start,
                weights=weights,
                cuts=[Even(corpus.tokens, seq_len, config.run_tokens) for corpus in corpora],
                seq_len=seq_len,
            )
            for start, weights, seq_len in config.timeline()
        ]
    return TrainingPlan(phases, seed, window_runs=config.window_runs, lanes=config.lanes)


def validation_plan(config: DataConfig, corpora: Sequence[Corpus]) -> StoredPlan:
    """Returns the validation sequences of `corpora`, alternating between them."""
    return StoredPlan([Even(corpus.tokens, config.seq_len, config.run_tokens) for corpus in corpora], config.seq_len)
