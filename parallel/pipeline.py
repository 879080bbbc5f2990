"""Which layers stand on which pipeline stage."""

from functools import cache

from triplane.model.config import ModelConfig
from triplane.model.count import block_flops, head_flops
from triplane.model.transformer import Transformer
from triplane.parallel.errors import LayoutError

TIED_HEAD = {"head.weight": "embedding.weight"}
"""With tied embeddings the last stage holds a copy of the first stage's table."""

_EMBEDDING = 0.1
"""Cost of the embedding as a share of the head's: no product, but its gradient is as large a table."""


def stage_layers(config: ModelConfig, stages: int, seq_len: int) -> list[range]:
    """Contiguous runs of layers for each stage, so that the costliest stage is as cheap as can be.

    The first stage has the embedding besides; the last has the head, and may have no layer.
    """
    n = config.n_layers
    if n < stages - 1:
        raise LayoutError(f"{stages} pipeline stages need at least {stages - 1} layers, but n_layers is {n}")
    block = float(block_flops(config, seq_len))
    head = float(head_flops(config))

    def cost(stage: int, layers: int) -> float:
        return layers * block + (stage == 0) * _EMBEDDING * head + (stage == stages - 1) * head

    @cache
    def best(stage: int, left: int) -> tuple[float, tuple[int, ...]]:
        """The cheapest way to give `left` layers to the stages from `stage` on: the largest cost, and the numbers."""
        if stage == stages - 1:
            return cost(stage, left), (left,)
        choices = []
        for layers in range(1, left - (stages - stage - 2) + 1):
            rest, numbers = best(stage + 1, left - layers)
            choices.append((max(cost(stage, layers), rest), (layers, *numbers)))
        return min(choices, key=lambda choice: (choice[0], max(choice[1])))

    _, numbers = best(0, n)
    starts = [sum(numbers[:stage]) for stage in range(stages)]
    return [range(start, start + number) for start, number in zip(starts, numbers)]


def cut_stage(model: Transformer, layers: range, first: bool, last: bool) -> None:
    """Keeps of the whole `model` (on meta) what one stage runs."""
    for name in list(model.blocks):
        if int(name) not in layers:
            del model.blocks[name]
    if not first:
        model.embedding = None
    if not last:
        model.norm = model.head = None
