"""The config table `[model]`: the network, independent of how it is trained or distributed."""

from typing import Literal

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**27, "meta": 2**27}
"""Logits per chunk of the head: about what a CPU's caches hold; half a GiB in fp32 on a GPU, which needs large
products. Meta stands for a GPU."""


class RopeScaling(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """Stretches the rotary frequencies, so that a model reads longer contexts than it was trained on."""

    kind: Literal["linear", "llama3"]
    """`linear` divides all frequencies (Chen et al. 2023), `llama3` only the low ones, smoothly (Llama 3.1)."""
    factor: float = Field(gt=1)
    """How many times longer the context becomes."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: wavelengths over `original_seq_len / low_freq_factor` are divided by `factor`."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: wavelengths under `original_seq_len / high_freq_factor` are unchanged."""
    original_seq_len: PositiveInt = 8192
    """llama3: tokens of context before stretching."""


class ModelConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """A decoder-only transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    vocab_size: PositiveInt
    """Token ids run from 0 to `vocab_size - 1`; must equal the tokenizer's."""
    dim: PositiveInt
    """Width of the residual stream."""
    n_layers: PositiveInt
    """Number of blocks."""
    n_heads: PositiveInt
    """Query heads."""
    n_kv_heads: PositiveInt
    """Key and value heads; each serves `n_heads / n_kv_heads` query heads."""
    head_dim: PositiveInt
    """Width of one head; usually `dim / n_heads`. Even, since RoPE rotates pairs."""
    hidden_dim: PositiveInt
    """Width inside the feed-forward block."""
    qkv_bias: bool = False
    """True: queries, keys and values have a bias, as in Qwen2."""
    rope_base: PositiveFloat = 10_000.0
    """Wavelength base of the rotary position embedding (theta)."""
    rope_scaling: RopeScaling | None = None
    """None: positions as trained."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """True: the output head is the embedding table."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; `init_std / sqrt(2 n_layers)` for those that write to the residual
    stream (GPT-2)."""
    z_loss_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean squared log-partition in the loss, which keeps logits small (PaLM, section 5)."""
