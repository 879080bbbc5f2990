"""The network: embedding, blocks, norm, head. Plain torch on flattened tokens (legend in batch.py).

Everything but attention works token by token, so tokens are one dim, (T, D), and documents of any
length pack without padding. Build it under `torch.device("meta")`; `init.py` sets the weights.
"""

from collections.abc import Callable

from torch import Tensor, nn

from triplane.model.batch import Batch
from triplane.model.block import Block
from triplane.model.config import ModelConfig
from triplane.model.further import FurtherBlock
from triplane.model.head import Head, Loss
from triplane.model.modules import PositionsModule, unchanged
from triplane.model.parts.positions import Positions, Tables


class Transformer(nn.Module):
    """A whole model, or a run of its blocks: `embedding` and `head` may be absent, blocks keep their numbers."""

    embedding: nn.Module | None
    embedding_norm: nn.Module
    norm: nn.Module | None
    leave: nn.Module
    """Between the last norm and the head, where tensor parallelism copies or gathers."""
    head: nn.Module | None
    embedded: Callable[[Tensor], Tensor]
    """Picks from a tensor with a row for each token those that `embedding` returns."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        attention = config.attention
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.embedding_norm = (
            nn.Identity() if config.embedding_norm is None else config.embedding_norm.build(config.stream)
        )
        self.embedded = unchanged
        kinds = config.all_positions
        self.positions = nn.ModuleList(
            kind.build(config.dim, attention.n_heads, attention.turning_dim) for kind in kinds
        )
        self.blocks = nn.ModuleDict(
            {
                str(i): (Block if i < config.n_layers else FurtherBlock)(config, config.layer(i))
                for i in range(config.n_blocks)
            }
        )
        self.norm = config.norm.build(config.stream) if config.final_norm else nn.Identity()
        self.leave = nn.Identity()
        self.head = Head(config)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    @property
    def kinds_of_positions(self) -> list[PositionsModule]:
        """The kinds of positions that layers have; the first is the model's own."""
        return list(self.positions)  # type: ignore[arg-type]

    def hidden(self, batch: Batch, x_TD: Tensor | None = None) -> Tensor:
        """Returns the residual stream after this model's blocks; starts from `x_TD`, or from the batch's tokens."""
        if x_TD is None:
            x_TD = self._embed(batch, batch.tokens_T)
        tables = self._tables(batch)
        for block in self.blocks.values():
            assert isinstance(block, Block)
            if not isinstance(block, FurtherBlock):
                x_TD = block(x_TD, tables[block.positions], batch)
        return x_TD

    def _tables(self, batch: Batch) -> dict[Positions, Tables]:
        return {
            kind.config: kind(kind.config.tables, batch.positions_T, batch.longest) for kind in self.kinds_of_positions
        }

    def _embed(self, batch: Batch, tokens_T: Tensor) -> Tensor:
        assert self.embedding is not None, "a model without an embedding continues from x_TD"
        x_TD = self.embedding(tokens_T)
        if self.config.embedding_scale != 1:
            x_TD = x_TD * self.config.embedding_scale
        for kind in self.kinds_of_positions:
            x_TD = kind(kind.config.embed, x_TD, self.embedded(batch.positions_T))
        return self.embedding_norm(x_TD)

    def logits(self, batch: Batch, x_TD: Tensor | None = None) -> Tensor:
        """Returns the scores of each token's successor, (T, V)."""
        return self.score(self.hidden(batch, x_TD))

    def score(self, x_TD: Tensor) -> Tensor:
        """Returns the scores of the successors of tokens whose stream ends as x, (T, V)."""
        assert self.norm is not None and self.head is not None, "the head is on another stage"
        return self.head(self.leave(self.norm(x_TD)))

    def forward(self, batch: Batch, x_TD: Tensor | None = None) -> Loss | Tensor:
        """Returns the loss if this model has the head, else the residual stream (T, D) for the next stage.

        Modules that predict further add theirs if the batch holds what they read.
        """
        x_TD = self.hidden(batch, x_TD)
        if self.norm is None or self.head is None:
            return x_TD
        x_TD = self.norm(x_TD)
        loss: Loss = self.head(self.leave(x_TD), batch.targets_T)
        return self._with_further(loss, batch, x_TD) if batch.further else loss

    def _with_further(self, loss: Loss, batch: Batch, x_TD: Tensor) -> Loss:
        """Returns the loss with those of modules that predict further."""
        assert self.config.predict_further is not None and self.norm is not None and self.head is not None
        share, tables = self.config.predict_further.weight / len(batch.further), self._tables(batch)
        blocks = [block for block in self.blocks.values() if isinstance(block, FurtherBlock)]
        for block, (tokens_T, targets_T) in zip(blocks, batch.further, strict=True):
            x_TD = block(x_TD, tables[block.positions], batch, self._embed(batch, tokens_T))
            own: Loss = self.head(self.leave(x_TD), targets_T)
            loss = Loss(
                loss.objective + share * own.objective,
                loss.cross_entropy,
                z=loss.z + share * own.z,
                further=loss.further + share * own.cross_entropy,
            )
        return loss
