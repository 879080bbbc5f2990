"""Counts parameters and floating-point operations, from the config alone."""

from functools import cache

from triplane.model.config import Layer, ModelConfig
from triplane.model.describe import embedding_weights, head_weights, joining_weights, layer_weights


def count_parameters(config: ModelConfig) -> int:
    """Counts all weights; a tied table counts once."""
    period = config.pattern
    layers = sum(weight.elements for layer in period for weight in layer_weights(config, layer))
    ends = sum(weight.elements for weight in [*embedding_weights(config), *head_weights(config)])
    further = [
        weight.elements
        for number in range(config.n_layers, config.n_blocks)
        for weight in [*joining_weights(config), *layer_weights(config, config.layer(number))]
    ]
    return layers * config.n_layers // len(period) + ends + sum(further)


@cache
def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Counts forward and backward of one token in training, as PaLM's appendix B does for MFU."""
    period = config.pattern
    layers = sum(layer_flops(config, layer, seq_len) for layer in period)
    return layers * config.n_layers // len(period) + head_flops(config) + further_flops(config, seq_len)


def further_flops(config: ModelConfig, seq_len: int) -> int:
    """Counts one token in all modules that predict further, each with a layer and the head."""
    return sum(
        layer_flops(config, config.layer(number), seq_len) + 12 * config.dim**2 + head_flops(config)
        for number in range(config.n_layers, config.n_blocks)
    )


def layer_flops(config: ModelConfig, layer: Layer, seq_len: int) -> int:
    """Counts one token in one block: 6 per weight that multiplies it, and 12 per score of attention.

    The latter ignores that a causal mask saves half of them.
    """
    assert layer.attention is not None
    matrices = [weight for weight in layer_weights(config, layer) if weight.role == "matrix"]
    products = sum(round(weight.elements * weight.share) for weight in matrices)
    return 6 * products + 12 * sum(axis.size for axis in layer.attention.cost(config.dim, seq_len).scores)


def head_flops(config: ModelConfig) -> int:
    """Counts one token in the head; the embedding is a look-up without a product."""
    return 6 * config.vocab_size * config.dim
