"""What can be known to be wrong before a rank starts; imports no torch."""

from pathlib import Path
from typing import Any

from triplane.checkpoint.errors import CheckpointError
from triplane.checkpoint.manifest import latest, read_manifest
from triplane.data.corpus import Corpus
from triplane.data.errors import DataError
from triplane.data.folder import tokenizer_model
from triplane.data.tokenizer import Tokenizer
from triplane.launcher.config import RunConfig

CHECKPOINTS = "checkpoints"
_FIXED = ("seed", "model", "data.seq_len", "data.document_mask", "data.shuffle_window")
"""Keys that a run may not change when it is resumed: they define the weights' shapes and the order of the data."""


def check_data(config: RunConfig) -> list[str]:
    """A corpus that is absent, damaged, or made with a tokenizer that does not fit the model."""
    folder = config.data.corpus
    try:
        corpora = [Corpus.of(config.data, split) for split in ("train", "validation")]
        tokenizer = Tokenizer(tokenizer_model(folder, corpora[0].tokenizer_digest, corpora[0].cache))
    except DataError as error:
        return [str(error)]
    problems = [
        f"{folder}: tokenized with {corpus.tokenizer_digest[:12]}, but its tokenizer.model is {tokenizer.digest[:12]}; "
        f"prepare the corpus again"
        for corpus in corpora
        if corpus.tokenizer_digest != tokenizer.digest
    ]
    if tokenizer.vocab_size != config.model.vocab_size:
        problems.append(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer of {folder} has {tokenizer.vocab_size}; "
            f"set model.vocab_size={tokenizer.vocab_size}"
        )
    return problems


def check_run_dir(config: RunConfig, record: dict[str, Any]) -> list[str]:
    """A run folder whose newest checkpoint belongs to another run."""
    newest = latest(Path(config.run_dir) / CHECKPOINTS)
    if newest is None:
        return []
    try:
        saved = read_manifest(newest).state["run"]
    except CheckpointError as error:
        return [str(error)]
    theirs, ours = _flatten(saved), _flatten(record)
    keys = sorted(theirs.keys() | ours.keys())
    differing = [key for key in keys if key.startswith(("corpus_digest", *_FIXED)) and theirs.get(key) != ours.get(key)]
    return [
        f"{newest} belongs to another run: {key} is {theirs.get(key)} there and {ours.get(key)} here; "
        f"set another run_dir, or delete {config.run_dir} to start afresh"
        for key in differing
    ]


def run_record(config: RunConfig) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it."""
    return {**config.model_dump(mode="json"), "corpus_digest": Corpus.of(config.data, "train").digest}


def config_of(record: dict[str, Any]) -> RunConfig:
    """The config in a `run_record`."""
    return RunConfig.model_validate({key: value for key, value in record.items() if key != "corpus_digest"})


def _flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
