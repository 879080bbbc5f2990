"""The Python interface, `import triplane`: a trained model that generates and measures."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypedDict, Unpack

import torch

from triplane.data.tokenizer import Tokenizer
from triplane.launcher.trained_model import TrainedModel
from triplane.model.batch import Batch
from triplane.model.generate import generate, next_logits
from triplane.model.transformer import Transformer
from triplane.storage.errors import ModelError
from triplane.training.evaluation import TextLoss, evaluate_model


class Sampling(TypedDict, total=False):
    """The options of `LoadedModel.sample`."""

    tokens: int
    temperature: float
    top_k: int | None
    seed: int


@dataclass(frozen=True)
class LoadedModel:
    """A whole model on one device, with its tokenizer."""

    model: Transformer
    tokenizer: Tokenizer
    context: int
    """Tokens in the longest sequences that it was trained on."""

    def sample(
        self, prompt: str, *, tokens: int = 128, temperature: float = 0.8, top_k: int | None = 50, seed: int = 0
    ) -> Iterator[int]:
        """Yields at most `tokens` ids that follow the prompt, as they are drawn; the same for the same arguments."""
        return generate(
            next_logits(self.model),
            [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)],
            max_new_tokens=tokens,
            longest=self.model.config.longest,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            eos_id=self.tokenizer.eos_id,
        )

    def generate(self, prompt: str, **options: Unpack[Sampling]) -> str:
        """Returns the text of what `sample` yields."""
        return self.tokenizer.decode(list(self.sample(prompt, **options)))

    def stream(self, prompt: str, **options: Unpack[Sampling]) -> Iterator[str]:
        """Yields the text as it is drawn."""
        return self.tokenizer.decode_each(self.sample(prompt, **options))

    def loss(self, text: str) -> TextLoss:
        """Returns the loss on a text, read as a document; a longer one than the context in parts of its length."""
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(text)]
        targets = len(ids) - 1
        if not targets:
            raise ModelError("The text has no tokens, so it has no loss.")
        device = next(self.model.parameters()).device
        batches = [
            Batch.build(torch.tensor(ids[start:end]), torch.tensor(ids[start + 1 : end + 1]), (0, end - start))
            for start, end in pairwise([*range(0, targets, self.context), targets])
        ]
        loss = evaluate_model(self.model)([batch.to(device) for batch in batches])
        return TextLoss(float(loss.cross_entropy), targets, len(text.encode()) / targets)


def load(checkpoint: str | Path, *, tokenizer: str | Path | None = None, average: bool = False) -> LoadedModel:
    """Loads a checkpoint, or the newest of a run folder, on a GPU if there is one; a path or URL.

    `tokenizer` is a file or folder, for a checkpoint that has none. `average` takes the average of the weights.
    """
    trained = TrainedModel.open(str(checkpoint), average=average)
    opened = trained.tokenizer(None if tokenizer is None else Path(tokenizer))
    return LoadedModel(trained.load()[0], opened, trained.context)
