"""The network: embedding, blocks, norm, head. Plain torch on flattened tokens (legend in batch.py).

Everything but attention works token by token, so tokens are one dim, (T, D), and documents of any
length pack without padding. Build it under `torch.device("meta")`; `init.py` sets the weights.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from triplane.model.attention import Attention
from triplane.model.batch import Batch
from triplane.model.config import ModelConfig
from triplane.model.head import Head, Loss
from triplane.model.rope import rotations


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w_gate = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w_up = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w_down = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.w_down(F.silu(self.w_gate(x_TD)) * self.w_up(x_TD))


class Block(nn.Module):
    """Attention, then feed-forward, each on the normed residual stream and added back to it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), cos_sin, batch)
        return x_TD + self.feed_forward(self.feed_forward_norm(x_TD))


class Transformer(nn.Module):
    """A whole model, or a run of its blocks: `embedding` and `head` may be absent, blocks keep their numbers."""

    embedding: nn.Module | None
    norm: nn.Module | None
    head: nn.Module | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleDict({str(i): Block(config) for i in range(config.n_layers)})
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = Head(config)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def hidden(self, batch: Batch, x_TD: Tensor | None = None) -> Tensor:
        """Returns the residual stream after this model's blocks; starts from `x_TD` without an embedding."""
        if self.embedding is not None:
            x_TD = self.embedding(batch.tokens_T)
        assert x_TD is not None, "a model without an embedding continues from x_TD"
        cos_sin = rotations(self.config, batch.positions_T)
        for block in self.blocks.values():
            x_TD = block(x_TD, cos_sin, batch)
        return x_TD

    def logits(self, batch: Batch, x_TD: Tensor | None = None) -> Tensor:
        """Returns the scores of each token's successor, (T, V)."""
        assert self.norm is not None and self.head is not None, "the head is on another stage"
        return self.head(self.norm(self.hidden(batch, x_TD)))

    def forward(self, batch: Batch, x_TD: Tensor | None = None) -> Loss | Tensor:
        """Returns the loss if this model has the head, else the residual stream (T, D) for the next stage."""
        x_TD = self.hidden(batch, x_TD)
        if self.norm is None or self.head is None:
            return x_TD
        return self.head(self.norm(x_TD), batch.targets_T)
