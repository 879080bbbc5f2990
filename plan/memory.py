"""Computes the peak memory of a rank by part, counting what autograd, the optimizer and the schedules keep.

The counts follow our code: `parallel/bucket.py`, `zero.py` and `fully_sharded.py` for the state, `model/` and
`recompute.py` for activations. `benchmarks/memory.py` compares them with measurements.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

from triplane.model.config import CHUNK_LOGITS
from triplane.model.describe import layer_weights
from triplane.parallel.axes import local_activations, local_elements
from triplane.parallel.config import BUCKET_ELEMENTS
from triplane.parallel.packing import least_elements
from triplane.plan.shares import (
    RankKind,
    Work,
    held,
    in_flight,
    layer_costs,
    layer_kinds,
    layer_parameters,
    table_parameters,
)

Device = Literal["cuda", "cpu"]

_STATISTIC = 4
"""Bytes of an fp32 value that is kept per token or head."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at one point in time."""

    weights: int
    gradients: int
    optimizer: int
    """fp32 weights, moments, and the average of weights."""
    activations: int
    """Tensors that forward keeps for backward."""
    temporary: int
    """Reduction buckets, gathered weights, the head's logits, a block's gradients."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporary


def peak_memory(work: Work, rank: RankKind, device: Device = "cuda") -> Memory:
    """Returns the peak memory during a step. On a CPU norms keep more, chunks are smaller, and nothing overlaps."""
    layout = work.layout
    if layout.shards_weights(work.replicas):
        return max(_moments_of_shards(work, rank, device), key=lambda memory: memory.total)
    state = _offloaded(work, rank, device) if layout.uses_deepspeed else _own(work, rank, device)
    activations = kept_activations(work, rank, device)

    def moment(gradients: int, activations: int, temporary: int) -> Memory:
        return Memory(
            weights=state.weights,
            gradients=gradients,
            optimizer=state.optimizer,
            activations=activations,
            temporary=temporary,
        )

    loss = moment(state.accumulated, activations, state.kept + (_loss(work, device) if rank.has_head else 0))
    kinds = layer_kinds(work, rank.layers)
    block = max((_block_gradients(work, kind, device) for kind in kinds), default=0)
    whole = max(_block(work, kind, device) for kind in set(work.kinds))
    first_backward = moment(state.accumulated, activations, state.first + block)
    last_backward = moment(state.gradients, whole, state.last + block)
    fullest = max((loss, first_backward, last_backward), key=lambda memory: memory.total)
    update = state.weights + state.optimizer + state.gradients + state.update
    return replace(fullest, temporary=fullest.temporary + max(0, update - fullest.total))


class _State(NamedTuple):
    """Bytes of weights, gradients and their reduction."""

    weights: int
    optimizer: int
    gradients: int
    """Once all have arrived."""
    accumulated: int
    """Gradients during the forward pass of the last micro-batch."""
    kept: int
    """Buffers during that pass."""
    first: int
    """Buffers as its backward pass starts."""
    last: int
    """Buffers as its backward pass ends."""
    update: int
    """What the update allocates."""


def _own(work: Work, rank: RankKind, device: Device) -> _State:
    """Returns the state of ZeRO 0 to 2."""
    rank_holds, shards = held(work, rank), work.shards
    owned, share = rank_holds.parameters, rank_holds.updated
    on_host = work.layout.offload_optimizer and device == "cuda"
    bucket = _STATISTIC * min(least_elements(shards), owned)
    received = bucket if device == "cpu" and shards > 1 else 0  # gloo exchanges shares, which are then summed
    partitioned = work.layout.zero == 2 and work.layout.pp == 1 and shards > 1
    gradients = _STATISTIC * (share if partitioned else owned)
    accumulated = gradients if work.micro_batches > 1 else 0
    return _State(
        weights=work.element_bytes * owned,
        # Weights in fp32 are their own masters.
        optimizer=0 if on_host else 4 * (rank_holds.state + work.bf16 * share),
        gradients=gradients,
        accumulated=accumulated,
        kept=0,
        first=bucket if partitioned or not accumulated else 0,
        # One bucket is filled while another is on its way.
        last=(min(2 * bucket, _STATISTIC * owned) if partitioned else 0) + received,
        update=received,
    )


def _offloaded(work: Work, rank: RankKind, device: Device) -> _State:
    """Returns the state of ZeRO 1 and 2 with the optimizer on the host, by DeepSpeed."""
    rank_holds, zero, pipelined = held(work, rank), work.layout.zero, work.layout.pp > 1
    owned, share = rank_holds.parameters, rank_holds.updated
    # With a pipeline all gradients are kept until the schedule ends.
    partitioned = zero == 2 and not pipelined
    overlapped = device == "cuda" and not pipelined  # one bucket is filled while the other is sent
    bucket = _STATISTIC * min(BUCKET_ELEMENTS, owned) * (2 if overlapped else 1)
    if pipelined and zero == 2:  # allocated once the activations are freed
        bucket = 0
    gradients = _STATISTIC * (share if partitioned else owned)
    return _State(
        weights=work.element_bytes * owned,
        optimizer=0 if device == "cuda" else 4 * (share + rank_holds.state),
        gradients=gradients,
        accumulated=gradients if work.micro_batches > 1 else 0,
        # ZeRO 1 allocates its bucket in the first backward and keeps it until the last.
        kept=bucket if zero == 1 and max(work.micro_batches, work.layout.pp) > 1 else 0,
        first=bucket,
        last=bucket,
        update=8 * share,
    )


def _moments_of_shards(work: Work, rank: RankKind, device: Device) -> list[Memory]:
    """Returns the fullest moments of a step with ZeRO 3, in which whole weights and gradients are temporary."""
    width, rank_holds = work.element_bytes, held(work, rank)
    share, state = rank_holds.updated, rank_holds.state
    kinds = layer_kinds(work, rank.layers)
    unit = max((layer_parameters(work, kind) for kind in kinds), default=0)
    block = max((_block_gradients(work, kind, device) for kind in kinds), default=0)
    table, tied = table_parameters(work), work.model.tie_embeddings and rank.has_head and rank.has_embedding
    on_host = work.layout.offload_optimizer and device == "cuda"

    def moment(activations: int, temporary: int, *, first: bool) -> Memory:
        gradients = 0 if on_host or (first and work.micro_batches == 1) else 4 * share
        optimizer = 0 if on_host else 4 * (share + state)
        return Memory(weights=0, gradients=gradients, optimizer=optimizer, activations=activations, temporary=temporary)

    # A tied table is whole throughout, and so is its gradient from the head's backward on.
    whole = width * table if tied else 0
    kept = kept_activations(work, rank, device)
    moments = []
    backward = 3 * width * unit + block  # the weights of a block, those of the next, gradients
    reduced = 4 * unit  # the input of a reduction stays until the next one
    if rank.has_head:
        # A table is received in memory of its own, and copied.
        moments.append(moment(kept, _loss(work, device) + (whole or 2 * width * table), first=True))
        if not tied:
            moments.append(moment(kept, width * (table + unit) + 4 * table, first=True))
            reduced = max(reduced, 4 * table)
        kept -= _head_kept(work, device)
    moments.append(moment(kept, 2 * whole + reduced + backward, first=True))
    last = max((_block(work, kind, device) for kind in kinds), default=0)
    moments.append(moment(last, 2 * whole + 4 * unit + backward, first=False))
    if rank.has_embedding:
        moments.append(moment(0, 2 * whole + (width + 4) * table, first=False))
    return moments


def kept_activations(work: Work, rank: RankKind, device: Device = "cuda") -> int:
    """Returns what forward keeps for backward, for all micro-batches in flight."""
    stream, kept = _stream(work), 0
    for stage, count in zip(rank.stages, in_flight(work, rank)):
        passed_on = stream if work.layout.pp > 1 and not stage.head else 0  # the schedules keep what a stage sends
        kinds = layer_kinds(work, stage.layers)
        blocks = sum(number * _block_kept(work, kind, device) for kind, number in kinds.items())
        kept += count * (blocks + passed_on)
    return kept + (_head_kept(work, device) if rank.has_head else 0)


@cache
def _block_kept(work: Work, kind: int, device: Device) -> int:
    """Returns what a block keeps of a micro-batch, depending on recomputation."""
    match work.layout.recomputed(kind):
        case "full":
            return _stream(work)
        case "none":
            return _block(work, kind, device)
    # Selective keeps the block's input and the outputs of products and attention; with tp, those of row layers are
    # partial sums of all tokens.
    outputs = sum(local_activations(cost.outputs, work.layout.tp) for cost in layer_costs(work, kind))
    return _stream(work) + work.tokens * work.element_bytes * outputs + _attention(work, kind)


@cache
def _block(work: Work, kind: int, device: Device) -> int:
    """Returns what a block keeps of a micro-batch without recomputation."""
    tp, tokens, width = work.layout.tp, work.tokens, work.element_bytes
    costs = layer_costs(work, kind)
    kept = tokens * width * sum(local_activations(cost.kept, tp) for cost in costs)
    if work.layout.fp8:  # each of its products keeps one-byte copies of its input and weight
        layer = [weight for weight in layer_weights(work.model, work.model.layer(kind)) if weight.in_fp8]
        kept += sum(tokens * local_activations(weight.axes[1:], tp) + local_elements(weight, tp) for weight in layer)
        kept += tokens * width * sum(local_activations(cost.wide, tp) for cost in costs)
    else:
        # The output of attention, which its last product reads, is among what attention keeps.
        kept += tokens * width * sum(local_activations(cost.inputs, tp) for cost in costs)
    return len(work.model.block_norms) * _norm(work, device) + kept + _attention(work, kind)


def _attention(work: Work, kind: int) -> int:
    """Returns the bytes of queries, keys, values, the output, and the log-sum-exp of each query's scores."""
    tp, (cost, _) = work.layout.tp, layer_costs(work, kind)
    kept = local_activations(cost.attended, tp)
    if work.layout.cp > 1 and work.layout.cp_method == "ulysses":  # also the output before the exchange
        kept += local_activations(tuple(axis for axis in cost.attended if axis.name == "head"), tp) // 2
    return work.tokens * (work.element_bytes * kept + _STATISTIC * local_activations(cost.statistics, tp))


def _norm(work: Work, device: Device) -> int:
    """Returns what an RMSNorm keeps besides its output: its input; on a CPU also the normalized one, both in fp32."""
    fused = device == "cuda"
    return _stream(work) if fused else _stream(work) * 8 // work.element_bytes


def _stream(work: Work) -> int:
    """Returns the bytes of the residual stream of a micro-batch on this rank."""
    split = work.layout.tp if work.layout.sequence_parallel else 1
    return work.tokens // split * work.model.dim * work.element_bytes


def _head_kept(work: Work, device: Device) -> int:
    """Returns the bytes of the norm's input, and of the head's gradients, which its forward pass computes."""
    width = work.element_bytes
    one = _norm(work, device) + width * (work.tokens * work.model.dim + table_parameters(work))
    joined = 2 * _norm(work, device) + 3 * _stream(work)
    return work.predictions * one + (work.predictions - 1) * joined


def _loss(work: Work, device: Device) -> int:
    """Returns the head's largest temporary memory: a chunk's logits, and its weight's gradient in fp32."""
    table, tokens, width = table_parameters(work), work.tokens, work.element_bytes
    rows = table // work.model.dim
    chunk = min(tokens * rows, max(CHUNK_LOGITS[device], rows))
    copied = 4 if not work.bf16 and (work.layout.tp > 1 or work.layout.compile) else 0
    logits = chunk * ((8 if work.bf16 else 4) + copied)
    # `_head_kept` already counts the weight's gradient in its own width.
    summed = table * (4 - width)
    product = chunk * 4 + 2 * table if work.bf16 else 0
    return tokens * work.model.dim * width + summed + max(logits, product)


def _block_gradients(work: Work, kind: int, device: Device) -> int:
    """Returns the temporary memory of a block's backward: what is recomputed, and gradients between its products."""
    _, feed_forward = layer_costs(work, kind)
    between = work.tokens * work.element_bytes * local_activations(feed_forward.outputs, work.layout.tp)
    again = (
        0 if work.layout.recomputed(kind) == "none" else _block(work, kind, device) - _block_kept(work, kind, device)
    )
    return between + again
