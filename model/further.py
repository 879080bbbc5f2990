"""A block that predicts a token after the next one."""

import torch
from torch import Tensor
from torch.nn import functional as F

from triplane.model.batch import Batch
from triplane.model.block import Block
from triplane.model.config import Layer, ModelConfig
from triplane.model.modules import WeightsModule
from triplane.model.parts.positions import Tables
from triplane.model.weights import Weight


class FurtherBlock(Block):
    """Joins the stream with embeddings of later tokens, and ends in a norm."""

    def __init__(self, config: ModelConfig, layer: Layer):
        super().__init__(config, layer)
        assert config.predict_further is not None
        self.embedding_norm = config.norm.build(config.stream)
        self.stream_norm = config.norm.build(config.stream)
        weights = {weight.name: weight for weight in config.predict_further.weights(config.norm, config.stream)}
        self.join = _Join(weights["join.weight"])
        self.norm = config.norm.build(config.stream)

    def forward(self, x_TD: Tensor, tables: Tables, batch: Batch, embedded_TD: Tensor | None = None) -> Tensor:
        assert embedded_TD is not None, "it reads embeddings"
        both_TE = torch.cat((self.embedding_norm(embedded_TD), self.stream_norm(x_TD)), dim=-1)
        stream_TD: Tensor = self.norm(super().forward(self.join(both_TE), tables, batch))
        return stream_TD


class _Join(WeightsModule):
    """A linear layer on the stream, of which each tp rank holds the whole."""

    def __init__(self, weight: Weight):
        super().__init__([Weight("weight", weight.axes, weight.init, weight.role)])

    def forward(self, x_TE: Tensor) -> Tensor:
        return F.linear(x_TE, self.use("weight"))
