"""Generation: greedy as transformers does it, sampling reproducible and within its choices."""

from typing import Any

import pytest
import torch
from small_models import llama, random_weights, small_config, small_model

from triplane.model.generate import generate, next_logits
from triplane.model.transformer import Transformer
from triplane.storage.errors import ModelError

CONFIG = small_config(tie_embeddings=True)
PROMPT = [1, 17, 42, 5]


def sample(prompt: list[int] = PROMPT, **changes: Any) -> list[int]:
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_k": None, "seed": 0, "eos_id": None}
    return list(generate(next_logits(small_model(CONFIG)), prompt, **(options | changes)))


def test_greedy_is_transformers_greedy() -> None:
    reference = llama(CONFIG, random_weights(CONFIG))
    theirs = reference.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert sample(temperature=0) == theirs[0, len(PROMPT) :].tolist()


def test_sampling_is_a_function_of_the_seed() -> None:
    draws = [tuple(sample(seed=seed)) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_top_k_is_respected() -> None:
    assert sample(top_k=1) == sample(temperature=0)
    first = {sample(max_new_tokens=1, top_k=3, temperature=5.0, seed=seed)[0] for seed in range(60)}
    with torch.no_grad():
        likeliest = llama(CONFIG, random_weights(CONFIG))(torch.tensor([PROMPT])).logits[0, -1].topk(3).indices
    assert first == set(likeliest.tolist())


def test_sampling_follows_the_distribution() -> None:
    with torch.no_grad():
        logits_V = llama(CONFIG, random_weights(CONFIG))(torch.tensor([PROMPT])).logits[0, -1]
    likeliest = int(logits_V.argmax())
    scores, n = next_logits(small_model(CONFIG)), 500
    options: dict[str, Any] = {"max_new_tokens": 1, "temperature": 0.5, "top_k": None, "eos_id": None}
    hits = sum(list(generate(scores, PROMPT, seed=seed, **options)) == [likeliest] for seed in range(n))
    expected = (logits_V / 0.5).softmax(dim=-1)[likeliest].item()
    assert hits / n == pytest.approx(expected, abs=4 * (expected * (1 - expected) / n) ** 0.5)


def test_it_stops_at_the_end_token() -> None:
    free = sample(temperature=0)
    assert sample(temperature=0, eos_id=free[3]) == free[: free.index(free[3]) + 1]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ModelError, match="no tokens"):
        sample(prompt=[])


def test_a_prompt_is_refused_before_a_token_is_asked_for() -> None:
    with pytest.raises(ModelError, match="4 tokens, but the positions of this network end at 3"):
        generate(
            next_logits(small_model(CONFIG)),
            PROMPT,
            max_new_tokens=1,
            temperature=0,
            top_k=None,
            seed=0,
            eos_id=None,
            longest=3,
        )


def test_lengths_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each is a plan of its own for attention, and a graph if the model is compiled."""
    lengths = set()
    hidden = Transformer.hidden
    monkeypatch.setattr(
        Transformer, "hidden", lambda model, batch: lengths.add(len(batch.tokens_T)) or hidden(model, batch)
    )
    sample(max_new_tokens=70)
    assert lengths == {64, 128}
