"""Softmax attention (Vaswani et al. 2017) with grouped queries (Ainslie et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt

from triplane.model.part import default_kind
from triplane.model.parts.attention import Attention
from triplane.model.parts.fix_norm import FixNorm
from triplane.model.parts.layer_norm import LayerNorm
from triplane.model.parts.positions import Positions, Tables
from triplane.model.parts.rms import RmsNorm
from triplane.model.parts.scale_norm import ScaleNorm
from triplane.model.weights import Axis, Cost, Weight, linear, under

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.batch import Batch
    from triplane.model.modules import PartModule

AnyNorm = Annotated[RmsNorm | LayerNorm | ScaleNorm | FixNorm, Field(discriminator="kind"), default_kind("rms")]


class Softmax(Attention):
    """Causal attention in which n_heads / n_kv_heads query heads share a key and value head."""

    kind: Literal["softmax"] = "softmax"
    """Softmax attention."""
    n_kv_heads: PositiveInt
    """Key and value heads; each serves `n_heads / n_kv_heads` query heads."""
    head_dim: PositiveInt
    """Width of one head; usually `dim / n_heads`."""
    qkv_bias: bool = False
    """True: queries, keys and values have a bias, as in Qwen2."""
    qk_norm: AnyNorm | None = None
    """Norm of queries and keys (Henry et al. 2020, Dehghani et al. 2023). None: none."""
    qk_norm_over: Literal["head", "each", "all"] = "head"
    """`head`: each head, one weight for all (Qwen3); `each`: each head, with its own weight (Cohere); `all`: all heads
    as one vector (OLMo 2)."""
    qk_norm_after_rotation: bool = False
    """True: as in Hunyuan."""
    clip_qkv: PositiveFloat | None = None
    """Queries, keys and values stay within plus and minus this, as in MPT and OLMo. None: any."""

    def weights(self, dim: int) -> Iterator[Weight]:
        yield from self._own_weights(dim)
        if self.qk_norm is not None:
            for name, axis in (("q_norm", self._heads), ("k_norm", self._kv_heads)):
                yield from under(name, self.qk_norm.weights(*self._normed(axis)))

    def cost(self, dim: int, seq_len: int) -> Cost:
        normed = 0 if self.qk_norm is None else self.head_dim
        moved = 40 * self.head_dim + 20 * normed

        def both(width: int) -> tuple[Axis, Axis]:
            return Axis("head", self.n_heads, width), Axis("kv_head", self.n_kv_heads, width)

        return Cost(
            inputs=(Axis("dim", dim),),
            kept=both(normed),
            outputs=(Axis("dim", dim),),
            attended=both(2 * self.head_dim),
            statistics=(Axis("head", self.n_heads),),
            scores=(Axis("head", self.n_heads, self.head_dim * self._seen(seq_len)),),
            moved=both(moved),
        )

    def split_problems(self, tp: int) -> Iterator[str]:
        if self.n_kv_heads % tp and tp % self.n_kv_heads:
            yield f"n_kv_heads ({self.n_kv_heads}) and tp ({tp}): one must be a multiple of the other"
        elif self.n_kv_heads % tp and self.qk_norm is not None and self.qk_norm_over != "head":
            yield (
                f'qk_norm_over "{self.qk_norm_over}" needs the weights of whole key heads on each rank, but '
                f"n_kv_heads ({self.n_kv_heads}) is not a multiple of tp ({tp})"
            )

    def shrunken(self, n_heads: int, head_dim: int) -> Self:
        groups = min(n_heads, self.n_heads // self.n_kv_heads)
        kv_heads = n_heads // groups if n_heads % groups == 0 else 2
        return self.model_copy(update={"n_heads": n_heads, "n_kv_heads": kv_heads, "head_dim": head_dim})

    def forward(self, m: PartModule, x_TD: Tensor, positions: Positions, tables: Tables, batch: Batch) -> Tensor:
        # The projections set the number of heads, since they may hold a share of them.
        q, k, v = m.wq(x_TD), m.wk(x_TD), m.wv(x_TD)
        if self.clip_qkv is not None:
            q, k, v = (x.clamp(-self.clip_qkv, self.clip_qkv) for x in (q, k, v))
        if not self.qk_norm_after_rotation:
            q, k = self._normalized(m, q, k)
        q_THK, k_TGK, v_TGK = (x.view(len(x_TD), -1, self.head_dim) for x in (q, k, v))
        q_THK, k_TGK = positions.rotate(q_THK, tables), positions.rotate(k_TGK, tables)
        if self.qk_norm_after_rotation:
            q, k = self._normalized(m, q_THK.flatten(1), k_TGK.flatten(1))
            q_THK, k_TGK = q.view_as(q_THK), k.view_as(k_TGK)
        sinks_H = m.use("sinks") if self.sinks else None
        out_THK = m.core(q_THK, k_TGK, v_TGK, batch, positions.bias(tables), sinks_H)
        return m.wo(out_THK.flatten(1))

    def build(self, dim: int) -> PartModule:
        from triplane.model.attend import SegmentAttention
        from triplane.model.modules import PartModule

        module = PartModule(self, self._own_weights(dim))
        if self.qk_norm is not None:
            module.q_norm = self.qk_norm.build(*self._normed(self._heads))
            module.k_norm = self.qk_norm.build(*self._normed(self._kv_heads))
        module.core = SegmentAttention(self.rule())
        return module

    @property
    def _heads(self) -> Axis:
        return Axis("head", self.n_heads, self.head_dim)

    @property
    def _kv_heads(self) -> Axis:
        return Axis("kv_head", self.n_kv_heads, self.head_dim)

    def _own_weights(self, dim: int) -> Iterator[Weight]:
        stream = Axis("dim", dim)
        yield from self._sinks()
        yield from linear("wq", self._heads, stream, bias=self.qkv_bias)
        yield from linear("wk", self._kv_heads, stream, bias=self.qkv_bias)
        yield from linear("wv", self._kv_heads, stream, bias=self.qkv_bias)
        yield from linear("wo", stream, self._heads, init="residual", bias=self.output_bias)

    def _normed(self, heads: Axis) -> tuple[Axis, ...]:
        """Returns the axes of the weights of a norm over these heads."""
        head_dim = Axis("head_dim", self.head_dim)
        return {"head": (head_dim,), "each": (Axis(heads.name, heads.count), head_dim), "all": (heads,)}[
            self.qk_norm_over
        ]

    def _normalized(self, m: PartModule, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.qk_norm is None:
            return q, k
        if self.qk_norm_over == "all":
            return m.q_norm(q), m.k_norm(k)
        q_norm, k_norm = (
            norm(x.view(len(x), -1, self.head_dim)).flatten(1) for norm, x in ((m.q_norm, q), (m.k_norm, k))
        )
        return q_norm, k_norm
