"""The validation loss is that of the sources which the run begins with, and each source has its own."""

import json
from pathlib import Path

import pytest
import torch
from small_corpora import Prepared
from small_models import small_config, small_model

from triplane.data.config import DataConfig
from triplane.data.corpus import Corpus
from triplane.data.prepare import prepare
from triplane.parallel.mesh import Axis
from triplane.training.evaluation import evaluate_model, held_out, validation_losses
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

    def losses(*weights: float, sequences: int = 16) -> tuple[float, dict[str, float]]:
        folders = [prepared.folder, tmp_path / "few"][: len(weights)]
        sources = [{"corpus": str(folder), "weight": weight} for folder, weight in zip(folders, weights)]
        config = DataConfig.model_validate({"sources": sources, "seq_len": 32, "shuffle_window": 64})
        corpora = [Corpus(folder / "validation") for folder in folders]
        return validation_losses(evaluate, feed, held_out(config, corpora), sequences=sequences)

    alone = losses(1)
    assert alone == (alone[0], {"out": alone[0]})
    beside = losses(1, 0)
    assert beside[0] == pytest.approx(alone[0], rel=1e-6) and beside[1].keys() == {"out", "few"}
    assert beside[1]["few"] != pytest.approx(beside[1]["out"], rel=1e-3)
    both = losses(1, 1, sequences=32)
    low, high = sorted(both[1].values())
    assert low < both[0] < high and both[1]["out"] == pytest.approx(alone[0], rel=1e-6)
