"""`triplane evaluate`, `generate`, `export`, `import`, and `inspect` for a checkpoint: a whole model in one process."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tomli_w
import torch
from rich.console import Console

from triplane.checkpoint.kept_tokenizer import read_tokenizer
from triplane.checkpoint.parent import Parent
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.weights import CheckpointWeights
from triplane.config.preflight import beside_config, config_of, find_checkpoint, model_of
from triplane.data.baseline import unigram_loss
from triplane.data.config import DataConfig
from triplane.data.open_tokenizer import open_tokenizer
from triplane.data.opening import find_tokenizer, open_sources
from triplane.data.tokenizer import Tokenizer
from triplane.hf.export import export as export_weights
from triplane.hf.importing import import_hf
from triplane.model.build import load_model
from triplane.model.config import ModelConfig
from triplane.model.count import count_parameters
from triplane.model.generate import generate as generate_tokens
from triplane.model.generate import next_logits
from triplane.model.transformer import Transformer
from triplane.parallel.mesh import Axis
from triplane.storage.errors import CheckpointError, ConfigError, TriplaneError
from triplane.training.config import RunConfig
from triplane.training.evaluation import TextLoss, evaluate_model, held_out, validation_losses
from triplane.training.feed import Feed
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

    @classmethod
    def open(cls, path: str) -> "TrainedModel":
        """Opens a checkpoint, or the newest of a run folder."""
        checkpoint = Checkpoint(find_checkpoint(path))
        run, where = checkpoint.state["run"], checkpoint.folder
        config = None if "imported_from" in run else config_of(run, where)
        return cls(checkpoint, model_of(run, where), config)

    def tokenizer(self, given: Path | None) -> Tokenizer:
        """Opens the `given` tokenizer, else the checkpoint's, else, for earlier versions, the corpus's."""
        where = self.checkpoint.folder
        kept = beside_config(self.checkpoint.state["run"], where).tokenizer
        if given is None and kept is not None:
            return read_tokenizer(where, kept)
        if given is not None:
            tokenizer = open_tokenizer(given)
            if kept is not None and kept.digest != tokenizer.digest:
                raise CheckpointError(
                    f"{given}: not the tokenizer that {where} was trained with; leave out --tokenizer"
                )
        elif self.config is None:
            raise CheckpointError(f"{where}: contains no tokenizer; give one by --tokenizer")
        else:
            try:
                tokenizer = find_tokenizer(self.config.data, self.config.folder.corpora)
            except TriplaneError as error:
                raise CheckpointError(f"{error}; or give the tokenizer by --tokenizer") from error
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
        return load_model(self.model, CheckpointWeights(self.checkpoint), DTYPES[precision]).to(device), device


def evaluate(run: str, sequences: int | None, corpora: list[str]) -> None:
    """Prints the validation loss, and a unigram model's, on `corpora` or else on those of the run."""
    trained = TrainedModel.open(run)
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
    run: str, prompt: str, *, tokens: int, temperature: float, top_k: int, seed: int, tokenizer_path: Path | None
) -> None:
    """Prints the prompt and its continuation."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"--prompt: not UTF-8 at character {error.start}; give text") from None
    trained = TrainedModel.open(run)
    tokenizer = trained.tokenizer(tokenizer_path)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    model, _ = trained.load()
    added = generate_tokens(
        next_logits(model),
        ids,
        max_new_tokens=tokens,
        longest=model.config.longest,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        eos_id=tokenizer.eos_id,
    )
    _print(prompt + tokenizer.decode(added))


def export(run: str, out: Path, *, dtype: str, context: int | None, tokenizer_path: Path | None) -> None:
    """Writes and verifies a Hugging Face folder."""
    trained = TrainedModel.open(run)
    if dtype not in DTYPES:
        raise CheckpointError(f"--dtype is {dtype}; give one of {', '.join(DTYPES)}")
    report = export_weights(
        CheckpointWeights(trained.checkpoint),
        trained.model,
        out,
        context=context or trained.context,
        tokenizer=trained.tokenizer(tokenizer_path),
        dtype=DTYPES[dtype],
        provenance=_provenance(trained),
        parent=trained.parent,
    )
    _print(f"{out}: {report}")


def _provenance(trained: TrainedModel) -> dict[str, str]:
    if trained.config is None:
        return {}
    state, config = trained.checkpoint.state, trained.config
    digests = beside_config(state["run"], trained.checkpoint.folder).corpus_digests
    return {
        "run": config.run_dir,
        "step": f"{state['step']:,}",
        "tokens seen": f"{state['tokens_seen']:,}",
        "corpora": ", ".join(f"{source.corpus} ({digest})" for source, digest in zip(config.data.sources, digests)),
        "seed": str(config.seed),
    }


def import_folder(folder: Path, out: Path) -> None:
    """Writes and verifies a checkpoint of a Hugging Face folder's weights."""
    imported = import_hf(folder, out)
    _print(f"{out}: {imported.report}")
    if imported.no_tokenizer:
        _print(f"without a tokenizer: {imported.no_tokenizer}")
    _print(f'To train from it:\n\n[checkpoint]\ninitial = "{out}"\n')
    _print(tomli_w.dumps({"model": imported.model.model_dump(exclude_none=True)}))


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
    Console(highlight=False, soft_wrap=True).print(text, markup=False)
