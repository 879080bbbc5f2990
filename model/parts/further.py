"""Modules that predict tokens after the next one (DeepSeek-V3, section 2.2), for training alone."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field, PositiveFloat

from triplane.model.part import Part
from triplane.model.parts.norm import Norm
from triplane.model.weights import Axis, Weight, under


class PredictFurther(Part):
    """Module k predicts the token k after the next: a layer like the last one, over w [norm(e), norm(h)].

    e is the embedding of the token k after this one, h the output of module k - 1, at first of the network; both after
    their last norm. Embedding and head are the network's.
    """

    depth: int = Field(default=1, gt=0, le=16)
    """Modules; 1 in DeepSeek-V3."""
    weight: PositiveFloat = 0.3
    """Weight of the mean of their losses, each a mean over tokens as the main one; 0.3, later 0.1 in DeepSeek-V3."""

    def weights(self, norm: Norm, stream: Axis) -> Iterator[Weight]:
        """Yields what a module has besides its layer."""
        yield from under("embedding_norm", norm.weights(stream))
        yield from under("stream_norm", norm.weights(stream))
        yield Weight("join.weight", (stream, Axis("joined", 2, stream.count)), "normal", "matrix")
        yield from under("norm", norm.weights(stream))
