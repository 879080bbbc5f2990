"""Grouped-query attention over the segments of a batch. batch.py has the shape legend."""

from torch import Tensor, nn

from triplane.model.attend import SegmentAttention
from triplane.model.batch import Batch
from triplane.model.config import ModelConfig
from triplane.model.rope import rotate
from triplane.model.rule import Rule


class Attention(nn.Module):
    """Softmax attention in which n_heads / n_kv_heads query heads share a key and value head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=config.qkv_bias)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.core = SegmentAttention(Rule(scale=config.head_dim**-0.5))

    def forward(self, x_TD: Tensor, rotations: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        # The projections set the number of heads, since they may hold a share of them.
        tokens = x_TD.shape[0]
        q_THK = rotate(self.wq(x_TD).view(tokens, -1, self.head_dim), *rotations)
        k_TGK = rotate(self.wk(x_TD).view(tokens, -1, self.head_dim), *rotations)
        v_TGK = self.wv(x_TD).view(tokens, -1, self.head_dim)
        return self.wo(self.core(q_THK, k_TGK, v_TGK, batch).reshape(tokens, -1))
