"""The choices that define the network; nothing here depends on how it is trained or spread."""

from typing import Literal

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**27, "meta": 2**27}
"""Logits in a chunk of the head's: about what a CPU's caches hold; half a GiB in fp32 for a GPU, which wants large
products. On meta a GPU is meant."""


class RopeScaling(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """Stretches the rotary frequencies so that a model reads further than it was trained to."""

    kind: Literal["linear", "llama3"]
    """`linear`: Chen et al. 2023, all frequencies divided. `llama3`: only the low ones, smoothly (Llama 3.1)."""
    factor: float = Field(gt=1)
    """How many times longer the context becomes."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: wavelengths over `original_seq_len / low_freq_factor` are divided by `factor`."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: wavelengths under `original_seq_len / high_freq_factor` stay."""
    original_seq_len: PositiveInt = 8192
    """llama3: the context before stretching, tokens."""


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
    """Width of one head; usually `dim / n_heads`. Even, since RoPE turns pairs."""
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
    """Standard deviation of initial weights; those that write to the residual stream get
    `init_std / sqrt(2 n_layers)` (GPT-2)."""
    z_loss_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean squared log-partition, which keeps logits small (PaLM, section 5)."""
