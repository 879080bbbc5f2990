"""Counts parameters and floating-point operations, from the config alone."""

from triplane.model.config import ModelConfig


def count_parameters(config: ModelConfig) -> int:
    """Counts all weights; a tied table counts once."""
    tables = 1 if config.tie_embeddings else 2
    norms = (2 * config.n_layers + 1) * config.dim
    biases = config.n_layers * (config.n_heads + 2 * config.n_kv_heads) * config.head_dim if config.qkv_bias else 0
    return config.n_layers * _block_matrices(config) + norms + biases + tables * config.vocab_size * config.dim


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Counts forward and backward of one token, as PaLM's appendix B does for MFU."""
    return config.n_layers * block_flops(config, seq_len) + head_flops(config)


def block_flops(config: ModelConfig, seq_len: int) -> int:
    """Counts one token in one block: 6 per weight of a matrix product, plus 12 n_heads head_dim seq_len for attention.

    The latter ignores that a causal mask saves half of it.
    """
    return 6 * _block_matrices(config) + 12 * config.n_heads * config.head_dim * seq_len


def head_flops(config: ModelConfig) -> int:
    """Counts one token in the head; the embedding is a look-up without a product."""
    return 6 * config.vocab_size * config.dim


def _block_matrices(config: ModelConfig) -> int:
    attention = 2 * config.dim * (config.n_heads + config.n_kv_heads) * config.head_dim
    return attention + 3 * config.dim * config.hidden_dim
