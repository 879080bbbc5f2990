"""What share of a GPU's and a network's rates a training program reaches."""

from dataclasses import dataclass

from triplane.plan.gpus import Gpu

_FP32_SLOWER = 15
"""Products in fp32 keep off the tensor cores."""


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
    pipeline_hides: bool = False
    """Whether gradients are reduced while backward goes on under a pipeline too."""
    gather_hidden: bool = False
    """Whether updated weights are gathered while the next step's forward goes on."""
    all_reduces: bool = True
    """Whether ZeRO 1 and 2 reduce all gradients on each rank, where a share would do."""
    gradient_bytes: int = 4
    again: float = 0.0
    """Share of the products that selective recomputation does again."""


OURS = Program()


@dataclass(frozen=True)
class Rates:
    """A program on a kind of GPU."""

    gpu: Gpu
    program: Program

    def products_flops_per_s(self, bf16: bool, fp8: bool = False) -> float:
        """Of matrix products."""
        if fp8 and self.gpu.fp8_tflops is not None:
            return self.gpu.fp8_tflops * 1e12 * self.program.fp8_products
        return self._peak(bf16) * self.program.products

    def attention_flops_per_s(self, bf16: bool) -> float:
        """Of attention's two products, fused."""
        return self._peak(bf16) * self.program.attention

    def _peak(self, bf16: bool) -> float:
        return self.gpu.bf16_tflops * 1e12 / (1 if bf16 else _FP32_SLOWER)

    @property
    def memory_bytes_per_s(self) -> float:
        """Of the GPU's own memory."""
        return self.gpu.memory_gb_per_s * 1e9 * self.program.memory

    def link_bytes_per_s(self, ranks: int, stride: int) -> float:
        """Of one rank in a group of `ranks` that are `stride` apart: a ring through all links that a machine has."""
        inside = self.gpu.node_gb_per_s * 1e9 * self.program.node
        here = max(1, self.gpu.gpus_per_node // stride)
        if ranks <= here:
            return inside
        return min(inside, here * self.gpu.network_gb_per_s * 1e9 * self.program.network)

    def collective_s(self, whole_bytes: float, ranks: int, stride: int) -> float:
        """An all-gather or reduce-scatter of `whole_bytes`; an all-reduce is two."""
        if ranks == 1:
            return 0.0
        moved_s = whole_bytes * (ranks - 1) / ranks / self.link_bytes_per_s(ranks, stride)
        return moved_s + self.program.hop_s * (ranks - 1)
