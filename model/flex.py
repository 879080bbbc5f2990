"""Attention on a GPU by torch's flex_attention: a kernel compiled for a bias by head and distance, or a soft cap.

It multiplies no fewer than 16 numbers, and torch has tiles that fit a GPU for heads of up to 256.

A query sees the keys from `lowest` of it to its own place, which says documents and window at once. `lowest` never
falls along the stream, so the blocks of keys that a block of queries sees, and those that need no mask, are ranges, and
so are a block of keys' queries: the block mask takes a few small kernels and no look at the host.

Shapes are those of batch.py; N is blocks of queries or of keys, L distances.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from triplane.model import sinks

_BLOCK = 128
"""Queries or keys."""


def attend(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    bias_HL: Tensor | None,
    sinks_H: Tensor | None,
    bounds_int32: Tensor,
    window: int | None,
    scale: str,
    softcap: str | None,
) -> Tensor:
    """Returns attention (T, H, K) within each segment of `bounds_int32`, by the numbers of a Rule.

    Two of them are text, since the compiler takes floats that differ between layers for variables, and the kernel has
    none.
    """
    tokens = len(q_THK)
    # As many distances as tokens: masked pairs read it too, and documents of other lengths need no other kernel.
    bias_HT = None if bias_HL is None else F.pad(bias_HL, (0, tokens - bias_HL.shape[1]))
    inputs = (q_THK, k_TGK, v_TGK, bias_HT, sinks_H, lowest(bounds_int32, tokens, window), scale, softcap)
    if torch.compiler.is_compiling():  # a block, which then holds the kernel
        return _attend(*inputs)
    with torch._dynamo.config.patch(recompile_limit=64):  # 8 are few for several kinds of layers, in training and after
        return _compiled()(*inputs)


@cache
def _compiled() -> Callable[..., Tensor]:
    # Selective recomputation sees a compiled region only if it is wrapped. Without `fullgraph`, too many kernels would
    # end in matrices of tokens x tokens.
    return torch.compile(_attend, fullgraph=True, options={"wrap_inductor_compiled_regions": True})


def _attend(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    bias_HT: Tensor | None,
    sinks_H: Tensor | None,
    lowest_T: Tensor,
    scale: str,
    softcap: str | None,
) -> Tensor:
    cap = None if softcap is None else float(softcap)

    def score_mod(score: Tensor, _: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return scored(score.float(), cap, None if bias_HT is None else bias_HT[head, (i - j).abs()])

    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q_THK, k_TGK, v_TGK))
    out, extras = flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=block_mask(lowest_T),
        scale=float(scale),
        enable_gqa=q_THK.shape[1] != k_TGK.shape[1],
        kernel_options={"BACKEND": "TRITON"},  # the one for decoding would be another below 128 tokens
        return_aux=AuxRequest(lse=True),
    )
    out_THK = out.squeeze(0).transpose(0, 1)
    if sinks_H is None:
        return out_THK
    assert extras.lse is not None
    return sinks.join(out_THK, extras.lse.squeeze(0), sinks_H)[0]


def scored(score: Tensor, cap: float | None, bias: Tensor | None) -> Tensor:
    """Returns the score with a soft cap, and then a bias."""
    if cap is not None:
        score = cap * torch.tanh(score / cap)
    return score if bias is None else score + bias


def lowest(bounds_int32: Tensor, tokens: int, window: int | None) -> Tensor:
    """Returns the first key that each query sees."""
    place_T = torch.arange(tokens, dtype=torch.int32, device=bounds_int32.device)
    start_T = bounds_int32[torch.searchsorted(bounds_int32, place_T, right=True) - 1]
    return start_T if window is None else torch.maximum(start_T, place_T - (window - 1))


def block_mask(lowest_T: Tensor) -> BlockMask:
    """Returns the mask by which a query sees the keys from its `lowest_T` to its own place."""
    tokens = len(lowest_T)
    blocks = (tokens + _BLOCK - 1) // _BLOCK
    i_N = torch.arange(blocks, dtype=torch.int32, device=lowest_T.device)
    last_N = i_N * _BLOCK + _BLOCK - 1
    # Of queries i, the first block of keys that one sees, and the first that all see whole; their last may be short.
    seen_N = lowest_T[i_N * _BLOCK] // _BLOCK
    whole_N = (lowest_T[last_N.clamp(max=tokens - 1)] + _BLOCK - 1) // _BLOCK
    whole_N = torch.where(last_N < tokens, whole_N, blocks)
    # Of keys i, the first block of queries in which none sees them, and in which not all see them whole.
    unseen_N = torch.searchsorted(seen_N, i_N, right=True, out_int32=True)
    cut_N = torch.maximum(torch.searchsorted(whole_N, i_N, right=True, out_int32=True), i_N + 1)
    whole_N = torch.minimum(whole_N, i_N)

    def rows(first_N: Tensor, count_N: Tensor, then_N: Tensor) -> Tensor:
        """Returns (1, 1, N, N), whose row i counts `count_N[i]` blocks from `first_N[i]`, then on from `then_N[i]`."""
        first, count, then = (x.unsqueeze(-1) for x in (first_N, count_N, then_N))
        return torch.where(i_N < count, first + i_N, then + i_N - count).clamp(max=blocks - 1)[None, None]

    def mask_mod(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= lowest_T[query])

    return BlockMask(
        seq_lengths=(tokens, tokens),
        kv_num_blocks=(whole_N - seen_N + 1)[None, None],
        kv_indices=rows(seen_N, whole_N - seen_N, i_N),
        full_kv_num_blocks=(i_N - whole_N)[None, None],
        full_kv_indices=rows(whole_N, i_N - whole_N, i_N),
        q_num_blocks=(unseen_N - cut_N + 1)[None, None],
        q_indices=rows(i_N, torch.ones_like(i_N), cut_N),
        full_q_num_blocks=(cut_N - i_N - 1)[None, None],
        full_q_indices=rows(i_N + 1, cut_N - i_N - 1, cut_N),
        BLOCK_SIZE=(_BLOCK, _BLOCK),
        mask_mod=mask_mod,
    )
