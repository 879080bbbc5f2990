"""Computes a rank's share of a model: stages, layers, parameters, micro-batches in flight."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import NamedTuple

from triplane.model.config import Layer, ModelConfig
from triplane.model.describe import embedding_weights, head_weights, joining_weights, layer_weights
from triplane.model.weights import Cost, Weight
from triplane.parallel.axes import local_elements, local_shape, spreads_experts, vocabulary_rows
from triplane.parallel.config import ParallelConfig, Recompute
from triplane.parallel.stages import copied_weights, group_size, stage_layers
from triplane.training.optimizers.adamw import AdamW
from triplane.training.optimizers.kinds import AnyOptimizer


@dataclass(frozen=True)
class Work:
    """The work of one rank in a step."""

    model: ModelConfig = field(hash=False)  # a search asks of one model, thousands of times
    layout: ParallelConfig
    dp: int
    bf16: bool
    micro_batch_size: int
    micro_batches: int
    """Micro-batches per dp rank and step."""
    seq_len: int
    optimizer: AnyOptimizer = field(default=AdamW(), hash=False)  # it has lists

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """The kind of each block: the number of the first one that is like it, and recomputed like it."""
        return _kinds(self.model, self.layout.recompute_pattern)

    @property
    def predictions(self) -> int:
        """Tokens that the head predicts for each."""
        return 1 + self.model.n_blocks - self.model.n_layers

    @property
    def replicas(self) -> int:
        """Ranks that share gradients and optimizer state."""
        return self.dp * self.layout.cp

    @property
    def shards(self) -> int:
        """Ranks that share the state of an optimizer."""
        return self.layout.shards(self.replicas)

    @property
    def expert_shards(self) -> int:
        """Ranks that share the state of an optimizer of the same experts."""
        return self.layout.expert_shards(self.replicas)

    @cached_property
    def division(self) -> "Division":
        """How its ranks divide the weights."""
        return Division(
            self.model,
            self.optimizer,
            tp=self.layout.tp,
            ep=self.layout.ep,
            shards=self.shards,
            expert_shards=self.expert_shards,
            by_rows=self.layout.shards_weights(self.replicas),
        )

    @property
    def tokens(self) -> int:
        """Tokens per micro-batch on one cp rank."""
        return self.micro_batch_size * self.seq_len // self.layout.cp

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bf16 else 4


@dataclass(frozen=True)
class Division:
    """All that a rank's share of a weight depends on, which many layouts have in common."""

    model: ModelConfig = field(hash=False)
    optimizer: AnyOptimizer = field(hash=False)
    tp: int
    ep: int
    shards: int
    expert_shards: int
    by_rows: bool
    """Whether weights are cut between rows, and so between experts: ZeRO 3."""


@dataclass(frozen=True)
class Stage:
    """Consecutive layers, and whether it embeds tokens and has the head."""

    layers: range
    embedding: bool
    head: bool


@dataclass(frozen=True)
class RankKind:
    """Ranks with equal shares."""

    name: str
    pp_rank: int
    stages: tuple[Stage, ...]
    """One per virtual stage."""

    @property
    def layers(self) -> list[int]:
        return [number for stage in self.stages for number in stage.layers]

    @property
    def has_head(self) -> bool:
        return self.stages[-1].head

    @property
    def has_embedding(self) -> bool:
        return any(stage.embedding for stage in self.stages)


@cache
def _kinds(model: ModelConfig, recompute: tuple[Recompute, ...]) -> tuple[int, ...]:
    pattern = model.pattern
    layers = [pattern[number % len(pattern)] for number in range(model.n_layers)]
    layers += pattern[-1:] * (model.n_blocks - model.n_layers)
    first: dict[tuple[Layer, Recompute], int] = {}
    return tuple(
        first.setdefault((layer, recompute[number % len(recompute)]), number) for number, layer in enumerate(layers)
    )


def pipeline(work: Work) -> list[RankKind]:
    """Returns the ranks of one pipeline, in order."""
    layout = work.layout
    count = layout.pp * layout.virtual_stages
    layers = list(stage_layers(work.model, count, work.seq_len))
    layers[-1] = range(layers[-1].start, work.model.n_blocks)
    embedding = {0} if work.model.predict_further is None else {0, count - 1}
    stages = [Stage(run, number in embedding, number == count - 1) for number, run in enumerate(layers)]
    names = ["first stage", *["middle stage"] * (layout.pp - 2), "last stage"] if layout.pp > 1 else ["every rank"]
    return [RankKind(name, rank, tuple(stages[rank :: layout.pp])) for rank, name in enumerate(names)]


def rank_kinds(work: Work) -> list[RankKind]:
    """Returns the first, a middle and the last rank of a pipeline; the second rank keeps most micro-batches."""
    ranks = pipeline(work)
    return ranks if len(ranks) < 3 else [ranks[0], ranks[1], ranks[-1]]


def layer_parameters(work: Work, kind: int) -> int:
    """Returns the parameters on one tp rank of a layer of `kind`."""
    return _of_layer(work.division, kind).parameters


def layer_products(work: Work, kind: int) -> tuple[int, int]:
    """Returns the parameters of such a layer that a token multiplies on one tp rank: in 8 bits with `fp8`, others."""
    return _products(work.model, kind, work.layout.tp)


@cache  # a search asks for thousands of layouts, and for few models and axes
def _products(model: ModelConfig, kind: int, tp: int) -> tuple[int, int]:
    found = [0, 0]
    for weight in layer_weights(model, model.layer(kind)):
        found[not weight.in_fp8] += round(local_elements(weight, tp) * weight.share)
    return found[0], found[1]


@cache
def layer_costs(work: Work, kind: int) -> tuple[Cost, Cost]:
    """Returns the costs of attention and feed-forward in a layer of `kind`."""
    layer, dim = work.model.layer(kind), work.model.dim
    assert layer.attention is not None and layer.feed_forward is not None
    return layer.attention.cost(dim, work.seq_len), layer.feed_forward.cost(dim)


def layer_kinds(work: Work, layers: Iterable[int]) -> Counter[int]:
    """Returns how many of these layers are of each kind."""
    return Counter(map(work.kinds.__getitem__, layers))


def table_parameters(work: Work) -> int:
    """Returns the parameters of the embedding or the head on one tp rank, including padding."""
    return vocabulary_rows(work.model.vocab_size, work.layout.tp) * work.model.dim


class Held(NamedTuple):
    """Elements of weights on a rank."""

    parameters: int
    """Before ZeRO 3 partitions them."""
    experts: int
    """Those of which ep ranks hold shares."""
    updated: int
    """Those that the rank updates: with ZeRO a share."""
    state: int
    """What the optimizer keeps of these."""
    update_flops: int
    """Of the products in an update, of which the ranks that share the state each compute as many."""


@cache
def held(work: Work, rank: RankKind) -> Held:
    """Returns what a rank holds."""
    parts = [(_of_layer(work.division, kind), count) for kind, count in layer_kinds(work, rank.layers).items()]
    parts.append((_of_ends(work.division, first=rank.pp_rank == 0, last=rank.has_head), 1))
    return Held(*(sum(count * part[number] for part, count in parts) for number in range(len(Held._fields))))


def parameters(work: Work, rank: RankKind) -> int:
    """Returns the parameters of a rank before ZeRO partitions them."""
    return held(work, rank).parameters


@cache
def _of_layer(division: Division, kind: int) -> Held:
    return _sum(division, layer_weights(division.model, division.model.layer(kind)))


@cache
def _of_ends(division: Division, *, first: bool, last: bool) -> Held:
    """Returns what the first or last rank of a pipeline, another or the only one holds besides layers."""
    model = division.model
    copied = {"every", "last"} if last else {"every"}
    here = {name for name, stages in copied_weights(model).items() if stages in copied}
    weights = [weight for weight in embedding_weights(model) if first or weight.name in here]
    if last:
        joins = [weight for _ in range(model.n_layers, model.n_blocks) for weight in joining_weights(model)]
        weights += [*head_weights(model), *joins]
    return _sum(division, weights)


def _sum(division: Division, weights: Iterable[Weight]) -> Held:
    tp, ep, total, experts, updated, state, flops = division.tp, division.ep, 0, 0, 0, 0, 0
    for weight in weights:
        elements, apart = local_elements(weight, tp, ep), spreads_experts(weight, ep)
        rows = local_shape(weight, tp)[0] // (ep if apart else 1)
        shards = division.expert_shards if apart else division.shards
        share = elements // rows * -(-rows // shards) if division.by_rows else -(-elements // shards)
        total, experts, updated = total + elements, experts + apart * elements, updated + share
        state += round(division.optimizer.kept(weight) * share)
        # Each tp rank brings whole matrices together.
        flops += division.optimizer.update_flops(weight) // (shards * (ep if apart else 1))
    return Held(total, experts, updated, state, flops)


def in_flight(work: Work, rank: RankKind) -> list[int]:
    """Returns, for each stage of the rank, the maximum number of micro-batches whose activations it keeps."""
    layout, total = work.layout, work.micro_batches
    if layout.virtual_stages == 1:
        return [min(total, layout.pp - rank.pp_rank)]
    # megatron-core's warm-up: each stage runs `group` micro-batches, then the rank switches to its next stage.
    group = group_size(total, layout.pp)
    forwards = 2 * (layout.pp - rank.pp_rank - 1) + (layout.virtual_stages - 1) * group + 1
    counts = [0] * layout.virtual_stages
    for number in range(min(forwards, total * layout.virtual_stages)):
        counts[number // group % layout.virtual_stages] += 1
    return counts
