"""Estimates the exposed communication time of a step."""

from dataclasses import dataclass

from triplane.model.describe import model_weights
from triplane.parallel.axes import local_elements
from triplane.parallel.stages import copied_weights
from triplane.plan.rates import Program, Rates
from triplane.plan.shares import RankKind, Work, held, layer_costs


def tensor_s(work: Work, kind: int, rates: Rates) -> float:
    """Returns the time per block of `kind` and micro-batch: two all-reduces each way, of two collectives each."""
    # Recomputation repeats both gathers and the first reduce-scatter, or the first all-reduce.
    again = 0 if work.layout.recomputed(kind) == "none" else 3 if work.layout.sequence_parallel else 2
    whole = work.tokens * work.model.dim * work.element_bytes
    return (8 + again) * rates.collective_s(whole, work.layout.tp, 1) * (1 - rates.program.tp_hidden)


def context_s(work: Work, kind: int, rates: Rates, attention_s: float) -> float:
    """Returns the time per block of `kind` and micro-batch, overlapped with `attention_s` of attention."""
    layout, hop_s = work.layout, rates.program.hop_s
    if layout.cp == 1:
        return 0.0
    attention = work.model.layer(kind).attention
    assert attention is not None
    heads, kv_heads = attention.n_heads // layout.tp, max(1, attention.n_kv_heads // layout.tp)
    bandwidth = rates.link_bytes_per_s(layout.cp, layout.tp)
    head = work.tokens * attention.head_dim * work.element_bytes
    if layout.cp_method == "ulysses":
        exchanged = (2 * heads + 2 * max(kv_heads, layout.cp)) * head * (layout.cp - 1) / layout.cp
        return 2 * exchanged / bandwidth + 4 * hop_s * layout.cp
    # Forward sends keys and values; backward sends them and their fp32 gradients.
    hop = 2 * kv_heads * head / bandwidth
    exposed = max(0.0, hop * (layout.cp - 1) * (2 + 4 / work.element_bytes) - attention_s)
    return exposed + 2 * hop_s * layout.cp


def dispatch_s(work: Work, kind: int, rates: Rates) -> float:
    """Returns the time per block of `kind` and micro-batch: rows to their experts and back, and their gradients."""
    ep, sent = work.layout.ep, sent_elements(work, kind, rates.program)
    if ep == 1 or sent == 0 or rates.program.experts_hidden:
        return 0.0
    again = 0 if work.layout.recomputed(kind) == "none" else 2
    return (4 + again) * rates.all_to_all_s(work.tokens * sent * work.element_bytes, ep, work.layout.tp)


def sent_elements(work: Work, kind: int, program: Program) -> int:
    """Returns the elements per token that are sent to its experts, or put in their order where all are here."""
    sent = sum(axis.size for axis in layer_costs(work, kind)[1].dispatched)
    return sent if program.rows_sent is None else min(sent, program.rows_sent * work.model.dim)


def sends_s(work: Work, rates: Rates) -> float:
    """Returns the time of a micro-batch's sends between stages, there and back; virtual stages overlap them."""
    layout = work.layout
    if layout.pp == 1 or layout.virtual_stages > 1:
        return 0.0
    sent = work.tokens // (layout.tp if layout.sequence_parallel else 1) * work.model.dim * work.element_bytes
    return 2 * sent / rates.link_bytes_per_s(layout.pp, layout.tp * work.replicas)


def copies_s(work: Work, rates: Rates) -> float:
    """Returns the time per step to sum the gradients of weights that several stages hold."""
    layout, near, total = work.layout, work.layout.tp * work.replicas, 0.0
    if layout.pp == 1:
        return total
    shards = work.shards if layout.shards_weights(work.replicas) else 1
    for name, stages in copied_weights(work.model).items():
        share = rates.program.gradient_bytes * local_elements(model_weights(work.model)[name], layout.tp) / shards
        ranks, stride = (2, near * (layout.pp - 1)) if stages == "last" else (layout.pp, near)
        total += 2 * rates.collective_s(share, ranks, stride)
    return total


def data_s(work: Work, rates: Rates, rank: RankKind, *, micro_batch_s: float) -> float:
    """Returns the time per step of a rank's gradients and weights over dp x cp.

    Backward takes two thirds of a micro-batch's `micro_batch_s`, forward the rest.
    """
    layout, zero, program = work.layout, work.layout.zero, rates.program
    parts = _parts(work, rank)
    weights_s = sum(part.gathered_s(work.element_bytes, rates) for part in parts)
    reduced_s = sum(part.gathered_s(program.gradient_bytes, rates) for part in parts)
    copies_s = sum(part.copied_s(program.gradient_bytes, rates) for part in parts)
    if layout.shards_weights(work.replicas):
        # Every micro-batch gathers each block's weights twice and reduces its gradients once, while others compute.
        hops = sum(3 * (part.shards - 1) + 2 * (part.copies - 1) for part in parts)
        hops_s = program.hop_s * hops * work.model.n_layers / layout.pp
        exposed = max(0.0, 2 * weights_s + reduced_s + copies_s - micro_batch_s)
        return work.micro_batches * (exposed + hops_s)
    gradients_s = (2 if program.all_reduces else 1) * reduced_s + copies_s
    if zero and (layout.pp == 1 or program.pipeline_hides):
        gradients_s = max(0.0, gradients_s - micro_batch_s * 2 / 3)
    if zero == 2 and layout.pp == 1:
        gradients_s *= work.micro_batches
    if zero == 0:
        return gradients_s
    return gradients_s + (max(0.0, weights_s - micro_batch_s / 3) if program.gather_hidden else weights_s)


@dataclass(frozen=True)
class _Part:
    """Parameters of a rank that the same ranks hold: its experts, or all else."""

    parameters: int
    shards: int
    """Ranks that share their state."""
    copies: int
    stride: int
    """Distance of these ranks from one another."""

    def gathered_s(self, width: int, rates: Rates) -> float:
        """Returns the time to gather all shares of `width` bytes an element, or to reduce each to its owner."""
        return rates.collective_s(width * self.parameters, self.shards, self.stride)

    def copied_s(self, width: int, rates: Rates) -> float:
        """Returns the time to sum a share over its copies, which are as far apart as the shards are many."""
        share = width * self.parameters / self.shards
        return 2 * rates.collective_s(share, self.copies, self.stride * self.shards)


def _parts(work: Work, rank: RankKind) -> list[_Part]:
    own, layout, replicas = held(work, rank), work.layout, work.replicas
    others = _Part(own.parameters - own.experts, work.shards, replicas // work.shards, stride=layout.tp)
    if own.experts == 0:
        return [others]
    copies = replicas // layout.ep // work.expert_shards
    return [others, _Part(own.experts, work.expert_shards, copies, stride=layout.tp * layout.ep)]
