"""Attention over the ranks of cp is that of one process, its output and its gradients."""

from itertools import count, pairwise
from typing import Any, NamedTuple

import pytest
import torch
from dense_attention import PLAIN, RULES
from small_models import packed, random_documents, small_config, small_model
from torch import Tensor, nn
from torch import distributed as dist

from triplane.model.attend import SegmentAttention
from triplane.model.batch import Batch
from triplane.model.rule import Rule
from triplane.parallel import direct, ring
from triplane.parallel.config import ParallelConfig
from triplane.parallel.context import Method, cut_for_context
from triplane.parallel.mesh import Axis, Mesh
from triplane.parallel.ring import RingAttention
from triplane.parallel.ulysses import UlyssesAttention
from triplane.parallel.zigzag import seen
from triplane.prove.forked import run_ranks

TOKENS, HEADS, HEAD_DIM = 96, 12, 8
MODULES: dict[Method, type[nn.Module]] = {"ulysses": UlyssesAttention, "ring": RingAttention}
METHODS = list(MODULES)


class Case(NamedTuple):
    bounds: tuple[int, ...]
    n_kv_heads: int = 2
    dtype: torch.dtype = torch.float32
    rule: Rule = PLAIN
    extras: bool = False
    """A bias and sinks."""


def random_bounds(seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    documents = int(torch.randint(2, 14, (), generator=generator))
    return (0, *sorted((torch.randperm(TOKENS - 1, generator=generator)[: documents - 1] + 1).tolist()), TOKENS)


ONE = (0, TOKENS)
BOUNDS = {
    "one": ONE,
    "one a token": tuple(range(TOKENS + 1)),
    "short": tuple(range(0, TOKENS + 1, 4)),
    "equal": (0, 32, 64, 96),
    "at chunks": (0, 12, 24, 48, 84, 96),
    "past chunks": (0, 13, 25, 49, 85, 96),
    "before chunks": (0, 11, 23, 47, 83, 95, 96),
    "long in the middle": (0, 5, 91, 96),
} | {f"random {seed}": random_bounds(seed) for seed in range(12)}


def whole(case: Case) -> tuple[Batch, list[Tensor]]:
    """A stream whose tokens are their own numbers; its q, k, v and the gradient of the output."""
    numbers_T = torch.arange(TOKENS)
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, case.n_kv_heads, case.n_kv_heads, HEADS)
    tensors = [torch.randn(TOKENS, n, HEAD_DIM, generator=generator, dtype=torch.float64) for n in heads]
    return Batch.build(numbers_T, 1000 + numbers_T, case.bounds), [x.to(case.dtype) for x in tensors]


def extras_of(case: Case) -> list[Tensor]:
    if not case.extras:
        return []
    generator = torch.Generator().manual_seed(1)
    shapes = ((HEADS, TOKENS), (HEADS,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype) for shape in shapes]


def output_and_gradients(core: nn.Module, batch: Batch, tensors: list[Tensor], extras: list[Tensor]) -> list[Tensor]:
    *qkv, grad = tensors
    inputs = [x.clone().requires_grad_() for x in (*qkv, *extras)]
    out = core(*inputs[:3], batch, *inputs[3:])
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def axis_of(mesh: Mesh, cp: int) -> Axis:
    """Every n-th rank along cp, so that with more ranks than cp a rank's place is not its number."""
    stride = mesh.world_size // cp
    groups = [dist.new_group(list(range(i, mesh.world_size, stride))) for i in range(stride)]
    return Axis(cp, mesh.rank // stride, groups[mesh.rank % stride])


def on_rank(mesh: Mesh, cp: int, method: Method, cases: list[Case]) -> list[tuple[Batch, list[Tensor]]]:
    axis = axis_of(mesh, cp)
    results = []
    for case in cases:
        core = MODULES[method](SegmentAttention(case.rule), axis)
        batch, tensors = whole(case)
        share = cut_for_context(batch, axis, method)
        results.append(
            (share, output_and_gradients(core, share, [x[share.tokens_T] for x in tensors], extras_of(case)))
        )
    return results


def over_ranks(method: Method, cp: int, cases: list[Case], ranks: int | None = None) -> list[list[Tensor]]:
    """Returns the output and gradients that `cp` of `ranks` compute for each case, put together."""
    ranks = ranks or cp
    by_rank = run_ranks(ParallelConfig(dp=ranks), ranks, on_rank, cp, method, cases)[ranks // cp - 1 :: ranks // cp]
    results = []
    for shares in zip(*by_rank):
        order_T = torch.cat([share.tokens_T for share, _ in shares]).argsort()
        parts = [*zip(*(tensors for _, tensors in shares))]
        results.append([torch.cat(x)[order_T] for x in parts[:4]] + [sum(x[1:], x[0]) for x in parts[4:]])
    return results


def on_one(case: Case) -> list[Tensor]:
    return output_and_gradients(SegmentAttention(case.rule), *whole(case), extras_of(case))


def difference(some: list[Tensor], others: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(some, others, strict=True))


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_attention_is_that_of_one_process(method: Method, cp: int) -> None:
    cases = [Case(bounds, heads) for bounds in BOUNDS.values() for heads in (1, 2, HEADS)]
    cases += [Case(bounds, heads) for bounds in (ONE, random_bounds(0)) for heads in (3, 6)]
    for case, results in zip(cases, over_ranks(method, cp, cases), strict=True):
        assert difference(results, on_one(case)) < 1e-5, case


@pytest.mark.parametrize("method", METHODS)
def test_two_groups_do_not_mix(method: Method) -> None:
    assert difference(over_ranks(method, 2, [Case(ONE)], ranks=4)[0], on_one(Case(ONE))) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_fp64_agrees_to_its_own_precision(method: Method) -> None:
    cases = [Case(bounds, dtype=torch.float64) for bounds in BOUNDS.values()]
    for case, results in zip(cases, over_ranks(method, 4, cases), strict=True):
        assert difference(results, on_one(case)) < 1e-13, case


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_each_rule_is_that_of_one_process(method: Method, cp: int) -> None:
    bounds = (ONE, BOUNDS["past chunks"], BOUNDS["long in the middle"], BOUNDS["short"], random_bounds(0))
    rules = (*RULES.values(), Rule(scale=0.3, window=30))
    cases = [Case(x, 2, torch.float64, rule, extras) for x in bounds for rule in rules for extras in (False, True)]
    for case, results in zip(cases, over_ranks(method, cp, cases), strict=True):
        assert difference(results, on_one(case)) < 1e-13, case


@pytest.mark.parametrize("method", METHODS)
def test_bf16_errs_as_one_process_in_bf16_does(method: Method) -> None:
    cases = [Case(bounds, dtype=torch.bfloat16) for bounds in BOUNDS.values()]
    for case, results in zip(cases, over_ranks(method, 4, cases), strict=True):
        batch, tensors = whole(case)
        exact = output_and_gradients(SegmentAttention(PLAIN), batch, [x.float() for x in tensors], [])
        for x, one, y in zip(results, on_one(case), exact, strict=True):
            assert x.dtype == torch.bfloat16
            # Each part of a sum over ranks is rounded once, and the sum once more.
            assert (x - y).norm() <= 1.5 * (one - y).norm(), case


def rank_loss(mesh: Mesh, method: Method, documents: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a whole model, summed over the ranks."""
    model = small_model(small_config(n_heads=HEADS, n_kv_heads=2))
    for block in model.blocks.values():
        block.attention.core = MODULES[method](block.attention.core, mesh.dp)
    loss = model(cut_for_context(packed(documents), mesh.dp, method)).objective
    loss.backward()
    sums = [loss.detach(), *(parameter.grad for parameter in model.parameters())]
    for x in sums:
        dist.all_reduce(x, group=mesh.dp.group)
    return sums[0], sums[1:]


@pytest.mark.parametrize("method", METHODS)
def test_a_model_has_the_loss_and_gradients_of_one_process(method: Method) -> None:
    config = small_config(n_heads=HEADS, n_kv_heads=2)
    documents = random_documents(config, [17, 30, 1, 16])
    model = small_model(config)
    loss = model(packed(documents)).objective
    loss.backward()
    for total, grads in run_ranks(ParallelConfig(dp=4), 4, rank_loss, method, documents):
        torch.testing.assert_close(total, loss.detach(), rtol=1e-6, atol=0)
        for grad, parameter in zip(grads, model.parameters(), strict=True):
            assert (grad - parameter.grad).abs().max() < 1e-5 * parameter.grad.abs().max()


def test_targets_and_positions_are_cut_like_tokens() -> None:
    batch, _ = whole(Case((0, 13, 96)))
    share = cut_for_context(batch, Axis(4, 1, None), "ring")
    assert share.tokens_T.tolist() == [*range(12, 24), *range(72, 84)]
    assert share.targets_T.tolist() == [1000 + i for i in share.tokens_T.tolist()]
    assert share.positions_T.tolist() == [12, *range(11), *range(59, 71)]
    assert (share.bounds, share.longest) == (batch.bounds, batch.longest)
    assert cut_for_context(batch, Axis(4, 1, None), "ulysses").tokens_T.tolist() == list(range(24, 48))


def test_a_ring_that_keeps_the_last_gradients_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: here the gradients of k and v do not take their last hop home."""
    pass_on, calls = ring.pass_on, count(1)

    def keeping(x: Tensor, cp: Axis) -> Any:
        arrived = pass_on(x, cp)
        last = (cp.size - 1) + (cp.size - 1) + cp.size  # forward, backward, gradients
        return (lambda: arrived().copy_(x)) if next(calls) == last else arrived

    monkeypatch.setattr(ring, "pass_on", keeping)
    assert difference(over_ranks("ring", 2, [Case(ONE)])[0], on_one(Case(ONE))) > 0.1


def test_keys_in_the_order_of_ranks_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: here rank i gets key/value head i % 2, not i // 2."""
    monkeypatch.setattr(Tensor, "repeat_interleave", lambda x, copies, dim: x.repeat(1, copies, 1))
    assert difference(over_ranks("ulysses", 4, [Case(ONE)])[0], on_one(Case(ONE))) > 0.1


def test_biases_of_other_heads_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: here each rank takes the bias and the sinks of the first heads."""
    real = UlyssesAttention.__init__

    def first_rank(self: UlyssesAttention, core: nn.Module, cp: Axis) -> None:
        real(self, core, cp)
        self.rank = 0

    monkeypatch.setattr(UlyssesAttention, "__init__", first_rank)
    case = Case(ONE, extras=True)
    assert difference(over_ranks("ulysses", 2, [case])[0], on_one(case)) > 0.1


def test_a_window_of_another_size_over_ranks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: here ranks send one key too few."""
    monkeypatch.setattr(direct, "seen", lambda bounds, reader, owner, window: seen(bounds, reader, owner, window - 1))
    case = Case(ONE, rule=RULES["window"])
    assert difference(over_ranks("ring", 2, [case])[0], on_one(case)) > 1e-3


def elements_sent(mesh: Mesh, cases: list[Case]) -> list[int]:
    """Returns, for each case, the elements that this rank sends to others for an output, and its gradients."""
    sent: list[int] = []
    exchange: Any = dist.all_to_all_single

    def counted(received: Tensor, x: Tensor, received_sizes: list[int], sizes: list[int], **options: Any) -> Any:
        sent[-1] += sum(n for rank, n in enumerate(sizes) if rank != mesh.rank) * x[:1].numel()
        return exchange(received, x, received_sizes, sizes, **options)

    dist.all_to_all_single = counted  # type: ignore[assignment]
    for case in cases:
        sent.append(0)
        on_rank(mesh, mesh.world_size, "ring", [case])
    return sent


def test_a_window_over_ranks_sends_the_keys_that_are_seen() -> None:
    window, cp, chunk = 5, 4, TOKENS // 8
    token = 2 * 2 * HEAD_DIM  # key and value of two heads
    rule = Rule(scale=0.3, window=window)
    cases = [Case(ONE, rule=rule), Case((0, *range(chunk, TOKENS, chunk), TOKENS), rule=rule)]
    by_rank = run_ranks(ParallelConfig(dp=cp), cp, elements_sent, cases)
    # The last keys of each chunk but the last are seen by the next one; the middle two chunks are on one rank. They
    # are sent twice, forward and backward, and their gradients once.
    assert sum(sent for sent, _ in by_rank) == 3 * (2 * cp - 2) * (window - 1) * token
    assert [sent for _, sent in by_rank] == [0] * cp  # no document is in two chunks


@pytest.mark.parametrize("cp", [2, 3, 8])
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS.keys())
def test_the_ring_computes_each_pair_of_tokens_once(bounds: tuple[int, ...], cp: int) -> None:
    batch, _ = whole(Case(bounds))
    shares = [cut_for_context(batch, Axis(cp, rank, None), "ring").tokens_T.tolist() for rank in range(cp)]
    seen = [
        (shares[rank][i], shares[other][j])
        for rank in range(cp)
        for other, pair in ring.pairs(batch, Axis(cp, rank, None), TOKENS // cp).items()
        for queries, keys in spans(pair)
        for i in queries
        for j in keys
        if pair.segments is None or j <= i
    ]
    assert sorted(seen) == [(i, j) for a, b in pairwise(bounds) for i in range(a, b) for j in range(a, i + 1)]


def spans(pair: ring.Pair) -> list[tuple[range, range]]:
    if pair.segments is None:
        return [(range(pair.queries.start, pair.queries.stop), range(pair.keys.start, pair.keys.stop))]
    return [(range(a, b), range(a, b)) for a, b in pairwise(pair.segments.bounds_int32.tolist())]


@pytest.mark.parametrize("cp", [2, 4, 16])
def test_zig_zag_gives_every_rank_the_same_work(cp: int) -> None:
    tokens = 8192
    ids_T = torch.zeros(tokens, dtype=torch.int64)
    batch = Batch.build(ids_T, ids_T, (0, tokens))
    work = []
    for rank in range(cp):
        found = ring.pairs(batch, Axis(cp, rank, None), tokens // cp).values()
        triangle = [len(q) * (len(q) + 1) // 2 for pair in found if pair.segments for q, _ in spans(pair)]
        square = [len(q) * len(k) for pair in found if not pair.segments for q, k in spans(pair)]
        work.append(sum(triangle) + sum(square))
    assert sum(work) == tokens * (tokens + 1) // 2
    assert max(work) == min(work)
