"""Scores and losses outside of training, on every axis."""

import pytest
import torch

from triplane.model.batch import Batch
from triplane.model.config import ModelConfig
from triplane.model.init import initial_weight
from triplane.model.transformer import Transformer
from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import run_ranks
from triplane.prove.reference import SEQUENCES, proof_batch, proof_engine, proof_model

LAYOUTS = [
    {"tp": 4, "sequence_parallel": True},
    {"pp": 2, "virtual_stages": 2},
    {"cp": 2, "cp_method": "ring", "tp": 2},
    {"cp": 2, "dp": 2},
    {"dp": 2, "zero": 3},
    {"pp": 4, "zero": 0},
]
TOKENS = [3, 1, 4, 1, 5, 9, 2]
"""An odd number: the axes that split tokens must pad."""


def model(vocab_size: int) -> ModelConfig:
    return proof_model(tie_embeddings=True).model_copy(update={"vocab_size": vocab_size})


def _scores_and_loss(mesh: Mesh, layout: ParallelConfig, vocab_size: int) -> tuple[torch.Tensor, float]:
    engine = proof_engine(mesh, model(vocab_size), layout, dtype=torch.float32)
    share = SEQUENCES // mesh.dp.size
    batches = [proof_batch(engine.config, 0, [mesh.dp.rank * share + i]) for i in range(share)]
    return engine.next_logits(TOKENS), float(engine.evaluate(batches).cross_entropy)


def plainly(vocab_size: int) -> tuple[torch.Tensor, float]:
    config = model(vocab_size)
    plain = Transformer(config)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            offsets, sizes = (0,) * weight.dim(), tuple(weight.shape)
            weight.copy_(initial_weight(config, 3, name, shape=weight.shape, offsets=offsets, sizes=sizes))
        tokens = torch.tensor(TOKENS)
        scores = plain.logits(Batch.build(tokens, tokens, [0, len(TOKENS)]))[-1]
        batch = proof_batch(config, 0, range(SEQUENCES))
        return scores, float(plain(batch).cross_entropy / (batch.targets_T >= 0).sum())


@pytest.mark.parametrize("vocab_size", [61, 17])  # of 17, the fourth tp rank holds nothing but padding
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_scores_and_loss_are_those_of_one_process(layout: dict, vocab_size: int) -> None:
    config = ParallelConfig(**({"dp": 1} | layout))
    scores, loss = plainly(vocab_size)
    assert isinstance(config.dp, int)
    for ours, our_loss in run_ranks(config, config.ranks_of_one * config.dp, _scores_and_loss, config, vocab_size):
        torch.testing.assert_close(ours, scores, atol=1e-5, rtol=0)
        assert our_loss == pytest.approx(loss, abs=1e-5)


def _losses_of_two_starts(mesh: Mesh, layout: ParallelConfig) -> list[float]:
    """The loss of other weights, filled in after an evaluation, and that of an engine which had them from the start."""
    batches = [proof_batch(model(61), 0, range(2))]
    refilled, fresh = (proof_engine(mesh, model(61), layout, dtype=torch.float32, seed=seed) for seed in (3, 4))
    refilled.evaluate(batches)
    refilled.initialize(4)
    return [float(engine.evaluate(batches).cross_entropy) for engine in (refilled, fresh)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_that_are_filled_in_after_an_evaluation_are_used(stage: int) -> None:
    layout = ParallelConfig.model_validate({"dp": 2, "zero": stage})
    for refilled, fresh in run_ranks(layout, 2, _losses_of_two_starts, layout):
        assert refilled == fresh
