"""A checkpoint as the commands that use a whole model in one process open it."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from triplane.checkpoint.kept_tokenizer import TOKENIZER_OPTION, read_tokenizer
from triplane.checkpoint.parent import Parent
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.weights import CheckpointWeights
from triplane.config.preflight import beside_config, config_of, find_checkpoint, model_of
from triplane.data.config import DataConfig
from triplane.data.open_tokenizer import open_tokenizer
from triplane.data.opening import find_tokenizer
from triplane.data.tokenizer import Tokenizer
from triplane.model.build import load_model
from triplane.model.config import ModelConfig
from triplane.model.count import count_parameters
from triplane.model.transformer import Transformer
from triplane.storage.errors import CheckpointError, TriplaneError
from triplane.training.config import RunConfig
from triplane.training.hardware import DTYPES, room_for_weights

_LONGEST_EVALUATED = 2048
"""Tokens of the sequences in which an imported model is evaluated, if its context is longer."""


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint, with its model and the config of the run that wrote it."""

    checkpoint: Checkpoint
    model: ModelConfig
    config: RunConfig | None
    """None for an imported model."""
    weights: CheckpointWeights

    @classmethod
    def open(cls, path: str, *, average: bool = False) -> "TrainedModel":
        """Opens a checkpoint, or the newest of a run folder; with `average` in place of the weights their average."""
        checkpoint = Checkpoint(find_checkpoint(path))
        run, where = checkpoint.state["run"], checkpoint.folder
        config = None if "imported_from" in run else config_of(run, where)
        return cls(checkpoint, model_of(run, where), config, CheckpointWeights(checkpoint, average=average))

    def tokenizer(self, given: Path | None) -> Tokenizer:
        """Opens the `given` tokenizer, else the checkpoint's, else, for earlier versions, the corpus's."""
        where = self.checkpoint.folder
        kept = beside_config(self.checkpoint.state["run"], where).tokenizer
        if given is None and kept is not None:
            return read_tokenizer(where, kept)
        if given is not None:
            tokenizer = open_tokenizer(given)
            if kept is not None and kept.digest != tokenizer.digest:
                raise CheckpointError(f"{given}: not the tokenizer that {where} was trained with; leave it out")
        elif self.config is None:
            raise CheckpointError(f"{where}: contains no tokenizer; give one by {TOKENIZER_OPTION}")
        else:
            try:
                tokenizer = find_tokenizer(self.config.data, self.config.folder.corpora)
            except TriplaneError as error:
                raise CheckpointError(f"{error}; or give the tokenizer by {TOKENIZER_OPTION}") from error
        if (size := tokenizer.vocab_size) > self.model.vocab_size:
            raise CheckpointError(f"{where}: of {self.model.vocab_size} tokens, but the tokenizer has {size}")
        return tokenizer

    def check_tokenizer(self, tokenizer: Tokenizer, corpus: str) -> None:
        """Refuses a corpus of tokens that the model does not know."""
        kept = beside_config(self.checkpoint.state["run"], self.checkpoint.folder).tokenizer
        if kept is not None and kept.digest != tokenizer.digest:
            raise CheckpointError(
                f"{corpus}: tokenized with {tokenizer.digest[:12]}, but {self.checkpoint.folder} reads "
                f"{kept.digest[:12]}; prepare the corpus with its tokenizer"
            )
        if tokenizer.vocab_size > self.model.vocab_size:
            raise CheckpointError(
                f"{corpus}: of {tokenizer.vocab_size} tokens, but the model has {self.model.vocab_size}; prepare the "
                f"corpus with its tokenizer"
            )

    def data(self, corpora: list[str]) -> DataConfig:
        """Returns the run's data, or `corpora` in sequences as long as its own."""
        if not corpora:
            if self.config is None:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: an imported model has no corpora of its own; give some by --corpus"
                )
            return self.config.data
        seq_len = min(self.context, _LONGEST_EVALUATED) if self.config is None else self.config.data.seq_len
        return DataConfig.model_validate({"sources": [{"corpus": corpus} for corpus in corpora], "seq_len": seq_len})

    @property
    def parent(self) -> Parent | None:
        """The model whose weights it started from."""
        return beside_config(self.checkpoint.state["run"], self.checkpoint.folder).parent

    @property
    def context(self) -> int:
        """Tokens in the longest sequences that it was trained on, or its parent's context if that is longer."""
        lengths = [self.parent.context] if self.parent and self.parent.context else []
        if self.config is not None:
            consumed = self.checkpoint.state["consumed_sequences"]
            data = self.config.data
            lengths += [data.seq_len, *(n for start, _, n in data.timeline() if start < consumed)]
        return max(lengths)

    def load(self) -> tuple[Transformer, torch.device]:
        """Loads the whole model, on a GPU and in fp32 if it fits."""
        free_bytes = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
        kind, precision, reason = room_for_weights(count_parameters(self.model), free_bytes)
        if reason is not None:
            print(f"triplane: loading {self.checkpoint.folder} {reason}", file=sys.stderr)
        device = torch.device(kind)
        return load_model(self.model, self.weights, DTYPES[precision]).to(device), device
