"""The validation loss is that of the sources which the run begins with, and each source has its own."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_corpora import Prepared
from small_models import small_config, small_model

from triplane.data.config import DataConfig
from triplane.data.corpus import Corpus
from triplane.data.prepare import prepare
from triplane.parallel.mesh import Axis
from triplane.training.evaluation import TextLoss, evaluate_model, held_out, validation_losses
from triplane.training.feed import Feed


def test_a_source_of_weight_0_does_not_move_the_loss(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(400)))
    prepare(
        [str(tmp_path / "t.jsonl")],
        tmp_path / "few",
        prepared.folder / "tokenizer.model",
        validation_fraction=0.5,
        shard_tokens=1000,
        processes=1,
    )
    evaluate = evaluate_model(small_model(small_config(vocab_size=prepared.tokenizer.vocab_size)))
    feed = Feed(micro_batch_size=4, num_workers=0, local_ranks=1, dp=Axis(), device=torch.device("cpu"))

    def losses(*weights: float, sequences: int = 16) -> tuple[TextLoss, dict[str, TextLoss]]:
        folders = [prepared.folder, tmp_path / "few"][: len(weights)]
        sources = [{"corpus": str(folder), "weight": weight} for folder, weight in zip(folders, weights)]
        config = DataConfig.model_validate({"sources": sources, "seq_len": 32, "shuffle_window": 64})
        corpora = [Corpus(folder / "validation") for folder in folders]
        return validation_losses(evaluate, feed, held_out(config, corpora), sequences=sequences)

    alone, by_source = losses(1)
    assert by_source == {"out": alone}
    beside, by_source = losses(1, 0)
    assert beside == by_source["out"] == alone and by_source.keys() == {"out", "few"}
    assert by_source["few"].nats != pytest.approx(alone.nats, rel=1e-3)
    both, by_source = losses(1, 1, sequences=32)
    low, high = sorted(loss.nats for loss in by_source.values())
    assert low < both.nats < high and by_source["out"].nats == pytest.approx(alone.nats, rel=1e-6)
    bits = sum(loss.nats * loss.tokens / math.log(2) for loss in by_source.values())
    text_bytes = sum(loss.tokens * loss.bytes_per_token for loss in by_source.values())
    assert both.bits_per_byte == pytest.approx(bits / text_bytes)
    assert by_source["few"].bytes_per_token != pytest.approx(by_source["out"].bytes_per_token, rel=1e-2)


@pytest.mark.parametrize("document_mask", [True, False])
def test_bits_per_byte_are_the_nats_of_the_text_over_its_bytes(prepared: Prepared, document_mask: bool) -> None:
    config = DataConfig.model_validate(
        {"sources": [{"corpus": str(prepared.folder)}], "seq_len": 32, "document_mask": document_mask}
    )
    corpus, tokenizer = prepared.validation, prepared.tokenizer
    evaluate = evaluate_model(small_model(small_config(vocab_size=tokenizer.vocab_size)))
    feed = Feed(micro_batch_size=4, num_workers=0, local_ranks=1, dp=Axis(), device=torch.device("cpu"))
    every = 1 << 20
    loss, _ = validation_losses(evaluate, feed, held_out(config, [corpus]), sequences=every)
    tokens, starts = corpus.read(0, corpus.tokens)
    documents = [tokenizer.decode(document.tolist()) for document in np.split(tokens, starts)]
    assert set(documents) <= set(prepared.texts)
    firsts = len(documents) if document_mask else 1  # tokens that nothing predicts
    bits = loss.nats * (corpus.tokens - firsts) / math.log(2)
    assert loss.bits_per_byte == pytest.approx(bits / len("".join(documents).encode()), rel=1e-6)
