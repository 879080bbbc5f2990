"""Cuts the model to what one pipeline stage runs."""

from triplane.model.transformer import Transformer

TIED_HEAD = {"head.weight": "embedding.weight"}
"""With tied embeddings the last stage holds a copy of the first stage's table."""


def cut_stage(model: Transformer, layers: range, first: bool, last: bool) -> None:
    """Keeps of the whole `model` (on meta) what one stage runs."""
    for name in list(model.blocks):
        if int(name) not in layers:
            del model.blocks[name]
    if not first:
        model.embedding = None
    if not last:
        model.norm = model.head = None
