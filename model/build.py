"""A whole model on one device, filled with given weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

from triplane.model.config import ModelConfig
from triplane.model.errors import ModelError
from triplane.model.transformer import Transformer


def load_model(config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Transformer:
    """The model on the CPU with `weights` (by parameter name, no `head.weight` if tied) cast to `dtype`.

    Reads one weight at a time, so `weights` may load lazily. Raises ModelError if the names or
    shapes are not those of `config`.
    """
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device="cpu")
    if config.tie_embeddings:  # to_empty gave the head a table of its own
        assert model.head is not None and model.embedding is not None
        model.head.weight = model.embedding.weight
    parameters = dict(model.named_parameters())
    if wrong := sorted(parameters.keys() ^ weights.keys()):
        kind = "missing from" if wrong[0] in parameters else "unknown among"
        raise ModelError(f"{len(wrong)} names differ from the model's; the first, {wrong[0]}, is {kind} the weights.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            weight = weights[name]
            if weight.shape != parameter.shape:
                raise ModelError(f"{name} is {tuple(weight.shape)}, but the config makes it {tuple(parameter.shape)}.")
            parameter.copy_(weight)
    return model
