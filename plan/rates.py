"""Rates of GPU and network that a training program achieves."""

from dataclasses import dataclass

from triplane.plan.gpus import Gpu

_FP32_SLOWER = 15
"""Products in fp32 keep off the tensor cores."""


@dataclass(frozen=True)
class Program:
    """Shares of data-sheet rates that a training program achieves, and which communication it overlaps.

    The defaults are ours. The shares are fitted to published measurements (docs/plan.md); the overlap follows from the
    code (docs/parallelism.md).
    """

    products: float = 0.68
    fp8_products: float = 0.45
    attention: float = 0.19
    """Share of the peak of products, counting only unmasked scores."""
    memory: float = 0.83
    node: float = 0.75
    network: float = 0.87
    hop_s: float = 3.4e-6
    """Overhead of a collective per rank, from latency and from waiting for the slowest."""
    launch_s: float = 6e-4
    """Host time to launch the kernels of one block, forward and backward."""
    fused: float = 0.25
    """Memory traffic of a compiled block, as a share of an uncompiled one's."""
    tp_hidden: float = 0.0
    """Share of the tensor-parallel traffic that overlaps with products."""
    pipeline_hides: bool = False
    """Whether the reduction of gradients overlaps with backward even in a pipeline."""
    gather_hidden: bool = False
    """Whether the gathering of updated weights overlaps with the next step's forward."""
    all_reduces: bool = True
    """Whether ZeRO 1 and 2 reduce all gradients on each rank, although a share would do."""
    gradient_bytes: int = 4
    again: float = 0.0
    """Share of the products that selective recomputation repeats."""
    rows_sent: int | None = None
    """Rows per token that travel to its experts. None: one for each of these."""
    experts_hidden: bool = False
    """Whether rows travel to their experts and back while other micro-batches compute."""


OURS = Program()


@dataclass(frozen=True)
class Rates:
    """A program on a kind of GPU."""

    gpu: Gpu
    program: Program

    def products_flops_per_s(self, bf16: bool, fp8: bool = False) -> float:
        """Returns the rate of matrix products."""
        if fp8 and self.gpu.fp8_tflops is not None:
            return self.gpu.fp8_tflops * 1e12 * self.program.fp8_products
        return self._peak(bf16) * self.program.products

    def attention_flops_per_s(self, bf16: bool) -> float:
        """Returns the rate of fused attention."""
        return self._peak(bf16) * self.program.attention

    def _peak(self, bf16: bool) -> float:
        return self.gpu.bf16_tflops * 1e12 / (1 if bf16 else _FP32_SLOWER)

    @property
    def memory_bytes_per_s(self) -> float:
        """Bandwidth of the GPU's own memory."""
        return self.gpu.memory_gb_per_s * 1e9 * self.program.memory

    def link_bytes_per_s(self, ranks: int, stride: int) -> float:
        """Returns the bandwidth per rank of a ring over `ranks` ranks, `stride` apart, with all links in use."""
        inside = self.gpu.node_gb_per_s * 1e9 * self.program.node
        here = max(1, self.gpu.gpus_per_node // stride)
        if ranks <= here:
            return inside
        return min(inside, here * self.gpu.network_gb_per_s * 1e9 * self.program.network)

    def all_to_all_s(self, sent_bytes: float, ranks: int, stride: int) -> float:
        """Returns the time in which each of `ranks` ranks sends `sent_bytes` in equal parts to all of them.

        All that leaves a machine goes over its sender's own link, while a ring passes through a machine once, over all
        its links. The rest travels meanwhile.
        """
        here = min(ranks, max(1, self.gpu.gpus_per_node // stride))
        inside_s = (here - 1) / ranks * sent_bytes / self.link_bytes_per_s(here, stride)
        outside_s = (ranks - here) / ranks * sent_bytes / (self.gpu.network_gb_per_s * 1e9 * self.program.network)
        return max(inside_s, outside_s) + self.program.hop_s * ranks

    def collective_s(self, whole_bytes: float, ranks: int, stride: int) -> float:
        """Returns the time of an all-gather or reduce-scatter of `whole_bytes`; an all-reduce takes two."""
        if ranks == 1:
            return 0.0
        moved_s = whole_bytes * (ranks - 1) / ranks / self.link_bytes_per_s(ranks, stride)
        return moved_s + self.program.hop_s * (ranks - 1)
