"""One layer: attention and feed-forward, each a branch of the residual stream, and their norms."""

from torch import Tensor, nn

from triplane.model.batch import Batch
from triplane.model.config import Layer, ModelConfig
from triplane.model.modules import PartModule
from triplane.model.parts.positions import Positions, Tables


class Block(nn.Module):
    """Adds both branches to the stream, one after the other or side by side. A norm that is absent is an identity."""

    attention: PartModule
    feed_forward: PartModule
    enter: nn.Module
    """Between the first norm and a branch, where tensor parallelism copies or gathers."""

    def __init__(self, config: ModelConfig, layer: Layer):
        super().__init__()
        assert layer.attention is not None and layer.feed_forward is not None and layer.positions is not None
        self.residual = config.residual
        self.scale = config.residual_scale
        self.positions: Positions = layer.positions
        self.enter = nn.Identity()

        def norm(name: str) -> nn.Module:
            return config.norm.build(config.stream) if name in config.block_norms else nn.Identity()

        self.attention_norm = norm("attention_norm")
        self.attention = layer.attention.build(config.dim)
        self.attention_post_norm = norm("attention_post_norm")
        self.attention_stream_norm = norm("attention_stream_norm")
        self.feed_forward_norm = norm("feed_forward_norm")
        self.feed_forward = layer.feed_forward.build(config.dim)
        self.feed_forward_post_norm = norm("feed_forward_post_norm")
        self.feed_forward_stream_norm = norm("feed_forward_stream_norm")

    def forward(self, x_TD: Tensor, tables: Tables, batch: Batch) -> Tensor:
        if self.residual == "serial":
            branch = self.attend(self.enter(self.attention_norm(x_TD)), tables, batch)
            x_TD = self.attention_stream_norm(x_TD + branch)
            branch = self.feed(self.enter(self.feed_forward_norm(x_TD)), batch)
            return self.feed_forward_stream_norm(x_TD + branch)
        entered_TD = self.enter(self.attention_norm(x_TD))
        own_norm = self.residual == "parallel"
        fed_TD = self.enter(self.feed_forward_norm(x_TD)) if own_norm else entered_TD
        return x_TD + self.attend(entered_TD, tables, batch) + self.feed(fed_TD, batch)

    def attend(self, x_TD: Tensor, tables: Tables, batch: Batch) -> Tensor:
        """Returns what attention adds to the stream."""
        return self._scaled(self.attention_post_norm(self.attention(x_TD, self.positions, tables, batch)))

    def feed(self, x_TD: Tensor, batch: Batch) -> Tensor:
        """Returns what the feed-forward part adds to the stream."""
        return self._scaled(self.feed_forward_post_norm(self.feed_forward(x_TD, batch)))

    def _scaled(self, x_TD: Tensor) -> Tensor:
        return x_TD if self.scale == 1 else x_TD * self.scale
