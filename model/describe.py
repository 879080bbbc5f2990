"""The weights of a whole network, folded over its parts. Imports no torch."""

from collections.abc import Iterator
from functools import cache

from triplane.model.config import Layer, ModelConfig
from triplane.model.weights import Axis, Weight, under


@cache
def model_weights(config: ModelConfig) -> dict[str, Weight]:
    """Returns every weight by its name, in the order of the network; a tied head is not one."""
    found = [*embedding_weights(config)]
    for number in range(config.n_layers):
        found += under(f"blocks.{number}", layer_weights(config, config.layer(number)))
    for number in range(config.n_layers, config.n_blocks):
        found += under(f"blocks.{number}", joining_weights(config))
        found += under(f"blocks.{number}", layer_weights(config, config.layer(number)))
    return {weight.name: weight for weight in [*found, *head_weights(config)]}


def embedding_weights(config: ModelConfig) -> Iterator[Weight]:
    """Yields the weights before the blocks."""
    yield Weight("embedding.weight", (Axis("vocab", config.vocab_size), config.stream), "normal", "table")
    if config.embedding_norm is not None:
        yield from under("embedding_norm", config.embedding_norm.weights(config.stream))
    yield from under("positions.0", config.positions.weights(config.dim, config.attention.n_heads))


def layer_weights(config: ModelConfig, layer: Layer) -> Iterator[Weight]:
    """Yields the weights of one block."""
    assert layer.attention is not None and layer.feed_forward is not None
    norms = {name: list(under(name, config.norm.weights(config.stream))) for name in config.block_norms}
    for name, part in (("attention", layer.attention), ("feed_forward", layer.feed_forward)):
        yield from norms.get(f"{name}_norm", ())
        yield from under(name, part.weights(config.dim))
        yield from norms.get(f"{name}_post_norm", ())
        yield from norms.get(f"{name}_stream_norm", ())


@cache
def expert_counts(config: ModelConfig) -> tuple[int, ...]:
    """Returns the different numbers of experts that layers have; none without experts."""
    weights = (weight for layer in config.pattern for weight in layer_weights(config, layer))
    return tuple(dict.fromkeys(axis.count for weight in weights for axis in weight.axes if axis.name == "expert"))


def joining_weights(config: ModelConfig) -> Iterator[Weight]:
    """Yields what a module that predicts further has besides its block."""
    assert config.predict_further is not None
    yield from config.predict_further.weights(config.norm, config.stream)


def head_weights(config: ModelConfig) -> Iterator[Weight]:
    """Yields the weights after the blocks."""
    if config.final_norm:
        yield from under("norm", config.norm.weights(config.stream))
    vocabulary = Axis("vocab", config.vocab_size)
    if not config.tie_embeddings:
        yield Weight("head.weight", (vocabulary, config.stream), "normal", "table")
    if config.head_bias:
        yield Weight("head.bias", (vocabulary,), 0.0, "vector")
