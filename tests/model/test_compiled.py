"""Compiled blocks against eager ones."""

import pytest
import torch
from small_models import packed, random_documents, small_config, small_model
from torch._dynamo.utils import counters

from triplane.model.compiled import compile_blocks

LENGTHS = [
    *([5, 17, 1, 9], [8, 8, 8, 8], [20, 12], [30, 2], [3, 3, 3, 23], [16, 16], [8, 8, 8, 8]),  # 32 tokens
    *([7, 13], [11, 9], [9] * 5, [41, 2], [5] * 5, [3] * 5, [2, 50]),
]


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
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
    # The loss, and a whole block for all three; one graph for documents of any lengths, one for each number of equal
    # ones.
    assert graphs[:7] == [2, 3, 4, 4, 4, 5, 5]
    assert graphs[-1] <= 9  # any number of tokens
    assert graphs[-4:] == [graphs[-1]] * 4
