"""The network against transformers' Llama, and its segments against each other."""

import weakref
from typing import Any

import pytest
import torch
from small_models import llama, packed, random_documents, random_weights, small_config, small_model
from torch import Tensor

from triplane.model.batch import Batch
from triplane.model.build import load_model, streamed_logits
from triplane.model.parts.rotary import LinearScaling, Llama3Scaling
from triplane.storage.errors import ModelError

# Of the four frequencies one stays, one is blended and two are divided.
LLAMA3 = Llama3Scaling(kind="llama3", factor=4, low_freq_factor=1, high_freq_factor=4, original_seq_len=128)
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one key head": {"n_kv_heads": 1},
    "all key heads": {"n_kv_heads": 6},
    "wide heads": {"head_dim": 16},
    "tied": {"tie_embeddings": True},
    "biases": {"qkv_bias": True},
    "rope base": {"rope_base": 500_000.0},
    "linear scaling": {"rope_scaling": LinearScaling(kind="linear", factor=3)},
    "llama3 scaling": {"rope_scaling": LLAMA3},
    "norm eps": {"norm_eps": 0.1},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_llama(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    weights = random_weights(config)
    sequences = random_documents(config, [48, 48])
    reference = llama(config, weights)
    with torch.no_grad():
        ours = load_model(config, weights, torch.float32).logits(packed(sequences))
        theirs = reference(torch.stack(sequences)).logits.flatten(0, 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_what_follows_a_token_stays_in_its_segment() -> None:
    tokens_T, targets_T = torch.arange(7), torch.tensor([1, 2, 30, 4, 5, -100, 70])
    first, second = Batch.build(tokens_T, targets_T, (0, 3, 7)).ahead(2).further
    assert [x.tolist() for x in first] == [[1, 2, 2, 4, 5, 6, 6], [2, 30, -100, 5, -100, 70, -100]]
    assert [x.tolist() for x in second] == [[2, 2, 2, 5, 6, 6, 6], [30, -100, -100, -100, 70, -100, -100]]


def test_without_what_follows_nothing_further_is_predicted() -> None:
    config = small_config(predict_further={"depth": 1, "weight": 0.5})
    model, batch = small_model(config), packed(random_documents(config, [20, 12]))
    plain, further = model(batch), model(batch.ahead(1))
    assert plain.further == 0 and plain.objective == plain.cross_entropy
    assert further.cross_entropy == plain.cross_entropy and further.further > 0
    torch.testing.assert_close(further.objective, plain.objective + further.further)


@pytest.mark.parametrize("variant", ["grouped", "rope base", "linear scaling"])
def test_frequencies_are_llamas_to_the_last_bit(variant: str) -> None:
    config = small_config(**{"head_dim": 128} | VARIANTS[variant])
    expected = llama(config, random_weights(config)).model.rotary_emb.inv_freq
    assert torch.equal(config.positions.frequencies(config.attention.head_dim, torch.arange(2)), expected)


@pytest.mark.parametrize("variant", ["rope base", "linear scaling", "llama3 scaling"])
def test_the_comparison_would_see_a_wrong_rope(variant: str) -> None:
    right, wrong = small_config(), small_config(**VARIANTS[variant])
    weights, batch = random_weights(right), packed(random_documents(right, [48]))
    with torch.no_grad():
        ours = load_model(right, weights, torch.float32).logits(batch)
        theirs = llama(wrong, weights)(batch.tokens_T[None]).logits[0]
    assert (ours - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("lengths", [[5, 17, 1, 9], [8, 8, 8]], ids=["ragged", "equal"])
def test_packed_documents_equal_the_same_documents_alone(lengths: list[int]) -> None:
    config = small_config()
    model, documents = small_model(config), random_documents(config, lengths)
    with torch.no_grad():
        together = model.logits(packed(documents))
        alone = torch.cat([model.logits(packed([d])) for d in documents])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lengths", [[5, 17, 1, 9], [8, 8, 8, 8]], ids=["ragged", "equal"])
@pytest.mark.parametrize("changed", range(4))
def test_a_document_does_not_see_another(lengths: list[int], changed: int) -> None:
    config = small_config()
    model, documents = small_model(config), random_documents(config, lengths)
    others = [d if i != changed else (d + 1) % config.vocab_size for i, d in enumerate(documents)]
    with torch.no_grad():
        before = model.logits(packed(documents)).split(lengths)
        after = model.logits(packed(others)).split(lengths)
    for i in range(4):
        assert torch.equal(before[i], after[i]) == (i != changed)


@pytest.mark.parametrize("lengths", [[5, 17, 1, 9], [8, 8, 8, 8]], ids=["ragged", "equal"])
def test_a_token_does_not_see_its_successors(lengths: list[int]) -> None:
    config = small_config()
    model, documents = small_model(config), random_documents(config, lengths)
    batch = packed(documents)
    changed = batch.tokens_T.clone()
    changed[9] = (changed[9] + 1) % config.vocab_size  # inside the second document
    with torch.no_grad():
        before = model.logits(batch)
        after = model.logits(Batch.build(changed, batch.targets_T, batch.bounds))
    assert torch.equal(before[:9], after[:9])
    assert not torch.equal(before[9], after[9])
    assert not torch.equal(before[10], after[10])


def test_positions_start_at_zero_in_each_segment() -> None:
    batch = Batch.build(torch.zeros(7, dtype=torch.int64), torch.zeros(7, dtype=torch.int64), (0, 3, 4, 7))
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert (batch.longest, batch.uniform) == (3, False)
    assert Batch.build(batch.tokens_T[:6], batch.targets_T[:6], (0, 3, 6)).uniform


def test_a_run_of_blocks_continues_the_one_before() -> None:
    config = small_config()
    whole, first, last = (small_model(config) for _ in range(3))
    first.norm = first.head = last.embedding = None
    del first.blocks["1"], last.blocks["0"]
    batch = packed(random_documents(config, [5, 9]))
    with torch.no_grad():
        assert torch.equal(last(batch, first(batch)).cross_entropy, whole(batch).cross_entropy)


def test_load_model_ties_the_head_to_the_table() -> None:
    model = small_model(small_config(tie_embeddings=True))
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_streamed_logits_hold_a_layer_at_a_time(tied: bool) -> None:
    config = small_config(tie_embeddings=tied)
    batch, weights = packed(random_documents(config, [5, 9])), random_weights(config)
    held, most = set(), 0

    class Counted(dict):
        def __getitem__(self, name: str) -> Tensor:
            nonlocal most
            memory = super().__getitem__(name).numpy().copy()  # which tensors over it keep alive
            held.add(name)
            most = max(most, len(held))
            weakref.finalize(memory, held.discard, name)
            return torch.from_numpy(memory)

    with torch.no_grad():
        expected = load_model(config, weights, torch.float32).logits(batch)
    assert torch.equal(streamed_logits(config, Counted(weights), batch, rounded_to=torch.float32), expected)
    assert most <= 2 < len(weights)
    rounded = {name: weight.bfloat16() for name, weight in weights.items()}
    with torch.no_grad():
        expected = load_model(config, rounded, torch.float32).logits(batch)
    assert torch.equal(streamed_logits(config, weights, batch, rounded_to=torch.bfloat16), expected)


def test_load_model_refuses_weights_of_another_model() -> None:
    config = small_config()
    weights = random_weights(config)
    with pytest.raises(ModelError, match=r"1 names differ .* blocks\.2\.norm\.weight, is unknown among"):
        load_model(config, weights | {"blocks.2.norm.weight": torch.ones(48)}, torch.float32)
    with pytest.raises(ModelError, match=r"norm\.weight is \(1,\), but the config makes it \(48,\)"):
        load_model(config, weights | {"norm.weight": torch.ones(1)}, torch.float32)
    del weights["head.weight"]
    with pytest.raises(ModelError, match=r"head\.weight, is missing from the weights"):
        load_model(config, weights, torch.float32)
