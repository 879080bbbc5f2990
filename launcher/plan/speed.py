"""How long a step takes, from arithmetic alone: products, attention, memory traffic, messages, waiting."""

from dataclasses import dataclass

from triplane.launcher.plan.gpus import Gpu
from triplane.launcher.plan.shares import (
    RankKind,
    Work,
    layer_parameters,
    parameters,
    pipeline,
    table_parameters,
)
from triplane.model.count import flops_per_token


@dataclass(frozen=True)
class Program:
    """What share of a data sheet's rates a training program reaches, and what it hides behind what.

    The defaults are ours. The shares were fitted to published measurements (docs/plan.md); what hides behind what is
    read off the code (docs/parallelism.md).
    """

    products: float = 0.68
    fp8_products: float = 0.45
    attention: float = 0.19
    """Of the peak of products, counting what a causal mask leaves."""
    memory: float = 0.83
    node: float = 0.75
    network: float = 0.87
    hop_s: float = 3.4e-6
    """What a collective loses for each of its ranks, to latency and to waiting for the slowest."""
    launch_s: float = 6e-4
    """Of the host, to start the kernels of one block, forward and backward."""
    fused: float = 0.25
    """Memory traffic of a compiled block, as a share of an uncompiled one's."""
    tp_hidden: float = 0.0
    """Share of the tensor-parallel traffic that goes on beside products."""
    gradients_hidden: bool = True
    """Whether gradients are reduced while backward goes on, without a pipeline."""
    pipeline_hides: bool = False
    """The same under a pipeline."""
    gather_hidden: bool = False
    """Whether updated weights are gathered while the next step's forward goes on."""
    all_reduces: bool = True
    """Whether ZeRO 1 and 2 reduce all gradients on each rank, where a share would do."""
    gradient_bytes: int = 4
    again: float = 0.0
    """Share of the products that selective recomputation does again."""


OURS = Program()


@dataclass(frozen=True)
class Speed:
    """Seconds of one step, by what they are spent on."""

    products_s: float
    """Products and attention of the costliest stage, what is computed again included."""
    memory_s: float
    """The rest of its blocks, which moves bytes."""
    tensor_s: float
    context_s: float
    pipeline_s: float
    """Waiting at the start and end of a step, and for activations."""
    data_s: float
    """Gradients and weights over dp, as far as nothing hides them."""
    update_s: float
    mfu: float
    """FLOPs as PaLM counts them, as a share of the peak in bf16."""
    tokens_per_s: float
    """Of all GPUs."""

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
            self.products + other.products,
            self.memory + other.memory,
            self.tensor + other.tensor,
            self.context + other.context,
        )

    def times(self, factor: float) -> "_Pass":
        return _Pass(self.products * factor, self.memory * factor, self.tensor * factor, self.context * factor)

    @property
    def total(self) -> float:
        return self.products + self.memory + self.tensor + self.context


def speed(work: Work, gpu: Gpu, program: Program = OURS) -> Speed:
    """Of a step on `work.replicas x tp x pp` GPUs."""
    model, layout, micro = work.model, work.layout, work.micro_batches
    ranks = pipeline(work)
    layer, head = _layer(work, gpu, program), _head(work, gpu, program)
    passes = [layer.times(rank.layers) + (head if rank.has_head else _Pass()) for rank in ranks]
    costliest = max(passes, key=lambda one: one.total)
    # The first micro-batch reaches the costliest stage through the others, once for each virtual stage less.
    others = sum(one.total for one in passes) - costliest.total
    bubble = others / layout.virtual_stages
    sent = _sends(work, gpu, program) * (micro + layout.pp - 1)
    steady = costliest.times(micro)
    owned = max(parameters(work, rank) for rank in ranks)
    data = _data(work, gpu, program, owned, costliest.total)
    update = 34 * owned / (work.replicas if layout.zero else 1) / (gpu.memory_gb_per_s * 1e9 * program.memory)
    if layout.offload_optimizer:
        update = 34 * owned / work.replicas / 20e9 + 6 * owned / work.replicas / 25e9  # a host's memory, PCIe
    tokens = work.dp * micro * work.micro_batch_size * work.seq_len
    seconds = steady.total + bubble + sent + data + update
    gpus = work.replicas * layout.tp * layout.pp
    mfu = flops_per_token(model, work.seq_len) * tokens / seconds / gpus / (gpu.bf16_tflops * 1e12)
    return Speed(
        steady.products,
        steady.memory,
        steady.tensor,
        steady.context,
        bubble + sent,
        data,
        update,
        mfu,
        tokens / seconds,
    )


def _layer(work: Work, gpu: Gpu, program: Program) -> _Pass:
    model, layout, tokens = work.model, work.layout, work.tokens
    heads, kv_heads = model.n_heads // layout.tp, work.kv_heads
    weights = layer_parameters(work)
    again = {"none": 0.0, "selective": program.again, "full": 1.0}[layout.recompute]
    peak = gpu.bf16_tflops * 1e12
    if layout.fp8 and gpu.fp8_tflops:
        rate = gpu.fp8_tflops * 1e12 * program.fp8_products
    else:
        rate = peak * program.products / (1 if work.bf16 else 8)
    products = (6 + 2 * again) * weights * tokens / rate
    # Forward two products, backward five, half of them spared by the mask.
    scores = 2 * heads * model.head_dim * work.seq_len * tokens / 2
    attention = (
        (2 + 5 + 2 * (layout.recompute == "full")) * scores / (peak * program.attention / (1 if work.bf16 else 8))
    )
    return _Pass(
        products + attention,
        _block_traffic(work, heads, kv_heads, weights, gpu, program, products + attention),
        _tensor(work, gpu, program),
        _context(work, heads, kv_heads, gpu, program, attention),
    )


def _block_traffic(
    work: Work, heads: int, kv_heads: int, weights: int, gpu: Gpu, program: Program, computing: float
) -> float:
    """What is no product, in bytes read and written; at least what the host needs to start the kernels."""
    model, layout, tokens = work.model, work.layout, work.tokens
    split = layout.tp if layout.sequence_parallel else 1
    scale = work.element_bytes / 2
    stream, rotary, hidden = model.dim / split, (heads + kv_heads) * model.head_dim, model.hidden_dim / layout.tp
    forward = (20 * stream + 40 * rotary + 10 * hidden) * scale
    passes = 3 + (layout.recompute != "none")
    if layout.fp8:
        forward += 6 * (2 * model.dim + heads * model.head_dim + hidden)
    moved = tokens * forward * passes * (program.fused if layout.compile else 1)
    moved += 12 * weights  # each micro-batch's gradient is added up in fp32
    return max(moved / (gpu.memory_gb_per_s * 1e9 * program.memory), program.launch_s - computing)


def _head(work: Work, gpu: Gpu, program: Program) -> _Pass:
    table = table_parameters(work)
    rows = table / work.model.dim
    rate = gpu.bf16_tflops * 1e12 * program.products / (1 if work.bf16 else 8)
    moved = 40 * rows * work.tokens + 16 * table
    return _Pass(6 * table * work.tokens / rate, moved / (gpu.memory_gb_per_s * 1e9 * program.memory))


def _bandwidth(ranks: int, stride: int, gpu: Gpu, program: Program) -> float:
    """Bytes/s of one rank in a group of `ranks` that are `stride` apart: a ring through all of a machine's links."""
    inside = gpu.node_gb_per_s * 1e9 * program.node
    here = max(1, gpu.gpus_per_node // stride)
    return inside if ranks <= here else min(inside, here * gpu.network_gb_per_s * 1e9 * program.network)


def _collective(bytes_whole: float, ranks: int, stride: int, gpu: Gpu, program: Program) -> float:
    """An all-gather or reduce-scatter of `bytes_whole`; an all-reduce is two."""
    if ranks == 1:
        return 0.0
    moved = bytes_whole * (ranks - 1) / ranks / _bandwidth(ranks, stride, gpu, program)
    return moved + program.hop_s * (ranks - 1)


def _tensor(work: Work, gpu: Gpu, program: Program) -> float:
    """Two all-reduces forward and two backward, or as many pairs of all-gather and reduce-scatter."""
    # Computed again are both gathers and the first reduce-scatter, or the first all-reduce.
    again = 0 if work.layout.recompute == "none" else 3 if work.layout.sequence_parallel else 2
    bytes_whole = work.tokens * work.model.dim * work.element_bytes
    one = _collective(bytes_whole, work.layout.tp, 1, gpu, program)
    return (8 + again) * one * (1 - program.tp_hidden)


def _context(work: Work, heads: int, kv_heads: int, gpu: Gpu, program: Program, attention: float) -> float:
    layout, model = work.layout, work.model
    if layout.cp == 1:
        return 0.0
    bandwidth = _bandwidth(layout.cp, layout.tp, gpu, program)
    unit = work.tokens * model.head_dim * work.element_bytes
    if layout.cp_method == "ulysses":
        exchanged = (2 * heads + 2 * max(kv_heads, layout.cp)) * unit * (layout.cp - 1) / layout.cp
        return 2 * exchanged / bandwidth + 4 * program.hop_s * layout.cp
    # Keys and values forward, these and their fp32 gradients backward, beside the attention over those at hand.
    hop = 2 * kv_heads * unit / bandwidth
    exposed = max(0.0, hop * (layout.cp - 1) * (2 + 4 / work.element_bytes) - attention)
    return exposed + 2 * program.hop_s * layout.cp


def _sends(work: Work, gpu: Gpu, program: Program) -> float:
    """Of a micro-batch between plain stages, there and back; between virtual ones they hide."""
    layout = work.layout
    if layout.pp == 1 or layout.virtual_stages > 1:
        return 0.0
    split = layout.tp if layout.sequence_parallel else 1
    stride = layout.tp * work.replicas
    one = work.tokens // split * work.model.dim * work.element_bytes
    return 2 * one / _bandwidth(layout.pp, stride, gpu, program)


def _data(work: Work, gpu: Gpu, program: Program, owned: int, micro_batch_s: float) -> float:
    """What stays of the traffic over dp x cp when backward, two thirds of a micro-batch, hides what it can."""
    layout, zero = work.layout, work.layout.zero
    stride = layout.tp

    def collective(width: float) -> float:
        return _collective(width * owned, work.replicas, stride, gpu, program)

    whole = zero == 0 or (program.all_reduces and zero < 3)
    gradients = collective(program.gradient_bytes) * (2 if whole else 1)
    weights = collective(work.element_bytes)
    hops = program.hop_s * (work.replicas - 1) * work.model.n_layers / layout.pp
    if zero == 3:
        # Each block's weights come twice and its gradients go once, in every micro-batch, beside its neighbours.
        exposed = max(0.0, 2 * weights + gradients - micro_batch_s) + 3 * hops
        return work.micro_batches * exposed
    hidden = (program.gradients_hidden if layout.pp == 1 else program.pipeline_hides) and zero > 0
    times = work.micro_batches if zero == 2 and layout.pp == 1 else 1
    exposed = times * (max(0.0, gradients - micro_batch_s * 2 / 3) if hidden else gradients)
    if zero:
        exposed += max(0.0, weights - micro_batch_s / 3) if program.gather_hidden else weights
    return exposed


def stage_times(work: Work, gpu: Gpu, program: Program = OURS) -> list[tuple[RankKind, float]]:
    """Seconds of a micro-batch on each rank of a pipeline."""
    layer, head = _layer(work, gpu, program), _head(work, gpu, program)
    return [(rank, (layer.times(rank.layers) + (head if rank.has_head else _Pass())).total) for rank in pipeline(work)]
