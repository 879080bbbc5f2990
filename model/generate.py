"""Continues a prompt, one token at a time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from triplane.model.batch import Batch
from triplane.model.transformer import Transformer
from triplane.storage.errors import ModelError

LENGTH_MULTIPLE = 64
"""Tokens are padded to a multiple of this: each length costs a GPU another plan, and the compiler another graph."""

NextLogits = Callable[[list[int]], Tensor]
"""Maps tokens to the scores of the next one, (V,): `next_logits(model)`, or `Engine.next_logits`."""


def generate(
    next_logits: NextLogits,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    eos_id: int | None,
    longest: int | None = None,
) -> Iterator[int]:
    """Returns the new tokens, up to and including `eos_id`; a pure function of its arguments.

    Each is drawn when it is asked for. Stops where the network would read more than `longest` tokens (None: any
    number).

    Temperature 0 takes the likeliest token; otherwise draws from the `top_k` likeliest (None: all).
    Keeps no cache: each token costs a forward pass over all previous ones, which suits samples during
    training, not serving. Raises ModelError on an empty prompt, or one over `longest`.
    """
    if not prompt:
        raise ModelError("The prompt has no tokens; give at least one, such as the beginning-of-sequence id.")
    if longest is not None and len(prompt) > longest:
        raise ModelError(f"The prompt has {len(prompt)} tokens, but the positions of this network end at {longest}.")
    most = max_new_tokens if longest is None else min(max_new_tokens, longest + 1 - len(prompt))

    def drawn() -> Iterator[int]:  # a generator would not refuse the prompt before the first token is asked for
        generator = torch.Generator().manual_seed(seed)
        tokens = list(prompt)
        for _ in range(most):
            tokens.append(_draw(next_logits(tokens).float().cpu(), temperature, top_k, generator))
            yield tokens[-1]
            if tokens[-1] == eos_id:
                break

    return drawn()


def next_logits(model: Transformer) -> NextLogits:
    """Returns the scoring function of a whole model on one device."""
    device = next(model.parameters()).device

    @torch.inference_mode()
    def score(tokens: list[int]) -> Tensor:
        batch = Batch.padded(tokens, LENGTH_MULTIPLE).to(device)
        return model.score(model.hidden(batch)[len(tokens) - 1])

    return score


def _draw(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    scores, tokens = logits_V.topk(min(top_k or len(logits_V), len(logits_V)))
    chosen = torch.multinomial((scores / temperature).softmax(dim=-1), 1, generator=generator)
    return int(tokens[chosen])
