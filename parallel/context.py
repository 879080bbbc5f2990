"""Context parallelism: splits the tokens of a micro-batch over the cp ranks.

Only attention looks beyond its own token, so a rank runs the model on its share of the tokens, and
`UlyssesAttention` or `RingAttention`, which see the whole stream, replaces `SegmentAttention`. Counts of a sequence's
tokens are summed.
"""

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from triplane.model.attend import SegmentAttention
from triplane.model.batch import Batch
from triplane.model.modules import PartModule
from triplane.model.transformer import Transformer
from triplane.parallel.mesh import Axis
from triplane.parallel.ring import RingAttention
from triplane.parallel.ulysses import UlyssesAttention

Method = Literal["ulysses", "ring"]


def cut_for_context(batch: Batch, cp: Axis, method: Method) -> Batch:
    """Returns this rank's tokens, targets and positions of `batch`; the bounds stay those of the whole stream.

    For Ulysses, rank r takes chunk r of cp. For the ring it takes chunks r and 2 cp - 1 - r of 2 cp, one early and
    one late, since causal work grows along the stream.
    """
    chunks, mine = cp.size, [cp.rank]
    if method == "ring":
        chunks, mine = 2 * cp.size, [cp.rank, 2 * cp.size - 1 - cp.rank]
    assert len(batch.tokens_T) % chunks == 0, (len(batch.tokens_T), chunks)

    def share(x_T: Tensor) -> Tensor:
        return torch.cat([x_T.chunk(chunks)[i] for i in mine])

    return replace(
        batch,
        tokens_T=share(batch.tokens_T),
        targets_T=share(batch.targets_T),
        positions_T=share(batch.positions_T),
        sequences_T=share(batch.sequences_T),
        further=tuple((share(tokens_T), share(targets_T)) for tokens_T, targets_T in batch.further),
    )


def apply_context_parallel(model: Transformer, cp: Axis, method: Method) -> None:
    """Swaps the attention of every block."""
    for block in model.blocks.values():
        attention = block.get_submodule("attention")
        core = attention.get_submodule("core")
        assert isinstance(core, SegmentAttention)
        attention.core = UlyssesAttention(core, cp) if method == "ulysses" else RingAttention(core, cp)
        feed_forward = block.get_submodule("feed_forward")
        assert isinstance(feed_forward, PartModule)
        feed_forward.summed_along = partial(_summed, cp=cp)


def _summed(x: Tensor, cp: Axis) -> Tensor:
    assert cp.group is not None, "one rank holds all"
    return collectives.all_reduce(x, "sum", cp.group)
