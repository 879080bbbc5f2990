"""Layouts that a checkpoint is saved under and loaded into."""

from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.config import ParallelConfig

LAYOUTS = {
    "one": (ParallelConfig(zero=0), 1),
    "zero1": (ParallelConfig(), 1),
    "dp2": (ParallelConfig(zero=0), 2),
    "zero1 dp2": (ParallelConfig(), 2),
    "zero2 dp2": (ParallelConfig(zero=2), 2),
    "zero3 dp2": (ParallelConfig(zero=3), 2),
    "tp2": (ParallelConfig(tp=2, zero=0), 2),
    "tp2 sp dp2": (ParallelConfig(tp=2, sequence_parallel=True), 4),
    "zero3 tp2 dp2": (ParallelConfig(tp=2, zero=3), 4),
    "pp2": (ParallelConfig(pp=2, zero=0), 2),
    "pp2 v2 dp2": (ParallelConfig(pp=2, virtual_stages=2), 4),
    "tp2 pp2": (ParallelConfig(tp=2, pp=2, zero=0), 4),
    "zero1 tp2 pp2": (ParallelConfig(tp=2, pp=2), 4),
    "tp4": (ParallelConfig(tp=4), 4),
    "cp2 zero2 dp2": (ParallelConfig(cp=2, zero=2), 4),
}
