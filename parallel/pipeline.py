"""Cuts a model to one pipeline stage."""

from torch import nn

from triplane.model.transformer import Transformer
from triplane.parallel.stages import copied_weights


def cut_stage(model: Transformer, layers: range, first: bool, last: bool) -> None:
    """Drops everything from the whole `model` (on meta) that this stage does not run."""
    for name in list(model.blocks):
        if int(name) not in layers and not (last and int(name) >= model.config.n_layers):
            del model.blocks[name]
    if not first and not (last and model.config.predict_further is not None):
        model.embedding = None
        model.embedding_norm = nn.Identity()
        for positions in model.kinds_of_positions:
            if not positions.config.every_stage:
                positions.drop_weights()
    if not last:
        model.norm = model.head = None


def copied_names(model: Transformer) -> dict[str, str]:
    """Maps the names of parameters that a later stage copies from the first one to their names there."""
    copied = copied_weights(model.config)
    tied = {"head.weight": "embedding.weight"} if model.config.tie_embeddings else {}
    names = {name: tied.get(name, name) for name, _ in model.named_parameters()}
    return {name: there for name, there in names.items() if there in copied}
