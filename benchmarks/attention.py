"""Blocked attention beside torch's own: CPU time forward and backward in turns, and errors against fp64.

CPU time rather than seconds, since another process on these cores would change the latter.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from triplane.model.documents import attend_documents

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 64
CASES = {"8 x 512": (8, 512, None), "4 x 1,024": (4, 1024, None), "2 x 2,048": (2, 2048, None)}
CASES["2 x 2,048, window 256"] = (2, 2048, 256)
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(sequences: int, length: int, window: int | None) -> Attention:
    """torch's; its fast kernel has no windows, so that it computes whole attention for one."""

    def attention(*qkv: Tensor) -> Tensor:
        q, k, v = (x.view(sequences, length, -1, HEAD_DIM).transpose(1, 2) for x in qkv)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return attention


def blocked(sequences: int, length: int, window: int | None) -> Attention:
    bounds = torch.arange(0, sequences * length + 1, length, dtype=torch.int32)
    return lambda *qkv: attend_documents(*qkv, None, None, bounds, length, "blocked", HEAD_DIM**-0.5, window, None)[0]


def inputs(tokens: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    *qkv, grad = (torch.randn(tokens, n, HEAD_DIM, generator=generator).to(dtype) for n in heads)
    return [x.requires_grad_() for x in qkv], grad


def output_and_gradients(attention: Attention, qkv: list[Tensor], grad: Tensor) -> list[Tensor]:
    out = attention(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def errors(attention: Attention, exact: list[Tensor], qkv: list[Tensor], grad: Tensor) -> str:
    """Error norms of the output and the gradients of q, k and v, relative to their norms."""
    found = output_and_gradients(attention, qkv, grad)
    return ", ".join(f"{float((x - y).norm() / y.norm()):.1e}" for x, y in zip(found, exact, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| | ms of SDPA | ms of blocked | ratio (lowest, highest) | errors of SDPA | errors of blocked |")
    print("| --- | --- | --- | --- | --- | --- |")
    for dtype in (torch.bfloat16, torch.float32):
        for name, case in CASES.items():
            qkv, grad = inputs(case[0] * case[1], dtype)
            contenders = (sdpa(*case), blocked(*case))
            rounds = [[cpu_ms(attention, qkv, grad) for attention in contenders] for _ in range(options.rounds + 1)][1:]
            ratios = [theirs / ours for theirs, ours in rounds]
            exact = output_and_gradients(
                blocked(*case), [x.detach().double().requires_grad_() for x in qkv], grad.double()
            )
            wrong = [errors(attention, exact, qkv, grad) for attention in contenders]
            if case[2] is not None:
                wrong[0] = "no window"
            ms = [statistics.median(x) for x in zip(*rounds)]
            middle = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
            kind = str(dtype).removeprefix("torch.")
            print(f"| {kind}, {name} | {ms[0]:.0f} | {ms[1]:.0f} | {middle} | {' | '.join(wrong)} |", flush=True)


def cpu_ms(attention: Attention, qkv: list[Tensor], grad: Tensor) -> float:
    start = time.process_time()
    output_and_gradients(attention, qkv, grad)
    return 1000 * (time.process_time() - start)


if __name__ == "__main__":
    main()
