"""Context parallelism: one micro-batch's stream of tokens split over the ranks of cp.

Only attention looks beyond its own token, so a rank runs the model on its share of the tokens and
`SegmentAttention` gives way to `UlyssesAttention` or `RingAttention`, which see the whole stream.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from triplane.model.batch import Batch
from triplane.model.transformer import Transformer
from triplane.parallel.mesh import Axis
from triplane.parallel.ring import RingAttention
from triplane.parallel.ulysses import UlyssesAttention

Method = Literal["ulysses", "ring"]


def chunks_for(method: Method, cp: int) -> int:
    """The number of equal chunks that the stream is cut in, which must divide its tokens."""
    return cp if method == "ulysses" else 2 * cp


def cut_for_context(batch: Batch, cp: Axis, method: Method) -> Batch:
    """This rank's tokens, targets and positions of `batch`; its bounds stay those of the whole stream.

    Ulysses: chunk r of cp. Ring: chunks r and 2 cp - 1 - r of 2 cp, since causal work grows along the stream.
    """
    chunks = chunks_for(method, cp.size)
    assert len(batch.tokens_T) % chunks == 0, (len(batch.tokens_T), chunks)
    mine = [cp.rank] if method == "ulysses" else [cp.rank, chunks - 1 - cp.rank]

    def share(x_T: Tensor) -> Tensor:
        return torch.cat([x_T.chunk(chunks)[i] for i in mine])

    return replace(
        batch,
        tokens_T=share(batch.tokens_T),
        targets_T=share(batch.targets_T),
        positions_T=share(batch.positions_T),
    )


def apply_context_parallel(model: Transformer, cp: Axis, method: Method) -> None:
    """Swaps the attention of every block."""
    for block in model.blocks.values():
        attention = block.get_submodule("attention")
        core = attention.get_submodule("core")
        attention.core = UlyssesAttention(core, cp) if method == "ulysses" else RingAttention(core, cp)
