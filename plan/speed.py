"""Estimates the time of a step: matrix products, attention, memory traffic, communication, waiting."""

from dataclasses import dataclass
from functools import partial

from triplane.model.count import flops_per_token
from triplane.parallel.axes import local_activations
from triplane.plan.gpus import Gpu
from triplane.plan.rates import OURS, Program, Rates
from triplane.plan.shares import (
    RankKind,
    Work,
    held,
    layer_costs,
    layer_kinds,
    layer_parameters,
    layer_products,
    parameters,
    pipeline,
    table_parameters,
)
from triplane.plan.traffic import context_s, copies_s, data_s, dispatch_s, sends_s, sent_elements, tensor_s

_HOST_BYTES_PER_S, _PCIE_BYTES_PER_S = 20e9, 25e9
"""A rank's share of its host's bandwidth, for an offloaded optimizer."""
_UPDATE_BYTES, _STATE_BYTES = 18, 8
"""Bytes read and written per parameter: fp32 weight and gradient, and the weight in bf16; per value that is kept."""


@dataclass(frozen=True)
class Speed:
    """Time of one step by cause."""

    products_s: float
    """Products and attention of the slowest stage, including recomputation."""
    memory_s: float
    """The rest of its blocks, which is bound by memory bandwidth."""
    tensor_s: float
    context_s: float
    """Communication of context and expert parallelism."""
    pipeline_s: float
    """Waiting at the start and end of a step, and for activations."""
    data_s: float
    """Exposed communication of gradients and weights over dp, and of gradients between stages."""
    update_s: float
    mfu: float
    """FLOPs as PaLM counts them, as a share of the peak in bf16."""
    tokens_per_s: float
    """Over all GPUs."""

    @property
    def step_s(self) -> float:
        spent = self.products_s + self.memory_s + self.tensor_s + self.context_s
        return spent + self.pipeline_s + self.data_s + self.update_s


@dataclass(frozen=True)
class _Pass:
    """Seconds of one micro-batch, forward and backward, in a stage, layer or head."""

    products: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0
    context: float = 0.0

    def __add__(self, other: "_Pass") -> "_Pass":
        return _Pass(
            products=self.products + other.products,
            memory=self.memory + other.memory,
            tensor=self.tensor + other.tensor,
            context=self.context + other.context,
        )

    def times(self, factor: float) -> "_Pass":
        return _Pass(
            products=self.products * factor,
            memory=self.memory * factor,
            tensor=self.tensor * factor,
            context=self.context * factor,
        )

    @property
    def total(self) -> float:
        return self.products + self.memory + self.tensor + self.context


def speed(work: Work, gpu: Gpu, program: Program = OURS) -> Speed:
    """Estimates a step on `work.replicas x tp x pp` GPUs."""
    layout, micro, rates = work.layout, work.micro_batches, Rates(gpu, program)
    ranks = pipeline(work)
    blocks, head = {kind: _block(work, kind, rates) for kind in set(work.kinds)}, _head(work, rates)
    passes = []
    for rank in ranks:
        layers = (blocks[kind].times(number) for kind, number in layer_kinds(work, rank.layers).items())
        passes.append(sum(layers, head if rank.has_head else _Pass()))
    slowest = max(passes, key=lambda stage: stage.total)
    steady = slowest.times(micro)
    # The first micro-batch reaches the slowest stage through the others, sooner with more virtual stages per rank.
    bubble = (sum(stage.total for stage in passes) - slowest.total) / layout.virtual_stages
    waiting = bubble + sends_s(work, rates) * (micro + layout.pp - 1)
    data = data_s(work, rates, max(ranks, key=partial(parameters, work)), micro_batch_s=slowest.total)
    data += copies_s(work, rates)
    update = max(_update_s(work, rates, rank) for rank in ranks)
    tokens = work.dp * micro * work.micro_batch_size * work.seq_len
    seconds = steady.total + waiting + data + update
    peak = gpu.bf16_tflops * 1e12 * work.replicas * layout.tp * layout.pp
    mfu = flops_per_token(work.model, work.seq_len) * tokens / seconds / peak
    return Speed(
        products_s=steady.products,
        memory_s=steady.memory,
        tensor_s=steady.tensor,
        context_s=steady.context,
        pipeline_s=waiting,
        data_s=data,
        update_s=update,
        mfu=mfu,
        tokens_per_s=tokens / seconds,
    )


def _block(work: Work, kind: int, rates: Rates) -> _Pass:
    layout, tokens = work.layout, work.tokens
    again = {"none": 0.0, "selective": rates.program.again, "full": 1.0}[layout.recomputed(kind)]
    in_fp8, others = layer_products(work, kind)
    fast, plain = (rates.products_flops_per_s(work.bf16, fp8) for fp8 in (layout.fp8, False))
    products_s = (6 + 2 * again) * tokens * (in_fp8 / fast + others / plain)
    # Two products forward and five backward; the mask halves each.
    scores = local_activations(layer_costs(work, kind)[0].scores, layout.tp) * tokens
    attention_s = (7 + 2 * (layout.recomputed(kind) == "full")) * scores / rates.attention_flops_per_s(work.bf16)
    computing_s = products_s + attention_s
    moving_s = _block_bytes(work, kind, rates.program) / rates.memory_bytes_per_s
    return _Pass(
        products=computing_s,
        # A block takes at least as long as the host needs to launch its kernels.
        memory=max(moving_s, rates.program.launch_s - computing_s),
        tensor=tensor_s(work, kind, rates),
        context=context_s(work, kind, rates, attention_s) + dispatch_s(work, kind, rates),
    )


def _block_bytes(work: Work, kind: int, program: Program) -> float:
    """Returns the bytes moved outside of products: norms, rotations, gates, residuals, and gradient accumulation."""
    layout, costs, tp = work.layout, layer_costs(work, kind), work.layout.tp
    stream = work.model.dim / (tp if layout.sequence_parallel else 1)
    forward = 10 * len(costs) * stream + sum(local_activations(cost.moved, tp) for cost in costs)
    if layout.fp8:  # each product's input is scanned for its maximum, scaled and rounded
        attended = tuple(axis for axis in costs[0].attended if axis.name == "head")
        read = sum(local_activations(cost.inputs, tp) - local_activations(cost.wide, tp) for cost in costs)
        forward += 6 * (read + local_activations(attended, tp) // 2)
    passes = 3 + (layout.recomputed(kind) != "none")  # backward moves twice as much
    # No compiler fuses the copies of rows: those by expert, and where they travel those by rank, there and back.
    rows = sum(axis.size for axis in costs[1].dispatched)
    copied = 3 * sent_elements(work, kind, program) + (4 * rows if layout.ep > 1 else 0)
    elements = forward * (program.fused if layout.compile else 1) + copied
    return work.tokens * elements * passes * work.element_bytes / 2 + 12 * layer_parameters(work, kind)


def _head(work: Work, rates: Rates) -> _Pass:
    table = table_parameters(work)
    moved = work.predictions * (40 * table / work.model.dim * work.tokens + 16 * table)
    joins = 12 * work.model.dim**2 * (work.predictions - 1)
    products = (6 * table * work.predictions + joins) * work.tokens
    return _Pass(products / rates.products_flops_per_s(work.bf16), moved / rates.memory_bytes_per_s)


def _update_s(work: Work, rates: Rates, rank: RankKind) -> float:
    own = held(work, rank)
    share = own.updated
    moved = _UPDATE_BYTES * share + _STATE_BYTES * own.state
    if work.layout.offload_optimizer:
        return moved / _HOST_BYTES_PER_S + 6 * share / _PCIE_BYTES_PER_S
    return moved / rates.memory_bytes_per_s + own.update_flops / rates.products_flops_per_s(bf16=True)
