"""Builds a whole model from given weights on one device, or computes its logits without ever holding it."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from triplane.model.batch import Batch
from triplane.model.config import ModelConfig
from triplane.model.transformer import Transformer
from triplane.storage.errors import ModelError


def load_model(config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Transformer:
    """Builds the model on the CPU with `weights` (by parameter name, no `head.weight` if tied) cast to `dtype`.

    Reads one weight at a time, so `weights` may load lazily. Raises ModelError if the names or
    shapes differ from those of `config`.
    """
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device="cpu")
    if config.tie_embeddings:  # to_empty gave the head a table of its own
        assert model.head is not None and model.embedding is not None
        model.head.weight = model.embedding.weight
    parameters = dict(model.named_parameters())
    _check_names(parameters, weights)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_weight(weights, name, parameter))
    return model


@torch.inference_mode()
def streamed_logits(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    batch: Batch,
    *,
    rounded_to: torch.dtype,
    rows_T: Tensor | slice = slice(None),
) -> Tensor:
    """Returns the logits of the tokens `rows_T`, (T, V), computed in fp32 from `weights` rounded to a dtype.

    Holds the weights of one layer at a time. Raises ModelError as `load_model` does.
    """
    with torch.device("meta"):
        model = Transformer(config)
    _check_names(dict(model.named_parameters()), weights)

    def take(path: str, module: nn.Module, _: object) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            tied = config.tie_embeddings and f"{path}.{name}" == "head.weight"
            full = "embedding.weight" if tied else f"{path}.{name}"
            weight = _weight(weights, full, parameter).to(rounded_to).float()
            module.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    def drop(module: nn.Module, *_: object) -> None:
        module.to("meta")

    for path, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(partial(take, path))
            module.register_forward_hook(drop)
    return model.score(model.hidden(batch)[rows_T])


def _check_names(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    if wrong := sorted(parameters.keys() ^ weights.keys()):
        kind = "missing from" if wrong[0] in parameters else "unknown among"
        raise ModelError(f"{len(wrong)} names differ from the model's; the first, {wrong[0]}, is {kind} the weights.")


def _weight(weights: Mapping[str, Tensor], name: str, parameter: nn.Parameter) -> Tensor:
    weight = weights[name]
    if weight.shape != parameter.shape:
        raise ModelError(f"{name} is {tuple(weight.shape)}, but the config makes it {tuple(parameter.shape)}.")
    return weight
