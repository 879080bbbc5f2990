"""Cuts a model to one pipeline stage."""

from triplane.model.transformer import Transformer

TIED_HEAD = {"head.weight": "embedding.weight"}
"""With tied embeddings, the last stage holds a copy of the first stage's table."""


def cut_stage(model: Transformer, layers: range, first: bool, last: bool) -> None:
    """Drops everything from the whole `model` (on meta) that this stage does not run."""
    for name in list(model.blocks):
        if int(name) not in layers:
            del model.blocks[name]
    if not first:
        model.embedding = None
    if not last:
        model.norm = model.head = None
