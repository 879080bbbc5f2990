"""Parameters and floating-point operations, from the config alone."""

from triplane.model.config import ModelConfig


def count_parameters(config: ModelConfig) -> int:
    """All weights; a tied table counts once."""
    tables = 1 if config.tie_embeddings else 2
    norms = (2 * config.n_layers + 1) * config.dim
    return config.n_layers * _block_matrices(config) + norms + tables * config.vocab_size * config.dim


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Forward and backward of one token, as PaLM's appendix B counts for MFU.

    6 for each weight of a matrix product (the embedding look-up is none), and 12 n_layers n_heads
    head_dim seq_len for attention, which leaves out that a causal mask spares half of it.
    """
    matrices = config.n_layers * _block_matrices(config) + config.vocab_size * config.dim
    attention = 12 * config.n_layers * config.n_heads * config.head_dim * seq_len
    return 6 * matrices + attention


def _block_matrices(config: ModelConfig) -> int:
    attention = 2 * config.dim * (config.n_heads + config.n_kv_heads) * config.head_dim
    return attention + 3 * config.dim * config.hidden_dim
