"""Which layers stand on which pipeline stage."""

from itertools import pairwise

from triplane.model.transformer import Transformer
from triplane.parallel.errors import LayoutError
from triplane.parallel.mesh import Mesh

TIED_HEAD = {"head.weight": "embedding.weight"}
"""With tied embeddings the last stage holds a copy of the first stage's table."""


def stage_layers(n_layers: int, stages: int) -> list[range]:
    """Contiguous runs of layers; a remainder goes to the early stages, since the last has the head."""
    if stages > n_layers:
        raise LayoutError(f"pp ({stages}) stages need at least as many layers, but n_layers is {n_layers}")
    base, extra = divmod(n_layers, stages)
    starts = [stage * base + min(stage, extra) for stage in range(stages + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def cut_stage(model: Transformer, mesh: Mesh) -> None:
    """Keeps of the whole `model` (on meta) what this rank's stage runs."""
    keep = stage_layers(model.config.n_layers, mesh.pp.size)[mesh.pp.rank]
    for name in list(model.blocks):
        if int(name) not in keep:
            del model.blocks[name]
    if not mesh.first_stage:
        model.embedding = None
    if not mesh.last_stage:
        model.norm = model.head = None
