"""`triplane evaluate`, `generate`, `export`, `import`, and `inspect` of a checkpoint: a whole model on one process."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from triplane.checkpoint.errors import CheckpointError
from triplane.checkpoint.export import export as export_weights
from triplane.checkpoint.import_hf import import_hf
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.weights import CheckpointWeights
from triplane.data.baseline import unigram_loss
from triplane.data.loader import SequenceDataset
from triplane.data.opening import find_tokenizer, open_sources, validation_plan
from triplane.data.tokenizer import Tokenizer
from triplane.launcher.config import RunConfig
from triplane.launcher.preflight import config_of, find_checkpoint
from triplane.launcher.toml import to_toml
from triplane.model.build import load_model
from triplane.model.generate import generate as generate_tokens
from triplane.model.generate import next_logits
from triplane.model.transformer import Transformer
from triplane.parallel.mesh import Axis
from triplane.training.batches import Feed
from triplane.training.evaluation import evaluate_model, validation_loss
from triplane.training.hardware import DTYPES


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint and the config of the run that wrote it."""

    checkpoint: Checkpoint
    config: RunConfig

    @classmethod
    def open(cls, path: str) -> "TrainedModel":
        """`path` is a run folder, of which the newest checkpoint is taken, or a checkpoint."""
        checkpoint = Checkpoint(find_checkpoint(path))
        if source := checkpoint.state["run"].get("imported_from"):
            raise CheckpointError(f"{path}: only the weights of {source}, without a run; train with checkpoint.initial")
        return cls(checkpoint, config_of(checkpoint.state["run"], checkpoint.folder))

    @property
    def tokenizer(self) -> Tokenizer:
        return find_tokenizer(self.config.data, Path(self.config.run_dir))

    def load(self) -> tuple[Transformer, torch.device]:
        """The whole model, fp32, on a GPU if there is one."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return load_model(self.config.model, CheckpointWeights(self.checkpoint), torch.float32).to(device), device


def evaluate(run: str, sequences: int | None) -> None:
    """Prints the validation loss, and what a unigram model has."""
    trained = TrainedModel.open(run)
    data = trained.config.data
    sources = open_sources(data, Path(trained.config.run_dir))
    plan = validation_plan(data, sources.validation)
    dataset = SequenceDataset(sources.validation, plan, data.document_mask)
    model, device = trained.load()
    feed = Feed(trained.config.training.micro_batch_size, 0, 1, Axis(), device)
    loss = validation_loss(evaluate_model(model), feed, dataset, sequences or len(dataset))
    unigram = unigram_loss(sources.train, sources.validation)
    _print(f"{trained.checkpoint.folder}: validation loss {loss:.4f} nats a token")
    _print(f"a unigram model of the same training data: {unigram:.4f}")


def generate(run: str, prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> None:
    """Prints the prompt and its continuation."""
    trained = TrainedModel.open(run)
    tokenizer = trained.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    model, _ = trained.load()
    added = generate_tokens(next_logits(model), ids, tokens, temperature, top_k, seed, tokenizer.eos_id)
    _print(prompt + tokenizer.decode(added))


def export(run: str, out: Path, dtype: str) -> None:
    """Writes and verifies a Hugging Face folder."""
    trained = TrainedModel.open(run)
    if dtype not in DTYPES:
        raise CheckpointError(f"--dtype is {dtype}; give one of {', '.join(DTYPES)}")
    state = trained.checkpoint.state
    provenance = {
        "run": trained.config.run_dir,
        "step": f"{state['step']:,}",
        "tokens seen": f"{state['tokens_seen']:,}",
        "corpora": ", ".join(
            f"{source.corpus} ({digest})"
            for source, digest in zip(trained.config.data.sources, state["run"]["corpus_digests"])
        ),
        "seed": str(trained.config.seed),
    }
    weights = CheckpointWeights(trained.checkpoint)
    config = trained.config
    report = export_weights(
        weights, config.model, config.data.seq_len, trained.tokenizer, out, DTYPES[dtype], provenance
    )
    _print(f"{out}: {report}")


def import_folder(folder: Path, out: Path) -> None:
    """Writes and verifies a checkpoint of a Hugging Face folder's weights."""
    imported = import_hf(folder, out)
    _print(f"{out}: {imported.report}")
    _print(f'To train on from it:\n\n[checkpoint]\ninitial = "{out}"\n')
    _print(f"[model]\n{to_toml(imported.model, 'model.')}")


def show_checkpoint(console: Console, path: str, verify: bool) -> None:
    """Prints what is in a checkpoint; `verify` reads all of it."""
    checkpoint = Checkpoint(find_checkpoint(path))
    state, run = checkpoint.state, checkpoint.state["run"]
    console.print(f"{checkpoint.folder}: step {state['step']:,}, {state['tokens_seen']:,} tokens seen", markup=False)
    if (loss := state.get("validation_loss")) is not None:
        console.print(f"validation loss {loss:.4f} nats a token", highlight=False)
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
        console.print("every byte is as it was written")


def _print(text: str) -> None:
    Console(highlight=False, soft_wrap=True).print(text, markup=False)
