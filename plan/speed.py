"""How long a step takes, from arithmetic alone: products, attention, memory traffic, messages, waiting."""

from dataclasses import dataclass

from triplane.model.count import flops_per_token
from triplane.plan.gpus import Gpu
from triplane.plan.rates import OURS, Program, Rates
from triplane.plan.shares import Work, layer_parameters, parameters, pipeline, table_parameters
from triplane.plan.traffic import context_s, data_s, sends_s, tensor_s

_HOST_BYTES_PER_S, _PCIE_BYTES_PER_S = 20e9, 25e9
"""What a rank has of its machine, for an optimizer that is offloaded."""
_UPDATE_BYTES = 34
"""Read and written for each parameter: fp32 weight, moments and gradient, and the weight in bf16."""


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
    layout, micro, rates = work.layout, work.micro_batches, Rates(gpu, program)
    ranks = pipeline(work)
    block, head = _block(work, rates), _head(work, rates)
    passes = [block.times(rank.layers) + (head if rank.has_head else _Pass()) for rank in ranks]
    costliest = max(passes, key=lambda one: one.total)
    steady = costliest.times(micro)
    # The first micro-batch reaches the costliest stage through the others, the sooner the more stages a rank has.
    bubble = (sum(one.total for one in passes) - costliest.total) / layout.virtual_stages
    waiting = bubble + sends_s(work, rates) * (micro + layout.pp - 1)
    owned = max(parameters(work, rank) for rank in ranks)
    data, update = data_s(work, rates, owned, costliest.total), _update_s(work, rates, owned)
    tokens = work.dp * micro * work.micro_batch_size * work.seq_len
    seconds = steady.total + waiting + data + update
    peak = gpu.bf16_tflops * 1e12 * work.replicas * layout.tp * layout.pp
    mfu = flops_per_token(work.model, work.seq_len) * tokens / seconds / peak
    return Speed(
        steady.products, steady.memory, steady.tensor, steady.context, waiting, data, update, mfu, tokens / seconds
    )


def _block(work: Work, rates: Rates) -> _Pass:
    model, layout, tokens = work.model, work.layout, work.tokens
    again = {"none": 0.0, "selective": rates.program.again, "full": 1.0}[layout.recompute]
    products = (6 + 2 * again) * layer_parameters(work) * tokens
    products_s = products / rates.products_flops_per_s(work.bf16, layout.fp8)
    # Two products forward and five backward, half of each spared by the mask.
    scores = model.n_heads // layout.tp * model.head_dim * work.seq_len * tokens
    attention_s = (7 + 2 * (layout.recompute == "full")) * scores / rates.attention_flops_per_s(work.bf16)
    computing_s = products_s + attention_s
    return _Pass(
        computing_s,
        # At least what the host needs to start the kernels.
        max(_block_bytes(work, rates.program) / rates.memory_bytes_per_s, rates.program.launch_s - computing_s),
        tensor_s(work, rates),
        context_s(work, rates, attention_s),
    )


def _block_bytes(work: Work, program: Program) -> float:
    """Read and written by what is no product: norms, rotations, SwiGLU, residuals, and the sum of gradients."""
    model, layout = work.model, work.layout
    heads = model.n_heads // layout.tp * model.head_dim
    stream = model.dim / (layout.tp if layout.sequence_parallel else 1)
    hidden = model.hidden_dim / layout.tp
    forward = 20 * stream + 40 * (heads + work.kv_heads * model.head_dim) + 10 * hidden
    if layout.fp8:  # find the largest, scale and round, for each product's input
        forward += 6 * (2 * model.dim + heads + hidden)
    passes = 3 + (layout.recompute != "none")  # backward moves twice as much
    moved = work.tokens * forward * passes * work.element_bytes / 2
    return moved * (program.fused if layout.compile else 1) + 12 * layer_parameters(work)


def _head(work: Work, rates: Rates) -> _Pass:
    table = table_parameters(work)
    moved = 40 * table / work.model.dim * work.tokens + 16 * table
    products = 6 * table * work.tokens
    return _Pass(products / rates.products_flops_per_s(work.bf16), moved / rates.memory_bytes_per_s)


def _update_s(work: Work, rates: Rates, owned: int) -> float:
    share = owned / (work.replicas if work.layout.zero else 1)
    if work.layout.offload_optimizer:
        return share * (_UPDATE_BYTES / _HOST_BYTES_PER_S + 6 / _PCIE_BYTES_PER_S)
    return share * _UPDATE_BYTES / rates.memory_bytes_per_s
