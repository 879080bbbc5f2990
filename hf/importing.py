"""Turns a Hugging Face folder into a checkpoint of weights, once it is proven to compute what the folder does."""

from dataclasses import dataclass
from pathlib import Path

from triplane.checkpoint.kept_tokenizer import kept_tokenizer, write_tokenizer
from triplane.checkpoint.manifest import Manifest, write_manifest
from triplane.checkpoint.parent import parent_in
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.weights import CheckpointWeights, write_weights
from triplane.data.open_tokenizer import open_tokenizer
from triplane.data.tokenizer import Tokenizer
from triplane.hf.config import possible_windows
from triplane.hf.folder import FolderWeights, described
from triplane.hf.verify import ExportReport, probe, probe_logits, verify
from triplane.model.config import ModelConfig
from triplane.storage.errors import CheckpointError, TriplaneError
from triplane.storage.foreign import read_json, refuse_unprintable
from triplane.storage.publish import publishing, refuse_existing


@dataclass(frozen=True)
class Import:
    """The result of an import."""

    model: ModelConfig
    report: ExportReport
    no_tokenizer: str | None
    """Why the checkpoint holds no tokenizer, with which it could be sampled and exported."""
    left_out: list[str]
    """Beginnings of the names of tensors that it does not hold either."""


def import_hf(folder: Path, out: Path) -> Import:
    """Writes the checkpoint `out`, at step 0 and without moments, from the weights of `folder`; loads in every layout.

    `out` appears once its logits are those of `folder` as triplane and, where it is installed, transformers
    read it, past every number in config.json that could be a window. Before that every name, shape, dtype and value is
    checked. Raises CheckpointError or ModelError, and leaves nothing, if one is wrong or `out` exists. Holds one weight
    at a time while it writes, the whole model in fp32 while it compares.
    """
    refuse_unprintable(folder)
    refuse_existing(out)
    path = folder / "config.json"
    try:
        content = read_json(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; give a Hugging Face folder") from error
    family, config, context = described(folder)
    weights = FolderWeights(folder, family, config)
    weights.check_values()
    tokenizer, no_tokenizer = _tokenizer(folder, config)
    with publishing(out) as temporary:
        boxes, sizes = write_weights(weights, temporary)
        run = {
            "model": config.model_dump(mode="json"),
            "imported_from": str(folder),
            "parent": parent_in(folder, context).model_dump(),
        }
        if tokenizer is not None:
            sizes |= write_tokenizer(tokenizer, temporary)
            run["tokenizer"] = kept_tokenizer(tokenizer)
        progress = {"step": 0, "consumed_sequences": 0, "tokens_seen": 0, "validation_loss": None}
        write_manifest(temporary, Manifest({**progress, "run": run}, boxes, sizes))
        tokens_BS = probe(config, context, possible_windows(content))
        logits_TV = probe_logits(config, CheckpointWeights(Checkpoint(temporary)), tokens_BS)
        report = verify(folder, tokens_BS, logits_TV, tokenizer=None)
    return Import(config, report, no_tokenizer, weights.left_out)


def _tokenizer(folder: Path, config: ModelConfig) -> tuple[Tokenizer | None, str | None]:
    """The folder's tokenizer, or why there is none."""
    try:
        tokenizer = open_tokenizer(folder)
    except TriplaneError as error:
        return None, str(error)
    if tokenizer.vocab_size > config.vocab_size:
        return None, f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, its model {config.vocab_size}"
    return tokenizer, None
