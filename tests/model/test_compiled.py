"""Compiled blocks against eager ones."""

import pytest
import torch
from small_models import packed, random_documents, small_config, small_model
from torch._dynamo.utils import counters

from triplane.model.compiled import compile_blocks

LENGTHS = [
    *([5, 17, 1, 9], [8, 8, 8, 8], [20, 12], [30, 2], [3, 3, 3, 23], [16, 16], [8, 8, 8, 8]),  # 32 tokens
    *([7, 13], [11, 9], [30], [9] * 5, [41, 2], [5] * 5, [3] * 14, [2, 50]),
]


@pytest.mark.slow
@torch._dynamo.config.patch(disable=False)
def test_compiled_blocks_train_as_eager_ones_and_other_documents_do_not_recompile() -> None:
    config = small_config(n_layers=3)
    eager, compiled = small_model(config), small_model(config)
    compile_blocks(compiled)
    assert [*dict(compiled.named_parameters())] == [*dict(eager.named_parameters())]
    before = counters["stats"]["unique_graphs"]  # of other tests
    graphs = []
    for lengths in LENGTHS:
        batch = packed(random_documents(config, lengths))
        losses = [model(batch).objective for model in (eager, compiled)]
        torch.testing.assert_close(*losses)
        gradients = [torch.autograd.grad(loss, [*model.parameters()]) for loss, model in zip(losses, (eager, compiled))]
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"] - before)
    assert graphs[0] == 1  # of a whole block, for all three
    assert graphs[2] == 3  # documents of equal lengths, and of any
    assert graphs[2:7] == [3] * 5
    assert graphs[-1] <= 6  # any number of tokens, and of documents
    assert graphs[-4:] == [graphs[-1]] * 4
